// A store that is put together from pieces of others; between them it is zero.
#pragma once

#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <memory>
#include <string>
#include <vector>

namespace uffdkit {

// `length` bytes of `source` at `from`, which are at `at` in the store that is made.
struct StorePiece {
  StoreOffset at;
  ByteCount length;
  std::shared_ptr<Store> source;
  StoreOffset from;
};

// A store of `size` bytes. The pieces are sorted by `at` and do not overlap, lie within `size` and within
// their sources, and begin and end on multiples of 4096; CHECKed. `name` is for messages.
std::shared_ptr<Store> make_piecewise_store(std::string name, ByteCount size, std::vector<StorePiece> pieces);

}  // namespace uffdkit
