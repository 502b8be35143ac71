// The virtual CPU's registers, in the form in which KVM takes and gives them, and as a snapshot keeps them.
#pragma once

#include <linux/kvm.h>

#include <cstddef>
#include <span>

#include "layout.h"
#include "memory.h"

namespace tinyvmm {

struct CpuState {
  kvm_regs registers;
  kvm_sregs segments;
};

/// The machine code of guest.S.
std::span<const std::byte> guest_code();
/// Puts the guest's code where the layout says.
void load_guest_code(const GuestMemory& memory, const GuestLayout& layout);

/// A CPU in flat 32-bit protected mode at the first instruction of the guest, with the fill's parameters.
CpuState cpu_before_fill(const GuestLayout& layout);
/// The same CPU after the fill, as it stands in a snapshot: the next instruction reports that the guest is
/// awake.
CpuState cpu_after_fill(const GuestLayout& layout);

}  // namespace tinyvmm
