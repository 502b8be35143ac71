#include "engine/page_table.h"

#include <algorithm>
#include <cstring>

#include "base/publish.h"
#include "base/step.h"

namespace uffdkit {
namespace {

using page_table::kBlockBytes;
using page_table::kGranulesPerStretch;
using page_table::kUniform;

std::uint64_t stretch_of(PageIndex granule) {
  return granule.value / kGranulesPerStretch;
}

PageIndex first_of(std::uint64_t stretch) {
  return PageIndex(stretch * kGranulesPerStretch);
}

std::uint32_t uniform(PageState state) {
  return kUniform | static_cast<std::uint32_t>(state);
}

// Whether an entry says a state that there is.
bool is_uniform(std::uint32_t entry) {
  return entry == 0 || (entry ^ kUniform) <= static_cast<std::uint32_t>(PageState::poisoned);
}

int both(PageState state) {
  return static_cast<int>(state) * 0x11;
}

// The part of `bytes` that lies in [begin, end).
std::span<std::byte> part_in(std::span<std::byte> bytes, std::byte* begin, std::byte* end) {
  std::byte* const from = std::clamp(bytes.data(), begin, end);
  return {from, std::clamp(bytes.data() + bytes.size(), from, end)};
}

}  // namespace

// ---- taking up --------------------------------------------------------------------------------------------

std::optional<PageTable> PageTable::take_up(std::span<std::byte> memory, PageCount granules,
                                            std::span<const std::span<std::byte>> written) {
  PageTable table(memory, granules);
  const bool has_head = !written.empty() && written[0].data() == memory.data();
  if (has_head && !table.take_up_last()) return std::nullopt;
  for (const std::span<std::byte> part : written)
    if (!table.forget_fetches(part)) return std::nullopt;
  return table;
}

// The block that was given out last says how many there are. Its writer may have been cut off before the
// directory had it.
bool PageTable::take_up_last() {
  const std::uint64_t last = std::atomic_ref(last_block()).load(std::memory_order_relaxed);
  if (last == 0) return true;
  const std::uint64_t stretch = last >> 32;
  const auto number = static_cast<std::uint32_t>(last);
  const std::uint64_t stretches = page_table::stretches(granules_);
  if (stretch >= stretches || number == 0 || number > stretches) return false;
  given_out_ = number;
  const std::uint32_t entry = entry_of(first_of(stretch));
  if (entry == number) return true;
  if (!is_uniform(entry)) return false;  // a stretch keeps its block
  publish(directory_[stretch], number);
  return true;
}

bool PageTable::forget_fetches(std::span<std::byte> part) {
  constexpr auto kFetching = static_cast<std::byte>(PageState::fetching);
  auto* const directory = reinterpret_cast<std::byte*>(directory_);
  const std::uint64_t stretches = page_table::stretches(granules_);
  const std::span<std::byte> entries =
      part_in(part, directory, directory + stretches * sizeof(std::uint32_t));
  const auto first = static_cast<std::uint64_t>(entries.data() - directory) / sizeof(std::uint32_t);
  for (std::uint64_t i = first; i < first + entries.size() / sizeof(std::uint32_t); ++i) {
    const std::uint32_t entry = entry_of(first_of(i));
    if (!is_uniform(entry) && !has_block(entry)) return false;
    if (entry == uniform(PageState::fetching)) publish(directory_[i], uniform(PageState::absent));
  }
  for (std::byte& cell : part_in(part, blocks_, blocks_ + given_out_ * kBlockBytes)) {
    if ((cell & std::byte{0x0f}) == kFetching) cell &= std::byte{0xf0};
    if ((cell >> 4) == kFetching) cell &= std::byte{0x0f};
  }
  return true;
}

// ---- changes ----------------------------------------------------------------------------------------------

void PageTable::set(PageRange range, PageState state) {
  for (PageIndex at = range.first; at < range.end();) {
    const PageIndex end = std::min(range.end(), first_of(stretch_of(at) + 1));
    set_in_stretch({at, end - at}, state);
    at = end;
  }
}

void PageTable::set_in_stretch(PageRange part, PageState state) {
  const std::uint64_t stretch = stretch_of(part.first);
  const std::uint32_t entry = entry_of(part.first);
  if (has_block(entry)) return set_in(block_of(entry), part, state);
  if (state_of(entry) == state) return;
  const PageIndex end = std::min(first_of(stretch + 1), PageIndex(granules_.value));
  if (part.first == first_of(stretch) && part.end() == end)
    return publish(directory_[stretch], uniform(state));
  // Only where another has written to the directory.
  if (given_out_ >= page_table::stretches(granules_))
    return publish(directory_[stretch], uniform(PageState::poisoned));

  // All of the block: who was cut off before may have left something there.
  std::byte* block = blocks_ + given_out_ * kBlockBytes;
  std::memset(block, both(state_of(entry)), kBlockBytes);
  set_in(block, part, state);
  step();
  ++given_out_;
  publish(last_block(), stretch << 32 | given_out_);
  step();
  publish(directory_[stretch], given_out_);
}

void PageTable::set_in(std::byte* block, PageRange range, PageState state) {
  PageIndex granule = range.first;
  const PageIndex end = range.end();
  if (granule < end && granule.value % 2 != 0) {
    set_in(block, granule, state);
    granule = granule + PageCount(1);
  }
  // Two granules a byte.
  const std::uint64_t cells = (end.value - granule.value) / 2;
  if (granule < end && cells > 0) {
    std::memset(block + cell(granule), both(state), cells);
    granule = granule + PageCount(cells * 2);
  }
  if (granule < end) set_in(block, granule, state);
}

// ---- runs -------------------------------------------------------------------------------------------------

PageIndex PageTable::end_of_run(PageIndex from, PageIndex end, PageState state) const {
  while (from < end) {
    const PageIndex stretch_end = std::min(end, first_of(stretch_of(from) + 1));
    const std::uint32_t entry = entry_of(from);
    if (!has_block(entry)) {
      if (state_of(entry) != state) return from;
      from = stretch_end;
      continue;
    }
    const std::byte* block = block_of(entry);
    for (; from < stretch_end; from = from + PageCount(1))
      if (state_in(block, from) != state) return from;
  }
  return from;
}

PageIndex PageTable::start_of_run(PageIndex from, PageIndex start, PageState state) const {
  while (from > start) {
    const PageIndex last = from - PageCount(1);
    const PageIndex stretch_start = std::max(start, first_of(stretch_of(last)));
    const std::uint32_t entry = entry_of(last);
    if (!has_block(entry)) {
      if (state_of(entry) != state) return from;
      from = stretch_start;
      continue;
    }
    const std::byte* block = block_of(entry);
    for (; from > stretch_start; from = from - PageCount(1))
      if (state_in(block, from - PageCount(1)) != state) return from;
  }
  return from;
}

}  // namespace uffdkit
