// Where the manager meets the machine: its threads, and its system calls on simulated userfaultfds. What a
// planted bug loses is lost here.
#pragma once

#include <uffdkit/system_calls.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "simulate/manager_world.h"
#include "simulate/random.h"
#include "simulate/real_descriptors.h"
#include "simulate/seeded_threads.h"
#include "support/forwarding_calls.h"

namespace uffdkit::simulate {

class PlantedThreads final : public SeededThreads {
 public:
  PlantedThreads(std::uint64_t seed, ManagerBug bug) : SeededThreads(seed), bug_(bug), random_(seed) {}
  void wake(const void* condition, bool all) override;
  void set_timer(int timer, std::int64_t when_ns) override;
  int wait(int epoll, epoll_event& event, int timeout_ms) override;
  // Nothing is lost any more, and events that were are told of: the descriptors that they are of are not
  // armed before.
  void mend() { bug_ = ManagerBug::none; }

 private:
  bool loses(ManagerBug bug) { return bug_ == bug && random_.one_in(8); }

  struct Lost {
    int epoll;
    epoll_event event;
  };

  ManagerBug bug_;
  const bool loses_events_ = bug_ == ManagerBug::lost_event;
  std::vector<Lost> lost_;
  Random random_;
};

// Others may run before and after each call, and a copy may stop half-way.
class YieldingCalls final : public test::ForwardingCalls {
 public:
  YieldingCalls(SeededThreads& threads, RealDescriptors& calls, std::uint64_t seed, ManagerBug bug)
      : ForwardingCalls(calls), threads_(threads), random_(seed), bug_(bug) {}
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override;
  int close(int fd) override;

 private:
  SeededThreads& threads_;
  Random random_;
  const ManagerBug bug_;
};

}  // namespace uffdkit::simulate
