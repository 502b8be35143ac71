// What one receive call brought: the input of every decoder.
#pragma once

#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <span>
#include <vector>

namespace uffdkit {

struct Piece {
  std::span<const std::byte> bytes;  // in the caller's buffer
  std::vector<UniqueFd> fds;         // those that came along, close-on-exec
  bool fds_lost = false;             // MSG_CTRUNC: the kernel could not hand over all that were sent
  bool end = false;                  // the peer will send no more
  // Neither bytes nor end: nothing waits.
};

}  // namespace uffdkit
