// The lines of the control socket: requests, and the answers that 'uffdkit status' reads.
#include "wire/control.h"

#include <nlohmann/json.hpp>

#include "base/check.h"
#include "input.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  control::LineReader reader(control::kRequestBytesMax);
  fuzz::for_each_piece(fuzz::bytes_of(data, size), [&](const Piece& piece) {
    const auto lines = reader.feed(piece);
    if (!lines) return false;
    for (const std::string& line : *lines) {
      if (const auto request = control::decode_request(line)) {
        // What was understood can be said again, and is understood again.
        std::string again = control::encode_request(*request);
        again.pop_back();
        CHECK(control::decode_request(again).has_value());
      }
      (void)control::decode_answer(line);
    }
    return true;
  });
  return 0;
}
