#include <uffdkit/system_calls.h>

#include <fcntl.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

namespace uffdkit {
namespace {

// read(2) and ioctl(2) are on the path of each fault. They go by syscall(2): the C library's read(2) is a
// cancellation point, which costs two locked instructions, and one function for both is less to fetch when
// the caches have gone cold.
class LinuxSystemCalls final : public SystemCalls {
 public:
  int userfaultfd(int flags) override {
    const long fd = ::syscall(SYS_userfaultfd, flags);
    return fd < 0 ? -errno : static_cast<int>(fd);
  }
  int open(const char* path, int flags) override {
    const int fd = ::open(path, flags);
    return fd < 0 ? -errno : fd;
  }
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override {
    const long result = ::syscall(SYS_ioctl, fd, request, argument);
    return result < 0 ? -errno : static_cast<int>(result);
  }
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override {
    const long result = ::syscall(SYS_read, fd, buffer, bytes);
    return result < 0 ? -errno : result;
  }
  int poll_readable(int fd, int timeout_ms) override {
    pollfd entry{.fd = fd, .events = POLLIN, .revents = 0};
    const int result = ::poll(&entry, 1, timeout_ms);
    return result < 0 ? -errno : entry.revents;
  }
  int get_flags(int fd) override {
    const int result = ::fcntl(fd, F_GETFL);
    return result < 0 ? -errno : result;
  }
  int duplicate(int fd) override {
    const int result = ::fcntl(fd, F_DUPFD_CLOEXEC, 0);
    return result < 0 ? -errno : result;
  }
  int close(int fd) override { return ::close(fd) < 0 ? -errno : 0; }
};

}  // namespace

SystemCalls& linux_system_calls() {
  static LinuxSystemCalls calls;
  return calls;
}

}  // namespace uffdkit
