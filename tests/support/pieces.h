// Helpers for the tests of decoders: pieces made of text, descriptors whose closing can be seen.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <string_view>
#include <utility>
#include <vector>

#include "wire/piece.h"

namespace uffdkit::test {

// A piece of these bytes, which must outlive it.
inline Piece piece_of(std::string_view text, std::vector<UniqueFd> fds = {}) {
  return {.bytes = std::as_bytes(std::span(text)), .fds = std::move(fds)};
}

inline Piece end_of_stream() {
  return {.bytes = {}, .fds = {}, .end = true};
}

// A pipe. While the write end given out is open anywhere, all_closed() is false.
class WatchedFds {
 public:
  WatchedFds() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) ::abort();
    read_end_.reset(ends[0]);
    write_end_.reset(ends[1]);
  }
  // `count` new descriptors of the write end.
  std::vector<UniqueFd> make(int count) const {
    std::vector<UniqueFd> fds;
    for (int i = 0; i < count; ++i) fds.emplace_back(::fcntl(write_end_.get(), F_DUPFD_CLOEXEC, 0));
    return fds;
  }
  // Whether every descriptor that make() gave out is closed. To be asked once, at the end.
  bool all_closed() {
    write_end_.reset();
    char byte;
    return ::read(read_end_.get(), &byte, 1) == 0;  // else EAGAIN: there is a writer still
  }

 private:
  UniqueFd read_end_;
  UniqueFd write_end_;
};

}  // namespace uffdkit::test
