// Layer: kernel
// The seam under the kernel layer: the few system calls by which it reaches userfaultfd.
//
// Everything above (Uffd, Pager, the manager) goes through this interface, so that all of it also runs on a
// userfaultfd that is not the kernel's: a recorder, a wrapper that injects errors, a model in user space.
// Every call answers like the system call that it is named after, but returns -errno instead of setting
// errno. Calls may come from any thread.
#pragma once

#include <cstddef>
#include <cstdint>

namespace uffdkit {

class SystemCalls {
 public:
  virtual ~SystemCalls() = default;

  // userfaultfd(2). `flags`: O_CLOEXEC, O_NONBLOCK, abi::kUserModeOnly. Returns a descriptor.
  virtual int userfaultfd(int flags) = 0;
  // open(2), for /dev/userfaultfd and files below /proc.
  virtual int open(const char* path, int flags) = 0;
  // ioctl(2) of a userfaultfd, /dev/userfaultfd or a pagemap; `argument` is a pointer, or the number itself
  // for abi::kIocNew.
  virtual int ioctl(int fd, unsigned long request, std::uintptr_t argument) = 0;
  // read(2).
  virtual std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) = 0;
  // poll(2) of one descriptor for POLLIN; `timeout_ms` -1 waits for ever. Returns revents, 0 at the time
  // limit.
  virtual int poll_readable(int fd, int timeout_ms) = 0;
  // fcntl(2) with F_GETFL.
  virtual int get_flags(int fd) = 0;
  // fcntl(2) with F_DUPFD_CLOEXEC.
  virtual int duplicate(int fd) = 0;
  // close(2).
  virtual int close(int fd) = 0;
};

// The running kernel. Never destroyed.
SystemCalls& linux_system_calls();

}  // namespace uffdkit
