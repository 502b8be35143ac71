// A store that can be told what will be read from it soon, so that it comes from the disk while others are
// read, and that tells what reading costs. Found by dynamic_cast; a store without it is read as it is.
#pragma once

#include <uffdkit/units.h>

#include <optional>

#include "store/batch_reader.h"

namespace uffdkit {

class ReadAhead {
 public:
  virtual ~ReadAhead() = default;
  // [from, from + bytes), within the store's size, is read soon. A hint: nothing comes of an error. May wait
  // for the disk's queue, not for the bytes. Threads: any.
  virtual void will_need(StoreOffset from, ByteCount bytes) noexcept = 0;
  // A number of what has to be read as a whole to have the page at `from`: pages of the same one cost little
  // more than one of them does.
  virtual std::uint64_t unit_at(StoreOffset from) const noexcept = 0;
  // Whether what can be read without waiting is only copied, and not decompressed.
  virtual bool is_only_copied() const noexcept = 0;
  // Where these bytes, within the store's size, lie in a file as they are. None: only read() can give them.
  virtual std::optional<FilePart> part_of(StoreOffset /*from*/, ByteCount /*bytes*/) const noexcept {
    return std::nullopt;
  }
};

}  // namespace uffdkit
