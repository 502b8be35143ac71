// Watches over faults that are not answered: says which page waits, where its image has it, and why, once it
// has waited for longer than a limit, and again whenever it has waited for twice as long as when that was
// last said. Pure: time and what there is come from its caller. Threads: one.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace uffdkit {

// "the read of its image has not come back", for people.
std::string describe(PendingWhy why);
// "reading", for programs.
std::string_view to_string(PendingWhy why);
// The page that the oldest fault of a session waits for: its address, its offset in its image, and why.
std::string describe_oldest(const SessionStatus& session);

class Watchdog {
 public:
  // `limit_ns` is above 0.
  explicit Watchdog(std::int64_t limit_ns) : limit_ns_(limit_ns) {}

  // What there is to say of these, all sessions that there are: a line each.
  std::vector<std::string> look(std::span<const SessionStatus> sessions, std::int64_t now_ns);

  // Faults that have waited for longer than the limit so far.
  std::uint64_t late_faults() const { return late_faults_; }

 private:
  struct Late {
    std::int64_t since_ns;     // of the fault
    std::int64_t said_age_ns;  // how old it was when it was last spoken of
  };

  const std::int64_t limit_ns_;
  std::map<SessionId, Late> late_;
  std::uint64_t late_faults_ = 0;
};

}  // namespace uffdkit
