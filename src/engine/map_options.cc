#include "engine/map_options.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "engine/fetch.h"

namespace uffdkit {

Result<ByteCount> length_to_map(const Store& store, StoreOffset offset, ByteCount length,
                                PageSize page_size) {
  const std::uint64_t size = store.size().value;
  if (length.value == 0) length = ByteCount(size - std::min(size, offset.value));
  if (offset.value > size || length.value > size - offset.value)
    return Failure(Error(fmt::format("map {} bytes from offset {}: {} has {} bytes", length.value,
                                     offset.value, store.name(), size),
                         EINVAL));
  if (length.value == 0 || !page_size.is_aligned(length.value) || !kPage4K.is_aligned(offset.value))
    return Failure(Error(fmt::format("map {} bytes from offset {} of {}: not whole pages of {} bytes",
                                     length.value, offset.value, store.name(), page_size.bytes().value),
                         EINVAL));
  return length;
}

Result<void> check_fault_around(PageCount pages) {
  if (std::has_single_bit(pages.value) && pages.value <= kFetchGranulesMax) return {};
  return Failure(Error(
      fmt::format("fault_around is {}, not a power of two from 1 to {}", pages.value, kFetchGranulesMax),
      EINVAL));
}

}  // namespace uffdkit
