// Firecracker's handshake, and the rules for what it asks for.
#include "wire/firecracker.h"

#include "base/check.h"
#include "input.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  FirecrackerDecoder decoder("image");
  fuzz::for_each_piece(fuzz::bytes_of(data, size), [&](Piece piece) {
    const auto handshake = decoder.feed(std::move(piece));
    if (!handshake) return false;
    if (*handshake) {
      CHECK((*handshake)->uffd);
      CHECK((*handshake)->request.regions.size() <= kRegionsMax);
      (void)validate((*handshake)->request.regions, ByteCount(std::uint64_t{1} << 40));
    }
    return true;
  });
  return 0;
}
