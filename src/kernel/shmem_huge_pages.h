// Huge pages in memory files (memfd, tmpfs): whether the kernel may put some there by itself, and making one.
//
// The first matters because a huge page comes into being whole: one page is written, and its neighbours are
// present from then on, as zeros, so that touching them is no missing fault.
#pragma once

#include <cstdint>
#include <string>

namespace uffdkit {

// Reads shmem_enabled, and that of each size (since 6.11), below `settings`. Only `never`, `deny` and, for a
// size, `inherit` are off: with `advise`, it would be any client's choice. A kernel without the settings has
// no huge pages. Source: Documentation/admin-guide/mm/transhuge.rst.
bool shmem_huge_pages_on(const std::string& settings = "/sys/kernel/mm/transparent_hugepage");

// Makes the pages of a memory file from `offset` on, a multiple of 2 MiB, one huge page, so that who maps the
// file with the same alignment gets all of them by one fault. All are there already: a hole would be filled
// with zeros. Works whatever shmem_enabled says, and on a file sealed against writing. False: the pages are
// as they were (no huge page to be had, pages in use by a device, a kernel that cannot); nothing is lost by
// it. Since 6.1. Takes milliseconds. Who has mapped the pages maps them again by the next access: that makes
// no message for memory that is registered for missing pages, but one for each page where it is registered
// for minor faults. Threads: any. Source: madvise(2), MADV_COLLAPSE.
bool gather_into_huge_page(int file, std::uint64_t offset);

}  // namespace uffdkit
