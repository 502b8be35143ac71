// A decoder with a bug, which must be found: that the others are silent means nothing otherwise.
#include "base/check.h"
#include "input.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // As a decoder would that trusts a length.
  if (size < 4 || data[0] != 'L') return 0;
  CHECK(data[1] < size);
  return 0;
}
