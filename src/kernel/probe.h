// What the running kernel's userfaultfd can do for this process, found out by doing it: each way of creating
// one, its features, and which memory can be registered for which faults. Nothing stays behind; no huge page
// is taken. Threads: any, but the answers hold for the moment only.
#pragma once

#include <uffdkit/uffd.h>

#include <string>
#include <vector>

namespace uffdkit {

// One try to register memory.
struct RegisterProbe {
  RegisterModes modes;
  bool asynchronous;  // with WP_ASYNC: writes are recorded, not reported
  int os_error;       // 0: it was accepted
  RangeIoctls ioctls;
};

struct MemoryProbe {
  std::string name;     // "hugetlb shared"
  std::string lacking;  // why there is no such memory to try on; empty if it was tried
  std::vector<RegisterProbe> modes;
};

struct KernelProbe {
  std::vector<CreateAttempt> ways;
  Features features;           // all that the kernel reports, known or not; empty if no way works
  bool fork_events_permitted;  // event-fork can be enabled by this user
  std::vector<MemoryProbe> memory;
  int pagemap_scan_error;  // errno of PAGEMAP_SCAN; 0: it works
};

KernelProbe probe_kernel();

}  // namespace uffdkit
