// What `criu restore --lazy-pages` sends to the one who serves its tasks' page faults; nothing is answered.
//
//   for each task, in any order:   s32 pid, little-endian   (negative: a zombie, which has no memory)
//                                  1 byte, with the task's userfaultfd   (not for a zombie)
//   when all tasks are in place:   u32 0x52535446
//   then the end of the stream; before that number it means that the restore has failed
//
// Source: the messages of criu 4.2. Threads: one at a time.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <variant>
#include <vector>

#include "wire/piece.h"

namespace uffdkit::criu {

// Sent in place of a process number.
inline constexpr std::uint32_t kRestoreFinished = 0x52535446;

// A task hands its memory over.
struct TaskRestored {
  std::int32_t pid;  // in the task's own namespace: that of the image files' names
  UniqueFd uffd;     // not checked to be a userfaultfd
};
struct ZombieRestored {
  std::int32_t pid;
};
// Every task is in place, and about to run.
struct RestoreFinished {};

using RestoreMessage = std::variant<TaskRestored, ZombieRestored, RestoreFinished>;

// Takes the stream in pieces.
class RestoreDecoder {
 public:
  // Takes one piece; returns what is complete now. After an error the connection is of no use. Errors: a
  // process number 0; descriptors missing, lost, or where none belongs; bytes after RestoreFinished; the end
  // before it.
  Result<std::vector<RestoreMessage>> feed(Piece piece);

  bool finished() const { return finished_; }

 private:
  Result<std::optional<RestoreMessage>> take_number();

  std::array<std::byte, 4> number_{};
  std::size_t number_bytes_ = 0;
  std::optional<std::int32_t> pid_;  // whose descriptor comes next
  std::vector<UniqueFd> fds_;
  bool finished_ = false;
};

}  // namespace uffdkit::criu
