// How threads tell a userfaultfd what they do to its memory.
//
// An operation that a userfaultfd asked to hear of (its events) raises `changing` first (Changing), sleeps
// until the event has been read (EventWait), and lets `changing` fall when it runs again. Events come after
// the deed for munmap, mremap and fork, and before it for madvise, whose pages are still there while the
// event waits. Source: fs/userfaultfd.c, userfaultfd_event_wait_completion() and its callers.
#pragma once

#include "sim/context.h"
#include "sim/thread.h"

namespace uffdkit::sim {

// Whether whoever serves the area asked for this kind of event (abi::kFeatureEvent...).
bool wants(const Area& area, std::uint64_t feature);

// The message of REMOVE or UNMAP.
abi::Msg event_message(std::uint8_t event, std::uint64_t start, std::uint64_t end);

// An unmapping that is done and has to be told.
struct UnmapNotice {
  Changing changing;
  std::uint64_t start;
  std::uint64_t end;
};

// Removes what is mapped in a range; who asked for it hears of it, once for each userfaultfd and of the whole
// range. Source: fs/userfaultfd.c, userfaultfd_unmap_prep().
void take_away(AddressSpace& space, std::uint64_t start, std::uint64_t end,
               std::vector<UnmapNotice>& notices);

// ---- what all operations share --------------------------------------------------------------------------

// How a system call ends.
constexpr Completion result(std::int64_t value) {
  return {.kind = Completion::Kind::result, .result = value};
}
constexpr bool page_aligned(std::uint64_t number) {
  return number % kSmallPage == 0;
}
constexpr std::uint64_t round_up(std::uint64_t number, std::uint64_t unit) {
  return (number + unit - 1) / unit * unit;
}

}  // namespace uffdkit::sim
