// Whose memory is looked at when, whether it is still there.
//
// A process that calls exec(2) tells nobody that the memory which a session serves is gone, and nor does one
// that exits and is not known, such as the child of a fork. So their memory is looked at from time to time,
// after pauses that double while its client does nothing. Those who are due at about the same time are due
// together, so that thousands of idle clients wake nobody thousands of times. Pure: times come in. Threads:
// none of its own; callers exclude each other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace uffdkit {

class TargetWatch {
 public:
  using SessionId = std::uint64_t;

  static constexpr std::int64_t kFirstPauseNs = 1'000'000'000;
  // The longest pause: where nobody tells of an exit, and where only an exec(2) goes unheard.
  static constexpr std::int64_t kMostPauseNs = 64 * kFirstPauseNs;
  static constexpr std::int64_t kMostPauseOfToldNs = 1024 * kFirstPauseNs;

  // `exit_is_told`: somebody hears of the exit of its process.
  void add(SessionId session, bool exit_is_told, std::int64_t now_ns);
  // Nobody tells of an exit any more: its process has exited, and its memory may be another's now.
  void exit_was_told(SessionId session, std::int64_t now_ns);
  void remove(SessionId session);

  // Up to `most` that are to be looked at now. Each comes again only after is_there().
  std::vector<SessionId> take_due(std::int64_t now_ns, std::size_t most);
  // It was looked at; its client has had so many faults in all.
  void is_there(SessionId session, std::uint64_t faults, std::int64_t now_ns);
  // When the next one is due; 0: never.
  std::int64_t next_ns() const { return due_.empty() ? 0 : due_.begin()->first; }

 private:
  struct Watched {
    bool exit_is_told;
    std::uint64_t faults = 0;
    std::int64_t pause_ns = kFirstPauseNs;
    std::int64_t due_ns = 0;  // 0: it was taken
  };
  void put(SessionId session, Watched& watched, std::int64_t now_ns);

  std::unordered_map<SessionId, Watched> watched_;
  std::set<std::pair<std::int64_t, SessionId>> due_;
};

}  // namespace uffdkit
