// An input, cut into the pieces that a socket may bring: the first byte of each says how long it is, and
// whether descriptors come along.
#pragma once

#include <fcntl.h>
#include <uffdkit/unique_fd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "wire/piece.h"

namespace uffdkit::fuzz {

// Calls `take` with each piece until it returns false, and then with the end.
template <class Take>
void for_each_piece(std::span<const std::byte> input, Take take) {
  while (!input.empty()) {
    const auto head = std::to_integer<unsigned>(input[0]);
    input = input.subspan(1);
    Piece piece;
    piece.bytes = input.first(std::min<std::size_t>(input.size(), head & 0x3f ? head & 0x3f : input.size()));
    input = input.subspan(piece.bytes.size());
    for (unsigned fds = head >> 6; fds > 1; --fds)
      piece.fds.emplace_back(::open("/dev/null", O_RDONLY | O_CLOEXEC));
    piece.fds_lost = head == 0x40;
    if (!piece.bytes.empty() && !take(std::move(piece))) return;
  }
  Piece end;
  end.end = true;
  take(std::move(end));
}

inline std::span<const std::byte> bytes_of(const std::uint8_t* data, std::size_t size) {
  return {reinterpret_cast<const std::byte*>(data), size};
}

}  // namespace uffdkit::fuzz

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
