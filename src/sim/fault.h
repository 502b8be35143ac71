// The fault path: what happens when the hardware cannot carry out an access.
#pragma once

#include "sim/context.h"

namespace uffdkit::sim {

// What a fault comes to.
struct FaultAnswer {
  enum class Kind : std::uint8_t {
    retry,          // something has changed: try the access again
    spin,           // nothing has changed, but the access is tried again all the same
    sleep,          // it is the userfaultfd's: queue `message` there and sleep
    refused,        // SIGBUS (in a system call: EFAULT)
    poisoned,       // SIGBUS for a poisoned page (likewise)
    no_area,        // SIGSEGV with SEGV_MAPERR (likewise)
    no_permission,  // SIGSEGV with SEGV_ACCERR (likewise)
  };
  Kind kind;
  ContextPtr context = nullptr;
  abi::Msg message = {};
};

struct FaultRequest {
  std::uint64_t address;
  bool write;
  bool user_mode;
  std::uint32_t thread_id;
};

// Whether the hardware alone can carry out the access: the entry if so.
Pte* reachable(AddressSpace& space, std::uint64_t address, bool write);

// One pass through the kernel's fault handler, for an access that is not reachable.
FaultAnswer handle_fault(AddressSpace& space, const FaultRequest& request);

// A page of zeros for a mapping of huge pages, private or for the page cache; nullptr when the pool is empty.
FramePtr allocate_private(Area& area, std::uint64_t offset);

}  // namespace uffdkit::sim
