// What is known of each page of a region, in 4 bits for every 4 KiB ("granule"), whatever the region's page
// size.
//
// In two levels, as page tables have them, so that a region which is used thinly costs little. A directory
// says of each stretch of 512 granules that all of them are in one state, or which block has their states. A
// block is given out when the granules of a stretch come to differ, and stays that stretch's.
//
// The table lies in memory that the caller provides, zeroed: an untouched granule is `absent`, so that a
// table in a sparse file costs nothing for the parts of a region that nobody has looked at. It is right at
// every instant: who takes it up after its writer was cut off between any two stores finds each granule in
// the state before a change or the one after it, and each block in one place (docs/session-state.md has the
// bytes). Whoever else writes to the memory spoils states, and nothing else. Granules rather than pages,
// because madvise(2) may remove part of a huge page. Threads: none; the session that owns the region is the
// only one to touch it.
#pragma once

#include <uffdkit/units.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <utility>

namespace uffdkit {

enum class PageState : std::uint8_t {
  absent = 0,     // comes from the store when it is wanted
  fetching = 1,   // its bytes are being read; exactly one Fetch holds it
  installed = 2,  // was put into the client's memory. A hint: the client may have lost it since
  removed = 3,    // given back by the client: reads as zero for ever after, never from the store again
  zeroed = 4,     // removed, and a zero page was put there since (a hint, like `installed`)
  poisoned = 5,   // could not be read: answers with SIGBUS
};

// The bytes of a table.
namespace page_table {
inline constexpr std::uint64_t kGranulesPerStretch = 512;
inline constexpr std::uint64_t kHeadBytes = 64;
inline constexpr std::uint64_t kBlockBytes = kGranulesPerStretch / 2;
// An entry of the directory: all of the stretch is in the state of the low bits.
inline constexpr std::uint32_t kUniform = 1u << 31;

constexpr std::uint64_t stretches(PageCount granules) {
  return (granules.value + kGranulesPerStretch - 1) / kGranulesPerStretch;
}
constexpr std::uint64_t blocks_offset(PageCount granules) {
  return kHeadBytes + (stretches(granules) * sizeof(std::uint32_t) + 63) / 64 * 64;
}
}  // namespace page_table

// The most granules that a table is for: the numbers of its blocks go to 2^30. 2 PiB of memory.
inline constexpr PageCount kPageTableGranulesMax{page_table::kGranulesPerStretch << 30};

// The memory that a table for `granules` needs.
constexpr ByteCount page_table_bytes(PageCount granules) {
  return ByteCount(page_table::blocks_offset(granules) +
                   page_table::stretches(granules) * page_table::kBlockBytes);
}

class PageTable {
 public:
  PageTable() = default;
  // `memory` is zeroed, aligned to 8 bytes, has page_table_bytes(granules) bytes, and outlives the table.
  PageTable(std::span<std::byte> memory, PageCount granules)
      : directory_(reinterpret_cast<std::uint32_t*>(memory.data() + page_table::kHeadBytes)),
        blocks_(memory.data() + page_table::blocks_offset(granules)),
        granules_(granules) {}
  // The table that another has left in `memory`; what was `fetching` is absent again. `written` are the parts
  // of it that are no holes, whole pages in their order: nothing else is looked at, since that would fill
  // holes. Nothing if the table is damaged.
  static std::optional<PageTable> take_up(std::span<std::byte> memory, PageCount granules,
                                          std::span<const std::span<std::byte>> written);
  // Two tables would give one block out twice: what was moved from has none.
  PageTable(PageTable&& other) noexcept { swap(other); }
  PageTable& operator=(PageTable&& other) noexcept {
    PageTable moved(std::move(other));
    swap(moved);
    return *this;
  }

  PageCount granules() const { return granules_; }

  PageState get(PageIndex granule) const {
    const std::uint32_t entry = entry_of(granule);
    return has_block(entry) ? state_in(block_of(entry), granule) : state_of(entry);
  }

