#include "harness/placement.h"

#include <sched.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <filesystem>
#include <system_error>

namespace uffdkit::bench {
namespace {

const cpu_set_t& allowed() {
  static const cpu_set_t set = [] {
    cpu_set_t found;
    if (::sched_getaffinity(0, sizeof found, &found) != 0)
      throw std::system_error(errno, std::generic_category(), "sched_getaffinity");
    return found;
  }();
  return set;
}

std::vector<int> cpus() {
  std::vector<int> found;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
    if (CPU_ISSET(static_cast<std::size_t>(cpu), &allowed())) found.push_back(cpu);
  return found;
}

}  // namespace

Placement same_cpu() {
  const int cpu = cpus().front();
  return {.name = "same CPU", .client_cpu = cpu, .server_cpu = cpu};
}

std::vector<Placement> placements() {
  std::vector<Placement> all = {same_cpu()};
  if (const std::vector<int> usable = cpus(); usable.size() > 1)
    all.push_back({.name = "other CPU", .client_cpu = usable[0], .server_cpu = usable[1]});
  all.push_back({.name = "free"});
  return all;
}

void pin(pid_t pid, int cpu) {
  cpu_set_t set = allowed();
  if (cpu != kAnyCpu) {
    CPU_ZERO(&set);
    CPU_SET(static_cast<std::size_t>(cpu), &set);
  }
  const std::string tasks = "/proc/" + (pid == 0 ? "self" : std::to_string(pid)) + "/task";
  for (const auto& task : std::filesystem::directory_iterator(tasks)) {
    const int id = std::atoi(task.path().filename().c_str());
    // A thread may have ended meanwhile.
    if (::sched_setaffinity(id, sizeof set, &set) != 0 && errno != ESRCH)
      throw std::system_error(errno, std::generic_category(), "sched_setaffinity");
  }
}

}  // namespace uffdkit::bench
