// System calls that are passed on: a class derives from this, and overrides those that it changes.
#pragma once

#include <uffdkit/system_calls.h>

#include <cstddef>
#include <cstdint>

namespace uffdkit::test {

class ForwardingCalls : public SystemCalls {
 public:
  int userfaultfd(int flags) override { return calls_.userfaultfd(flags); }
  int open(const char* path, int flags) override { return calls_.open(path, flags); }
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override {
    return calls_.ioctl(fd, request, argument);
  }
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override {
    return calls_.read(fd, buffer, bytes);
  }
  int poll_readable(int fd, int timeout_ms) override { return calls_.poll_readable(fd, timeout_ms); }
  int get_flags(int fd) override { return calls_.get_flags(fd); }
  int duplicate(int fd) override { return calls_.duplicate(fd); }
  int close(int fd) override { return calls_.close(fd); }

 protected:
  // `calls` outlives this.
  explicit ForwardingCalls(SystemCalls& calls) : calls_(calls) {}

  SystemCalls& calls_;
};

}  // namespace uffdkit::test
