// Whether the kernel may put huge pages into memory files (memfd, tmpfs).
//
// It matters because a huge page comes into being whole: one page is written, and its neighbours are present
// from then on, as zeros, so that touching them is no missing fault.
#pragma once

#include <string>

namespace uffdkit {

// Reads shmem_enabled, and that of each size (since 6.11), below `settings`. Only `never`, `deny` and, for a
// size, `inherit` are off: with `advise`, it would be any client's choice. A kernel without the settings has
// no huge pages. Source: Documentation/admin-guide/mm/transhuge.rst.
bool shmem_huge_pages_on(const std::string& settings = "/sys/kernel/mm/transparent_hugepage");

}  // namespace uffdkit