  void set(PageIndex granule, PageState state) {
    const std::uint32_t entry = entry_of(granule);
    if (!has_block(entry)) [[unlikely]]
      return set({granule, PageCount(1)}, state);
    set_in(block_of(entry), granule, state);
  }

  void set(PageRange range, PageState state);

  // Each state in `range` becomes what `change` says of it: PageState(PageState), asked once for each run of
  // granules that are in the same state.
  template <class Change>
  void change(PageRange range, Change change) {
    for (PageIndex at = range.first; at < range.end();) {
      const PageState state = get(at);
      const PageIndex end = end_of_run(at + PageCount(1), range.end(), state);
      if (const PageState changed = change(state); changed != state) set({at, end - at}, changed);
      at = end;
    }
  }

  // The first granule in [from, end) whose state is not `state`; `end` if all are.
  PageIndex end_of_run(PageIndex from, PageIndex end, PageState state) const;
  // The start of the run of `state` that ends before `from`, not below `start`.
  PageIndex start_of_run(PageIndex from, PageIndex start, PageState state) const;

 private:
  static constexpr std::uint64_t kWithin = page_table::kGranulesPerStretch - 1;

  static unsigned shift(PageIndex granule) { return granule.value % 2 * 4; }
  static std::uint64_t cell(PageIndex granule) { return (granule.value & kWithin) / 2; }

  // A value that no version of this program writes can only come from a damaged record: fail closed.
  static PageState checked(std::uint32_t value) {
    return value <= static_cast<std::uint32_t>(PageState::poisoned) ? static_cast<PageState>(value)
                                                                    : PageState::poisoned;
  }
  // Of a stretch without a block.
  static PageState state_of(std::uint32_t entry) {
    return entry == 0 ? PageState::absent : checked(entry ^ page_table::kUniform);
  }
  static PageState state_in(const std::byte* block, PageIndex granule) {
    return checked(std::to_integer<std::uint32_t>(block[cell(granule)]) >> shift(granule) & 0xf);
  }
  static void set_in(std::byte* block, PageIndex granule, PageState state) {
    std::byte& both = block[cell(granule)];
    const auto cleared = std::to_integer<unsigned>(both) & ~(0xfu << shift(granule));
    both = static_cast<std::byte>(cleared | static_cast<unsigned>(state) << shift(granule));
  }
  static void set_in(std::byte* block, PageRange range, PageState state);

  // Read once: another may write it meanwhile.
  std::uint32_t entry_of(PageIndex granule) const {
    return std::atomic_ref(directory_[granule.value / page_table::kGranulesPerStretch])
        .load(std::memory_order_relaxed);
  }
  // Not if the entry says a block that was not given out.
  bool has_block(std::uint32_t entry) const { return entry - 1 < given_out_; }
  std::byte* block_of(std::uint32_t entry) const { return blocks_ + (entry - 1) * page_table::kBlockBytes; }

  // The head's only field: the block that was given out last, with its stretch above. 0: none was yet.
  std::uint64_t& last_block() const {
    return *reinterpret_cast<std::uint64_t*>(reinterpret_cast<std::byte*>(directory_) -
                                             page_table::kHeadBytes);
  }

  void swap(PageTable& other) noexcept {
    std::swap(directory_, other.directory_);
    std::swap(blocks_, other.blocks_);
    std::swap(granules_, other.granules_);
    std::swap(given_out_, other.given_out_);
  }
  bool take_up_last();
  bool forget_fetches(std::span<std::byte> part);
  void set_in_stretch(PageRange part, PageState state);

  std::uint32_t* directory_ = nullptr;
  std::byte* blocks_ = nullptr;
  PageCount granules_;
  std::uint32_t given_out_ = 0;  // blocks, of the numbers from 1 on. What others may write is not asked again
};

// A removed page, whether or not a zero page was put there since.
constexpr bool reads_as_zero(PageState state) {
  return state == PageState::removed || state == PageState::zeroed;
}

}  // namespace uffdkit
