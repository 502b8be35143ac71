// When a session that always has something to do leaves its worker, and its CPU, to others.
//
// After each slice of work for one session the worker looks whether anything else waits for one. And a client
// can make work without an end that gets nowhere: it gives memory back in a loop, or the kernel repeats the
// faults of its threads. While others are served, such a session rests between its slices, so that a
// neighbour which runs on the worker's CPU finds that free, too. Pure: times and counts come in. Threads:
// none; owned by one session's actor.
#pragma once

#include <cstdint>

namespace uffdkit {

class FairShare {
 public:
  // What a neighbour may have to wait for a worker that serves this session. Smaller ones cost: it is looked
  // for others by a system call.
  static constexpr std::int64_t kSliceNs = 30'000;
  // Long enough that a neighbour seldom meets it: ten times a slice.
  static constexpr std::int64_t kRestNs = 300'000;

  // What the client has told since it was attached.
  struct Told {
    std::uint64_t events = 0;      // of its address space
    std::uint64_t duplicates = 0;  // faults that were known
  };

  // A worker begins to run the session, and leaves it.
  void begin(std::int64_t now_ns, Told told);
  void end(std::int64_t now_ns) { used_ns_ += now_ns - began_ns_; }

  // Whether a slice has ended, once for each: time to look whether others wait.
  bool slice_has_ended(std::int64_t now_ns);

  // Whether the run that has begun, with those shortly before it, has taken a slice, and the client makes
  // work without an end.
  bool floods(std::int64_t now_ns, Told told) const;

  // One begins anew, since the worker has given way.
  void begin_slice(std::int64_t now_ns) { slice_end_ns_ = now_ns + kSliceNs; }

  // Whether the client has told of its address space shortly before, as one that only runs does not.
  bool has_told_events(Told told) const { return told.events != told_before_.events; }

  // The session rests from now on, and until when it does: not to be run before.
  void rest(std::int64_t now_ns) { rests_until_ns_ = now_ns + kRestNs; }
  std::int64_t rests_until_ns() const { return rests_until_ns_; }

 private:
  std::int64_t began_ns_ = 0;
  std::int64_t slice_end_ns_ = 0;
  // Runs that follow each other closely are counted together.
  std::int64_t period_began_ns_ = 0;
  std::int64_t used_ns_ = 0;
  Told told_before_;
  std::int64_t rests_until_ns_ = 0;
};

}  // namespace uffdkit
