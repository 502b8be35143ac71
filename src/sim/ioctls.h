// The ioctls of a userfaultfd, a file for each family: register.cc (API, REGISTER, UNREGISTER, WAKE), fill.cc
// (COPY, ZEROPAGE, CONTINUE, POISON), protect.cc (WRITEPROTECT), move.cc (MOVE). Each takes the ioctl's
// argument as the caller gave it and returns 0 or -errno.
#pragma once

#include "sim/descriptors.h"

namespace uffdkit::sim {

int ioctl_api(Caller& caller, Context& context, std::uintptr_t argument);
int ioctl_register(Caller& caller, Context& context, std::uintptr_t argument);
int ioctl_unregister(Caller& caller, Context& context, std::uintptr_t argument);
int ioctl_wake(Context& context, std::uintptr_t argument);
int ioctl_copy(Caller& caller, Context& context, std::uintptr_t argument);
int ioctl_zeropage(Caller& caller, Context& context, std::uintptr_t argument);
int ioctl_continue(Caller& caller, Context& context, std::uintptr_t argument);
int ioctl_poison(Caller& caller, Context& context, std::uintptr_t argument);
int ioctl_writeprotect(Context& context, std::uintptr_t argument);
int ioctl_move(Caller& caller, Context& context, std::uintptr_t argument);

// ---- what they share ------------------------------------------------------------------------------------

// Whether [start, start + length) can be a range of anything: not empty, its length whole pages, inside the
// user address space.
inline bool is_valid_unaligned_range(std::uint64_t start, std::uint64_t length) {
  return length != 0 && length % kSmallPage == 0 && start >= AddressSpace::kLowest &&
         start < AddressSpace::kHighest && length <= AddressSpace::kHighest - start;
}

// The same, with a start on a page.
inline bool is_valid_range(std::uint64_t start, std::uint64_t length) {
  return start % kSmallPage == 0 && is_valid_unaligned_range(start, length);
}

}  // namespace uffdkit::sim
