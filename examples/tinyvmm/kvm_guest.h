// The guest as a virtual machine with one CPU, on /dev/kvm.
#pragma once

#include <memory>

#include "guest.h"

namespace tinyvmm {

/// Is there a KVM to use? False: this machine has none. Error: it has, and the user may not use it.
Result<bool> kvm_is_here();

/// A machine whose CPU stands as `cpu` says. Touches none of the guest's memory.
Result<std::unique_ptr<Guest>> make_kvm_guest(const GuestMemory& memory, const GuestLayout& layout,
                                              const CpuState& cpu);

}  // namespace tinyvmm
