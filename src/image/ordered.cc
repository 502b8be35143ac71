#include "image/ordered.h"

#include <sched.h>

#include <algorithm>

namespace uffdkit::image {

unsigned usable_cpus() {
  cpu_set_t set;
  if (::sched_getaffinity(0, sizeof set, &set) != 0) return std::max(1u, std::thread::hardware_concurrency());
  return std::max(1u, static_cast<unsigned>(CPU_COUNT(&set)));
}

}  // namespace uffdkit::image
