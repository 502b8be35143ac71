// What the options of mapping a store have to be, for whoever maps one in its own process.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

namespace uffdkit {

// The length of a region that shows `store` from `offset` on: `length`, or all that follows if that is 0.
// Errors: it is not in the store, not whole pages, or nothing.
Result<ByteCount> length_to_map(const Store& store, StoreOffset offset, ByteCount length, PageSize page_size);

// An error unless it is a power of two from 1 to 512.
Result<void> check_fault_around(PageCount pages);

}  // namespace uffdkit
