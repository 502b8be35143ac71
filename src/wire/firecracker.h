// The handshake by which Firecracker 1.1 to 1.16 hands its userfaultfd over: it connects, sends a JSON array
// of regions with one descriptor, and nothing ever after; nothing is answered.
//
//   [{"base_host_virt_addr":A,"size":N,"offset":O,"page_size":4096,"page_size_kib":4096}, ...]
//
// Both page-size keys are in bytes, whatever the name of the older one says; either may be missing (4096).
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "wire/attach_request.h"
#include "wire/piece.h"

namespace uffdkit {

// A region takes at most 147 bytes with every number at its longest; known forks add two keys of up to 56.
// 256 leave room for white space and keys to come.
inline constexpr std::size_t kHandshakeBytesMax = kRegionsMax * 256;

struct FirecrackerHandshake {
  AttachRequest request;       // well formed; validate() has not been asked
  UniqueFd uffd;               // the first descriptor; not checked to be a userfaultfd
  std::size_t fds_closed = 0;  // descriptors that came after the first: forks of Firecracker send their
                               // memory files along. They were closed
};

// Takes the handshake in pieces. Time is linear in the bytes received. Threads: one at a time.
class FirecrackerDecoder {
 public:
  // `image` is the one that this socket serves.
  explicit FirecrackerDecoder(std::string image) : image_(std::move(image)) {}

  // Takes one piece. Nothing: more is needed, or the handshake was returned by an earlier call. After an
  // error the connection is of no use. Errors: not a JSON array of objects; a key missing or not a whole
  // number from 0 to 2^64 - 1; page sizes that contradict each other or cannot be served; more than
  // kRegionsMax regions or kHandshakeBytesMax bytes; no descriptor, or descriptors lost; anything but white
  // space after the array; the end before the array's.
  Result<std::optional<FirecrackerHandshake>> feed(Piece piece);

 private:
  // Whether the array's end has been found, and where.
  Result<std::optional<std::size_t>> find_end(std::size_t from);
  Result<FirecrackerHandshake> finish();

  std::string image_;
  std::string text_;
  UniqueFd uffd_;
  std::size_t fds_closed_ = 0;
  std::size_t depth_ = 0;
  bool in_string_ = false;
  bool escaped_ = false;
  bool done_ = false;
};

}  // namespace uffdkit
