// A store that was served before and cannot be opened again as it was: gone, damaged, shorter, or for want of
// memory. What it has not got fails to be read, so that whoever needs it hears of an error, and never reads
// zeros; and it is tried again to open it when somebody does.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <functional>
#include <memory>
#include <string>

namespace uffdkit {

// Opens what there is of the store at this time.
using Reopen = std::function<Result<std::shared_ptr<Store>>()>;

// A store of `size` bytes, of which `rest` (nullptr: nothing) has the first ones. `reopen` is called by reads
// that may block, one at a time, and not more often than each 10 ms. `name` is for messages.
std::shared_ptr<Store> make_recovering_store(std::string name, ByteCount size, std::shared_ptr<Store> rest,
                                             Reopen reopen);

}  // namespace uffdkit
