#include "wire/attach_request.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <numeric>

namespace uffdkit {
namespace {

Failure refuse(std::size_t number, const std::string& what) {
  return Failure(Error(fmt::format("region {}: {}", number, what), EINVAL));
}

Result<void> check_count(std::size_t count) {
  if (count == 0) return Failure(Error("no region", EINVAL));
  if (count > kRegionsMax)
    return Failure(Error(fmt::format("{} regions, more than the limit of {}", count, kRegionsMax), E2BIG));
  return {};
}

Result<void> check_memory(std::size_t number, AddressRange memory, PageSize page_size) {
  const std::uint64_t page = page_size.bytes().value;
  if (memory.length.value == 0) return refuse(number, "size is 0");
  if (!page_size.is_aligned(memory.length.value))
    return refuse(number, fmt::format("size {:#x} is not a multiple of the page size {:#x}",
                                      memory.length.value, page));
  if (!page_size.is_aligned(memory.start.value))
    return refuse(number, fmt::format("address {:#x} is not a multiple of the page size {:#x}",
                                      memory.start.value, page));
  // Subtracting cannot overflow where adding could.
  if (memory.start >= kAddressEnd || memory.length > kAddressEnd - memory.start)
    return refuse(number,
                  fmt::format("address {:#x} and size {:#x} reach beyond the user addresses' end {:#x}",
                              memory.start.value, memory.length.value, kAddressEnd.value));
  return {};
}

Result<void> check_offset(std::size_t number, const RequestedRegion& region, ByteCount image_size) {
  if (!kPage4K.is_aligned(region.offset.value))
    return refuse(number, fmt::format("offset {:#x} is not a multiple of {:#x}", region.offset.value,
                                      kPage4K.bytes().value));
  if (region.offset.value > image_size.value ||
      region.memory.length.value > image_size.value - region.offset.value)
    return refuse(number, fmt::format("offset {:#x} and size {:#x} reach beyond the image's size {:#x}",
                                      region.offset.value, region.memory.length.value, image_size.value));
  return {};
}

}  // namespace

std::optional<PageSize> served_page_size(std::uint64_t bytes) {
  if (bytes == kPage4K.bytes().value) return kPage4K;
  if (bytes == kPage2M.bytes().value) return kPage2M;
  return std::nullopt;
}

Result<void> validate(std::span<const RequestedRegion> regions, ByteCount image_size) {
  if (auto counted = check_count(regions.size()); !counted) return counted;
  for (std::size_t i = 0; i < regions.size(); ++i) {
    const RequestedRegion& region = regions[i];
    if (!served_page_size(region.page_size.bytes().value))
      return refuse(i,
                    fmt::format("page size {} is not served, only {} and {}", region.page_size.bytes().value,
                                kPage4K.bytes().value, kPage2M.bytes().value));
    if (auto fits = check_memory(i, region.memory, region.page_size); !fits) return fits;
    if (auto fits = check_offset(i, region, image_size); !fits) return fits;
  }

  std::vector<std::size_t> by_address(regions.size());
  std::iota(by_address.begin(), by_address.end(), std::size_t{0});
  std::ranges::sort(by_address, {}, [&](std::size_t i) { return regions[i].memory.start; });
  for (std::size_t i = 1; i < by_address.size(); ++i) {
    const AddressRange before = regions[by_address[i - 1]].memory;
    const AddressRange after = regions[by_address[i]].memory;
    if (before.overlaps(after))
      return refuse(
          by_address[i],
          fmt::format("memory [{:#x}, {:#x}) overlaps with region {}'s [{:#x}, {:#x})", after.start.value,
                      after.end().value, by_address[i - 1], before.start.value, before.end().value));
  }
  return {};
}

Result<void> validate(std::span<const AddressRange> ranges) {
  if (auto counted = check_count(ranges.size()); !counted) return counted;
  for (std::size_t i = 0; i < ranges.size(); ++i)
    if (auto fits = check_memory(i, ranges[i], kPage4K); !fits) return fits;
  return {};
}

}  // namespace uffdkit
