#include "manager/log.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <limits.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

namespace uffdkit {

Log::Log(int fd) : given_fd_(fd) {
  struct stat status;
  if (::fstat(fd, &status) != 0) return;
  is_socket_ = S_ISSOCK(status.st_mode);
  is_file_ = S_ISREG(status.st_mode);
  // Setting O_NONBLOCK on what was given would change it for all who share it. Not everybody may open it
  // again; then it is written to in pieces that a pipe with room takes at once.
  if (S_ISFIFO(status.st_mode) || S_ISCHR(status.st_mode))
    own_fd_.reset(::open(fmt::format("/proc/self/fd/{}", fd).c_str(),
                         O_WRONLY | O_NONBLOCK | O_NOCTTY | O_APPEND | O_CLOEXEC));
}

void Log::write(std::string_view text) {
  rest_.erase(0, write_some(rest_));
  if (!rest_.empty()) {
    ++left_out_;
    return;
  }
  std::string lines;
  if (left_out_ != 0)
    lines = fmt::format("uffdkit: {} messages were left out, which nobody was ready to read\n", left_out_);
  // Clients choose some of the words, and shall not write lines of their own.
  lines += "uffdkit: ";
  for (const char byte : text) {
    const bool controls = (byte >= 0 && byte < ' ') || byte == 0x7f;
    if (byte == '\n') {
      lines += "\n  ";
    } else {
      lines += controls ? '?' : byte;
    }
  }
  lines += '\n';
  const std::size_t taken = write_some(lines);
  if (taken == 0) {
    ++left_out_;
    return;
  }
  left_out_ = 0;
  rest_ = lines.substr(taken);
}

std::size_t Log::write_some(std::string_view text) const {
  const int fd = own_fd_ ? own_fd_.get() : given_fd_;
  std::size_t taken = 0;
  while (taken < text.size()) {
    pollfd entry{.fd = fd, .events = POLLOUT, .revents = 0};
    if (!is_file_ && (::poll(&entry, 1, 0) != 1 || (entry.revents & POLLOUT) == 0)) return taken;
    const std::string_view part = text.substr(taken, PIPE_BUF);
    const ssize_t bytes = is_socket_ ? ::send(fd, part.data(), part.size(), MSG_DONTWAIT | MSG_NOSIGNAL)
                                     : ::write(fd, part.data(), part.size());
    if (bytes <= 0) return taken;
    taken += static_cast<std::size_t>(bytes);
  }
  return taken;
}

}  // namespace uffdkit
