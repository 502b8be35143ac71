// Simulated userfaultfds behind real descriptors, for code that gets them through a socket and waits for them
// with epoll(7): the manager.
//
// Each is the read end of a pipe, which holds a byte while its userfaultfd can be read. When it has arrived,
// its inode tells which one it is. Threads: from any; the machine is used by one at a time.
#pragma once

#include <sys/types.h>
#include <uffdkit/abi.h>
#include <uffdkit/sim.h>
#include <uffdkit/unique_fd.h>

#include <map>
#include <mutex>
#include <span>
#include <vector>

namespace uffdkit::simulate {

// The system calls of a real process that stands for the simulated `process`.
class RealDescriptors final : public SystemCalls {
 public:
  explicit RealDescriptors(sim::Process& process) : process_(process), calls_(process.system_calls()) {}

  // Passes `fd` of `owner` to the process. Returns the descriptor to be sent there, which stays ours.
  int pass(sim::Process& owner, int fd);

  // Does something to the machine while nobody else does.
  template <class Act>
  auto alone(Act&& act) {
    const std::lock_guard lock(mutex_);
    const Told told(*this);
    return act();
  }

  // Nobody will send `fd` any more, which pass() has returned; unless the process has looked at it, it has
  // closed it, or never got it, and true is returned.
  bool lost(int fd);

  // How many of the userfaultfds that were passed, or that forks have brought, the process still has.
  std::size_t held();
  // How many of them it has not looked at yet.
  std::size_t not_arrived();

  // A process that is handed userfaultfds makes none.
  int userfaultfd(int) override;
  int open(const char* path, int flags) override;
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override;
  int poll_readable(int fd, int timeout_ms) override;
  int get_flags(int fd) override;
  int duplicate(int fd) override;
  int close(int fd) override;

 private:
  struct Passed {
    ino_t inode;
    UniqueFd read_end;
    UniqueFd write_end;
    bool readable = false;
    bool arrived = false;
  };
  // Brings the pipes up to date at the end of whatever was done to the machine.
  struct Told {
    explicit Told(RealDescriptors& descriptors) : all(descriptors) {}
    ~Told() { all.tell(); }
    RealDescriptors& all;
  };
  void tell();
  // Makes a real descriptor of a simulated one of the process; returns its read end.
  int stand_for(int simulated);
  // Has the messages name real descriptors for the children that they bring.
  void bring_children(std::span<abi::Msg> messages);
  // The simulated descriptor behind a real one; -1: it is no userfaultfd.
  int simulated(int fd) const;

  std::mutex mutex_;
  sim::Process& process_;
  SystemCalls& calls_;
  std::map<int, Passed> passed_;  // by the simulated descriptor
  std::map<int, int> arrived_;    // real descriptor -> simulated one
};

}  // namespace uffdkit::simulate
