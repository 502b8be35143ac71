#include "simulate/expected.h"

#include <fmt/format.h>

#include <utility>

namespace uffdkit::simulate {

std::bitset<256> ExpectedPage::possible(std::uint64_t offset) const {
  std::bitset<256> values;
  if (const auto found = written.find(offset); found != written.end()) {
    values = found->second.values;
  } else {
    if (image) values.set(image_byte(*image, offset));
    if (!image || may_be_zero) values.set(0);
  }
  if (leaving > 0) values.set(0);
  return values;
}

void ExpectedPage::write(std::uint64_t offset, std::uint8_t value) {
  Written now{.values = {}, .while_leaving = leaving > 0};
  now.values.set(value);
  written[offset] = now;
}

void ExpectedPage::leave(bool surely) {
  if (surely) {
    image.reset();
    std::erase_if(written, [](const auto& entry) { return !entry.second.while_leaving; });
  } else {
    may_be_zero = true;
  }
  for (auto& [offset, now] : written) now.values.set(0);
}

ExpectedPage* ExpectedMemory::find(Address address) {
  const auto found = pages_.find(address.value / kPage * kPage);
  return found == pages_.end() ? nullptr : &found->second;
}

void ExpectedMemory::add(AddressRange range, std::optional<std::uint64_t> first_image_page) {
  for (std::uint64_t page = 0; page < range.length.value / kPage; ++page) {
    ExpectedPage fresh{};
    if (first_image_page) fresh.image = *first_image_page + page;
    pages_[range.start.value + page * kPage] = fresh;
  }
}

void ExpectedMemory::forget(AddressRange range) {
  pages_.erase(pages_.lower_bound(range.start.value), pages_.lower_bound(range.end().value));
}

void ExpectedMemory::move(AddressRange from, Address to, ByteCount new_length, bool stays_mapped) {
  std::map<std::uint64_t, ExpectedPage> taken;
  for (std::uint64_t at = 0; at < from.length.value; at += kPage) {
    const auto found = pages_.find(from.start.value + at);
    if (found == pages_.end()) continue;
    if (at < new_length.value) taken.emplace(to.value + at, found->second);
    if (stays_mapped)
      found->second = {.image = {}, .writable = found->second.writable};
    else
      pages_.erase(found);
  }
  for (auto& [address, page] : taken) pages_[address] = page;
  if (new_length > from.length) add({to + from.length, new_length - from.length}, std::nullopt);
}

void ExpectedMemory::begin_leaving(AddressRange range) {
  for_each(range, [](ExpectedPage& page) {
    if (page.leaving++ > 0) return;
    for (auto& [offset, now] : page.written) now.while_leaving = false;
  });
}

void ExpectedMemory::end_leaving(AddressRange range, bool surely) {
  for_each(range, [&](ExpectedPage& page) {
    if (page.leaving == 0) return;
    page.leave(surely);
    --page.leaving;
  });
}

void ExpectedMemory::protect(AddressRange range, bool writable) {
  for_each(range, [&](ExpectedPage& page) { page.writable = writable; });
}

void ExpectedMemory::release() {
  for (auto& [address, page] : pages_) page.leave(false);
}

ExpectedMemory ExpectedMemory::child() const {
  ExpectedMemory copy = *this;
  for (auto& [address, page] : copy.pages_) {
    if (page.leaving > 0) page.leave(false);
    page.leaving = 0;
  }
  return copy;
}

ExpectedMemory::Looked ExpectedMemory::look_at(const sim::Access& access, const sim::Completion& ended) {
  ExpectedPage* page = find(access.address);
  if (page == nullptr) return {.wrong = fmt::format("{:#x} is there after munmap", access.address.value)};
  const std::uint64_t offset = access.address.value % kPage;
  if (access.write) {
    page->write(offset, std::to_integer<std::uint8_t>(access.value));
    return {};
  }
  Looked looked{.compared = true};
  if (!page->possible(offset).test(std::to_integer<std::size_t>(ended.value)))
    looked.wrong =
        fmt::format("{:#x} reads as {}, which it must not", access.address.value, to_string(ended));
  return looked;
}

}  // namespace uffdkit::simulate
