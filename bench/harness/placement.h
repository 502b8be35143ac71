// Which CPU the client and who serves it run on.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace uffdkit::bench {

// Any CPU that this program may use.
inline constexpr int kAnyCpu = -1;

struct Placement {
  std::string name;
  int client_cpu = kAnyCpu;
  int server_cpu = kAnyCpu;
};

// Same CPU; different CPUs, where there are two; and free.
std::vector<Placement> placements();
Placement same_cpu();

// Pins every thread of a process, as `taskset -a -p` does; pid 0 is the caller. Throws where it cannot.
void pin(pid_t pid, int cpu);

}  // namespace uffdkit::bench
