#include "harness/usage.h"

#include <time.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>

namespace uffdkit::bench {

MemoryUse memory_use(pid_t pid) {
  const std::string path = "/proc/" + std::to_string(pid) + "/smaps";
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  MemoryUse use;
  bool state = false;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key;
    std::uint64_t kib = 0;
    words >> key;
    if (!key.ends_with(':')) {  // "start-end rw-s offset device inode name"
      state = line.find("/memfd:uffdkit-session") != std::string::npos;
    } else if (state ? key == "Rss:" : key == "Private_Clean:" || key == "Private_Dirty:") {
      words >> kib;
      (state ? use.state_bytes : use.private_bytes) += kib * 1024;
    }
  }
  return use;
}

std::uint64_t cpu_ns(pid_t pid) {
  clockid_t clock;
  timespec used;
  if (::clock_getcpuclockid(pid, &clock) != 0 || ::clock_gettime(clock, &used) != 0)
    throw std::runtime_error("cannot read the time that a process has used");
  return static_cast<std::uint64_t>(used.tv_sec) * 1'000'000'000 + static_cast<std::uint64_t>(used.tv_nsec);
}

std::uint64_t context_switches(pid_t pid) {
  std::uint64_t sum = 0;
  for (const auto& task : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/task")) {
    std::ifstream file(task.path() / "status");
    for (std::string line; std::getline(file, line);)
      if (const auto at = line.find("voluntary_ctxt_switches:"); at != std::string::npos)
        sum += std::stoull(line.substr(line.find(':') + 1));
  }
  return sum;
}

}  // namespace uffdkit::bench
