// Processes, by pidfds: a number could be another process's by now.
#pragma once

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace uffdkit {

// Whether the process has ended, waited for or not. A descriptor below 0 stands for one that never began.
inline bool has_ended(int pidfd) {
  pollfd end{.fd = pidfd, .events = POLLIN, .revents = 0};
  return pidfd < 0 || ::poll(&end, 1, 0) != 0;
}

// False if it could not be sent. Until somebody waits for it, a process that has ended takes signals, too.
inline bool send_signal(int pidfd, int signal) {
  return ::syscall(SYS_pidfd_send_signal, pidfd, signal, nullptr, 0) == 0;
}

}  // namespace uffdkit
