// Handing this process's page faults to another process, as Firecracker does when it loads a snapshot with
// its "Uffd" memory backend: a userfaultfd over the guest's memory goes through a Unix socket, with a JSON
// text that says which addresses hold which part of the snapshot. Nothing is answered; faults are served from
// then on.
#pragma once

#include <filesystem>

#include "memory.h"
#include "result.h"

namespace tinyvmm {

/// What must live as long as the guest runs. The socket stays open because its end tells the server that we
/// are gone. While the descriptor is open a fault that nobody serves waits; it does not turn into a page of
/// zeros.
struct ServedMemory {
  Fd faults;
  Fd socket;
};

/// Registers all of the memory and sends it to the server that listens at `socket_path`. From then on a page
/// that is not there is asked from the server. The memory must not have been touched before.
Result<ServedMemory> hand_over(const GuestMemory& memory, const std::filesystem::path& socket_path);

}  // namespace tinyvmm
