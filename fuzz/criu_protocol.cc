// What `criu restore --lazy-pages` sends.
#include "wire/criu_protocol.h"

#include "input.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  criu::RestoreDecoder decoder;
  fuzz::for_each_piece(fuzz::bytes_of(data, size),
                       [&](Piece piece) { return decoder.feed(std::move(piece)).has_value(); });
  return 0;
}
