#include "wire/criu_protocol.h"

#include <fmt/format.h>

#include <cerrno>
#include <utility>

namespace uffdkit::criu {
namespace {

Failure refuse(const std::string& what) {
  return Failure(Error("lazy restore: " + what, EPROTO));
}

}  // namespace

Result<std::optional<RestoreMessage>> RestoreDecoder::take_number() {
  std::uint32_t number = 0;
  for (std::size_t i = 4; i-- > 0;) number = number << 8 | std::to_integer<std::uint32_t>(number_[i]);
  number_bytes_ = 0;
  if (number == kRestoreFinished) {
    finished_ = true;
    return RestoreFinished{};
  }
  const auto pid = static_cast<std::int32_t>(number);
  if (pid == 0) return refuse("0 is no process number");
  if (pid < 0) return ZombieRestored{.pid = pid == INT32_MIN ? INT32_MAX : -pid};
  pid_ = pid;
  return std::nullopt;
}

Result<std::vector<RestoreMessage>> RestoreDecoder::feed(Piece piece) {
  if (piece.fds_lost) return refuse("a descriptor was lost on the way: the limit of open files is reached");
  if (piece.end && !finished_) return refuse("the restorer has gone before it was done");
  // A receive call stops at the bytes that descriptors come with, which are therefore its last.
  for (UniqueFd& fd : piece.fds) fds_.push_back(std::move(fd));
  std::vector<RestoreMessage> messages;
  for (const std::byte byte : piece.bytes) {
    if (finished_) return refuse("bytes after the restore was finished");
    if (!pid_) {
      number_[number_bytes_++] = byte;
      if (number_bytes_ < number_.size()) continue;
      Result<std::optional<RestoreMessage>> taken = take_number();
      if (!taken) return Failure(std::move(taken).error());
      if (std::optional<RestoreMessage>& message = *taken) messages.push_back(*std::move(message));
      continue;
    }
    if (fds_.size() != 1)
      return refuse(fmt::format("{} descriptors came with task {} instead of one", fds_.size(), *pid_));
    messages.emplace_back(TaskRestored{.pid = *pid_, .uffd = std::move(fds_.front())});
    fds_.clear();
    pid_.reset();
  }
  if (!fds_.empty()) return refuse("a descriptor came without a task");
  return messages;
}

}  // namespace uffdkit::criu
