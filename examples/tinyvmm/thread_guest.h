// The guest without virtualisation: threads of this process do to the same memory what guest.S does.
// A snapshot made by one can be resumed by the other.
#pragma once

#include <memory>

#include "guest.h"

namespace tinyvmm {

/// thread_count: 1 or more; they share the work of each walk and check.
std::unique_ptr<Guest> make_thread_guest(const GuestMemory& memory, const GuestLayout& layout,
                                         unsigned thread_count);

}  // namespace tinyvmm
