// What the kernel says of a process's memory, time and switches.
#pragma once

#include <sys/types.h>

#include <cstdint>

namespace uffdkit::bench {

struct MemoryUse {
  std::uint64_t state_bytes = 0;    // resident in session state files: mappings of memfd:uffdkit-session
  std::uint64_t private_bytes = 0;  // all else that is resident and not shared with others
};

// From /proc/PID/smaps. Throws if it cannot be read.
MemoryUse memory_use(pid_t pid);

// User and system time that it has used, in nanoseconds.
std::uint64_t cpu_ns(pid_t pid);

// How often one of its threads has given up a CPU or has been taken off it.
std::uint64_t context_switches(pid_t pid);

}  // namespace uffdkit::bench
