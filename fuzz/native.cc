// The native protocol, both directions.
#include "wire/native.h"

#include "input.h"

namespace {

using namespace uffdkit;

void read(native::FrameReader::Reads reads, std::span<const std::byte> input) {
  native::FrameReader reader(reads);
  fuzz::for_each_piece(input, [&](Piece piece) {
    auto frames = reader.feed(std::move(piece));
    if (!frames) return false;
    for (native::Frame& frame : *frames) {
      if (reads == native::FrameReader::Reads::answers) {
        (void)native::decode_answer(std::move(frame));
      } else if (auto request = native::decode_request(std::move(frame))) {
        if (const auto* attach = std::get_if<native::Attach>(&*request))
          (void)validate(attach->request.regions, ByteCount(std::uint64_t{1} << 40));
      }
    }
    return true;
  });
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  read(native::FrameReader::Reads::requests, fuzz::bytes_of(data, size));
  read(native::FrameReader::Reads::answers, fuzz::bytes_of(data, size));
  return 0;
}
