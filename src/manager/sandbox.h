// What a process that serves gives up before it hears the first client: docs/security.md says what it keeps,
// and why.
#pragma once

#include <uffdkit/error.h>

#include <nlohmann/json_fwd.hpp>

namespace uffdkit {

// Keeps of this thread's capabilities those that serving takes; nothing that is executed from now on brings
// any back, and no other process of this user may look into this one. Threads that are made later inherit it,
// others do not: so this comes before the first. Needs no privilege. Errors: the kernel refuses.
Result<void> drop_privileges();

// Whether files are made complete and given the names of others, as recordings are.
enum class ReplacesFiles : bool { no, yes };
// Whether files are read by an io_uring that was made before.
enum class ReadsByRing : bool { no, yes };

// Puts all threads under a filter of system calls (seccomp(2), since Linux 3.17): what serving never calls
// fails with ENOSYS, and what only somebody else's code would call ends the process. For when everything has
// been started, since it cannot be undone. Children inherit it. Errors: this kernel has no such filters.
Result<void> filter_system_calls(ReplacesFiles replaces_files = ReplacesFiles::no,
                                 ReadsByRing reads_by_ring = ReadsByRing::no);

// What the kernel says of this process: whether its system calls are filtered, and which capabilities are
// left.
nlohmann::json confinement();

}  // namespace uffdkit
