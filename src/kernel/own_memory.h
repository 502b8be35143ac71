// Whether a userfaultfd that came from elsewhere is one of this process's own memory. Whoever serves such a
// one fills its own memory with a client's pages, and waits for itself when it touches one that is missing.
#pragma once

#include <uffdkit/uffd.h>

namespace uffdkit {

// How the kernel is asked: no way changes anything of a memory that is not this process's.
enum class OwnMemoryWay : std::uint8_t {
  move,           // UFFDIO_MOVE (6.8), which answers EINVAL to every other process before all else
  register_page,  // UFFDIO_REGISTER of a page that nobody may write: EPERM here, and EINVAL where there is
                  // none
};

// The one of this kernel.
OwnMemoryWay own_memory_way(SystemCalls& system = linux_system_calls());

// Where neither way tells (events of its process are on their way, or it is gone), it is taken for another's.
// With OwnMemoryWay::register_page a page of ours is mapped and unmapped. Threads: any.
bool is_of_own_memory(const Uffd& uffd, OwnMemoryWay way);

}  // namespace uffdkit
