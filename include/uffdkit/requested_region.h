// Layer: wire
// A stretch of a process's memory that is to be filled from an image.
#pragma once

#include <uffdkit/units.h>

namespace uffdkit {

struct RequestedRegion {
  AddressRange memory;  // in the process that owns the memory; aligned to `page_size`, below 2^47
  StoreOffset offset;   // where the first byte lies in the image; a multiple of 4096
  PageSize page_size;   // kPage4K or kPage2M: the size of the pages that back the memory
  friend constexpr bool operator==(const RequestedRegion&, const RequestedRegion&) = default;
};

}  // namespace uffdkit
