// Steps at which a worker ends: UFFDKIT_CRASH_AT=WORKER:STEP in the environment has the worker of that number
// end by SIGKILL at its step of that number.
#include "base/step.h"

#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

namespace uffdkit {
namespace {

// How many steps are left; 0: any number of them.
std::atomic<std::int64_t> steps_left{0};

}  // namespace

void step() {
  if (steps_left.load(std::memory_order_relaxed) <= 0 || steps_left.fetch_sub(1) != 1) return;
  // tgkill(2) is a call that the sandbox allows; SIGKILL ends the whole process.
  ::syscall(SYS_tgkill, ::getpid(), ::gettid(), SIGKILL);
}

void count_steps_of_worker(std::uint64_t worker) {
  unsigned long long at_worker = 0;
  long long at_step = 0;
  const char* where = std::getenv("UFFDKIT_CRASH_AT");
  if (where == nullptr || std::sscanf(where, "%llu:%lld", &at_worker, &at_step) != 2) return;
  if (at_worker == worker) steps_left = at_step;
}

}  // namespace uffdkit
