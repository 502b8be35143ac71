#include "image/identity.h"

#include <array>
#include <cstring>

#include "base/check.h"

namespace uffdkit::image {
namespace {

std::array<std::byte, 16> canonical(XXH128_hash_t hash) {
  XXH128_canonical_t bytes;
  XXH128_canonicalFromHash(&bytes, hash);
  std::array<std::byte, 16> to;
  std::memcpy(to.data(), bytes.digest, to.size());
  return to;
}

// Not constant, so that the program's file does not hold it.
constinit std::array<std::byte, kIdentityBlockBytes> zeros{};

}  // namespace

BlockHash hash_block(std::span<const std::byte> block) {
  return canonical(XXH3_128bits(block.data(), block.size()));
}

BlockHash hash_zero_block(std::size_t bytes) {
  static const BlockHash whole = hash_block(zeros);
  return bytes == kIdentityBlockBytes ? whole : hash_block(std::span(zeros).first(bytes));
}

IdentityHash::IdentityHash() : state_(XXH3_createState()) {
  CHECK(state_ != nullptr);
  XXH3_128bits_reset(state_.get());
}

void IdentityHash::add(const BlockHash& hash) {
  XXH3_128bits_update(state_.get(), hash.data(), hash.size());
}

Identity IdentityHash::finish(std::uint64_t raw_bytes) {
  XXH3_128bits_update(state_.get(), &raw_bytes, sizeof raw_bytes);
  return canonical(XXH3_128bits_digest(state_.get()));
}

}  // namespace uffdkit::image
