// The one value that every front-end makes of what a client sends, and the rules that it must keep.
// Pure: no system calls, any thread.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/requested_region.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace uffdkit {

// A virtual machine has a few regions, one with hot-plugged memory some dozens. The bound is what a client
// can make the manager hold for one session.
inline constexpr std::size_t kRegionsMax = 1000;

// User addresses end here on x86-64 with four-level page tables.
inline constexpr Address kAddressEnd{std::uint64_t{1} << 47};

// "Serve these regions from this image."
struct AttachRequest {
  std::string image;  // the name by which the manager knows it
  std::vector<RequestedRegion> regions;
};

// The page size of so many bytes if it is one that can be served (4096 or 2 MiB), else nothing.
std::optional<PageSize> served_page_size(std::uint64_t bytes);

// Whether the regions can be served from an image of `image_size` bytes: 1 to kRegionsMax of them; page sizes
// that can be served; lengths not 0; addresses and lengths multiples of the page size, ends at most
// kAddressEnd; no two overlapping; offsets multiples of 4096, with offset + length at most `image_size`.
// An error names the region (counted from 0), the field and the numbers.
Result<void> validate(std::span<const RequestedRegion> regions, ByteCount image_size);

// Whether these are ranges of user memory: 1 to kRegionsMax of them; lengths not 0; addresses and lengths
// multiples of 4096, ends at most kAddressEnd. Errors as above.
Result<void> validate(std::span<const AddressRange> ranges);

}  // namespace uffdkit
