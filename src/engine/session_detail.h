// What the parts of Session share: small helpers and limits. The parts are session.cc (steps, messages and
// faults: all that a served fault runs), session_events.cc, session_regions.cc, session_fetches.cc,
// session_prefetch.cc, session_streams.cc, session_populate.cc, session_ending.cc and session_shared.cc.
#pragma once

#include <fmt/format.h>
#include <uffdkit/error.h>
#include <uffdkit/units.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>

#include "engine/layout.h"

namespace uffdkit::session {

inline constexpr PageCount kOneGranule{1};
// Larger pages are not served.
inline constexpr std::size_t kPageBytesMax = 2u << 20;
// How often a page for which there is no memory is tried: about ten seconds.
inline constexpr unsigned kNoMemoryAttemptsMax = 2000;

// How long a fault, or bringing everything in, is put off the first time, and at most. The kernel refuses for
// as long as the client's thread that changes the address space has not run again, which was seen to take a
// millisecond.
inline constexpr std::int64_t kPutOffFirstNs = 100'000;
inline constexpr std::int64_t kPutOffMaxNs = 5'000'000;

// All that a 64-bit process may have mapped, and a 32-bit one, for which the kernel refuses the first.
inline constexpr Address kLowest(1u << 20);
inline constexpr AddressRange kAllAddresses{kLowest, Address(0x7fffffff0000) - kLowest};
inline constexpr AddressRange kAllAddresses32{kLowest, Address(0xbfff0000) - kLowest};

inline std::int64_t put_off_ns(unsigned attempts) {
  return std::min(kPutOffFirstNs << std::min(attempts, 8u), kPutOffMaxNs);
}

// One more than before. Only the session's owner writes, so no locked instruction is needed.
inline void add(std::atomic<std::uint64_t>& counter, std::uint64_t count = 1) {
  counter.store(counter.load(std::memory_order_relaxed) + count, std::memory_order_relaxed);
}

inline PageCount granules_per_page(const Segment& segment) {
  return kPage4K.pages(segment.page_size.bytes());
}

inline Error no_memory_for(Address page) {
  return Error(fmt::format("no memory for the page at {:#x}", page.value))
      .with_remedy("raise the client's memory limit, or the pool of huge pages");
}

}  // namespace uffdkit::session
