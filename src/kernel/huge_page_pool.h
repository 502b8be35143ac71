// The machine's pool of huge pages.
#pragma once

#include <uffdkit/units.h>

#include <cstdint>
#include <optional>

namespace uffdkit {

// Huge pages of this size that nobody uses, nor has been promised (by a mapping without MAP_NORESERVE);
// nothing if the machine has no pool of this size.
std::optional<std::uint64_t> spare_huge_pages(PageSize size);

}  // namespace uffdkit
