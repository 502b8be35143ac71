// What a memory holds, as a number of 128 bits.
//
// Memory is cut into blocks of 64 KiB, the last as long as it is; each is hashed by XXH3-128, and the
// identity is XXH3-128 of the blocks' hashes in order and the memory's length. So blocks can be hashed in
// parallel, the frame size does not matter, and the length need not be known before. It tells mistakes, not
// forgers: docs/decisions/0010-image-format.md says why.
#pragma once

#include <xxhash.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "image/format.h"

namespace uffdkit::image {

inline constexpr std::size_t kIdentityBlockBytes = std::size_t{64} * 1024;

using BlockHash = std::array<std::byte, 16>;
BlockHash hash_block(std::span<const std::byte> block);
// Of a block that is all zero, which costs nothing after the first time.
BlockHash hash_zero_block(std::size_t bytes);

// Takes the blocks' hashes in order.
class IdentityHash {
 public:
  IdentityHash();
  void add(const BlockHash& hash);
  // Of a memory of so many bytes, whose blocks have all been added. To be called once.
  Identity finish(std::uint64_t raw_bytes);

 private:
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  std::unique_ptr<XXH3_state_t, Free> state_;
};

}  // namespace uffdkit::image
