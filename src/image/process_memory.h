// The memory of a process as it is at one moment, and that of one that has died, from its core file.
#pragma once

#include <sys/types.h>
#include <uffdkit/error.h>
#include <uffdkit/store.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "image/format.h"

namespace uffdkit::image {

// Memory of a process, put together without the gaps between, and where each part of it lay.
struct ProcessMemory {
  std::shared_ptr<Store> store;
  std::vector<Region> regions;
};

// All threads of a process, held by ptrace(2). They go on when this is destroyed, and also when this program
// dies. Threads: one, which made it.
class StoppedProcess {
 public:
  // Stops all threads of `pid`. Errors: no such process; no right to trace it, or it is traced already; a
  // thread does not stop within ten seconds. Source: ptrace(2), PTRACE_SEIZE; Linux 3.4.
  static Result<StoppedProcess> stop(pid_t pid);
  StoppedProcess(StoppedProcess&& other) noexcept;
  StoppedProcess& operator=(StoppedProcess&&) = delete;
  ~StoppedProcess();

  pid_t pid() const { return pid_; }

 private:
  explicit StoppedProcess(pid_t pid) : pid_(pid) {}
  // Seizes the threads that are not held yet. Returns whether there were any.
  Result<bool> hold_new_threads();
  Result<void> hold(pid_t thread);

  pid_t pid_;
  std::map<pid_t, int> held_;  // thread, and the signal that it was about to get
};

// The pages that the process has for itself alone: what it has written to private mappings, its heap and its
// stacks, also where that is swapped out. What it never touched, shares, or has unchanged from a file is left
// out; small gaps of untouched memory are zeros. What cannot be read (guard pages, poisoned pages) is left
// out too. The store reads the process, so it must stay stopped meanwhile. Errors: it cannot be read. Needs
// Linux 6.7 (PAGEMAP_SCAN).
Result<ProcessMemory> private_memory_of(const StoppedProcess& process);

// The memory that an ELF core file has: what it has of its PT_LOAD segments. Errors: it is no 64-bit
// little-endian core file, it is cut short, or has no memory.
Result<ProcessMemory> memory_of_core(const std::string& path);

}  // namespace uffdkit::image
