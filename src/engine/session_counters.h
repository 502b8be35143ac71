// What a session has done. It may lie in memory that outlives the process which serves the session, so that
// whoever takes the session up counts on. Threads: one writes, by plain stores; any may read.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>

namespace uffdkit {

struct SessionCounters {
  using Counter = std::atomic<std::uint64_t>;

  Counter faults{0};            // fault messages read
  Counter faults_merged{0};     // of these, for a page that was being brought already
  Counter events{0};            // remove, unmap and remap messages
  Counter pages_copied{0};      // 4 KiB pages filled with bytes
  Counter pages_zeroed{0};      // 4 KiB pages mapped as zero
  Counter pages_shared{0};      // 4 KiB pages shown from memory that clients share
  Counter pages_removed{0};     // 4 KiB pages given back by the client
  Counter pages_poisoned{0};    // 4 KiB pages that answer with SIGBUS
  Counter pages_outside{0};     // faults outside of every region, answered with zero
  Counter bytes_read{0};        // from the store
  Counter fetches{0};           // reads that had to wait for the store
  Counter retries{0};           // attempts that the kernel put off (EAGAIN, ENOMEM)
  Counter read_retries{0};      // reads tried again, because pages could not be read
  Counter read_errors{0};       // pages that the store could not give
  Counter pages_prefetched{0};  // 4 KiB pages filled before they were asked for
  Counter pages_background{0};  // likewise, of which nothing said that they would be
  // Pages of the working set that were asked for before they came; pages that are not in it; those that were
  // left out to see whether they are asked for, and of these those that were. See image::WorkingSetRun.
  Counter prefetch_late{0};
  Counter prefetch_missed{0};
  Counter prefetch_left_out{0};
  Counter prefetch_left_out_used{0};
  Counter prefetch_given_up{0};  // 1: at present, for the sake of faults or for want of memory

  // The sum of both, for each of them.
  void set_to_sum(const SessionCounters& one, const SessionCounters& other);
};

// All of them in the order above, which is that of docs/records.md.
inline constexpr std::array kSessionCounters = {
    &SessionCounters::faults,
    &SessionCounters::faults_merged,
    &SessionCounters::events,
    &SessionCounters::pages_copied,
    &SessionCounters::pages_zeroed,
    &SessionCounters::pages_shared,
    &SessionCounters::pages_removed,
    &SessionCounters::pages_poisoned,
    &SessionCounters::pages_outside,
    &SessionCounters::bytes_read,
    &SessionCounters::fetches,
    &SessionCounters::retries,
    &SessionCounters::read_retries,
    &SessionCounters::read_errors,
    &SessionCounters::pages_prefetched,
    &SessionCounters::pages_background,
    &SessionCounters::prefetch_late,
    &SessionCounters::prefetch_missed,
    &SessionCounters::prefetch_left_out,
    &SessionCounters::prefetch_left_out_used,
    &SessionCounters::prefetch_given_up,
};
static_assert(sizeof(SessionCounters) == kSessionCounters.size() * sizeof(std::uint64_t));

inline void SessionCounters::set_to_sum(const SessionCounters& one, const SessionCounters& other) {
  for (const auto counter : kSessionCounters)
    (this->*counter)
        .store(
            (one.*counter).load(std::memory_order_relaxed) + (other.*counter).load(std::memory_order_relaxed),
            std::memory_order_relaxed);
}

}  // namespace uffdkit
