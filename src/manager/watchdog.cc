#include "manager/watchdog.h"

#include <fmt/format.h>

#include <cstdlib>
#include <set>
#include <utility>

namespace uffdkit {
namespace {

// Ages are told by a clock that is read twice: so much apart, it is still the same fault.
constexpr std::int64_t kSameFaultNs = 1'000'000;

double seconds(std::int64_t ns) {
  return static_cast<double>(ns) / 1e9;
}

}  // namespace

std::string_view to_string(PendingWhy why) {
  switch (why) {
    case PendingWhy::serving:
      return "serving";
    case PendingWhy::reading:
      return "reading";
    case PendingWhy::full:
      return "reads-used-up";
    case PendingWhy::changing:
      return "client-changing";
    case PendingWhy::no_memory:
      return "no-memory";
    case PendingWhy::paused:
      return "paused";
  }
  return "?";
}

std::string describe(PendingWhy why) {
  switch (why) {
    case PendingWhy::serving:
      return "a worker is about it, and may be held up in the kernel";
    case PendingWhy::reading:
      return "its read from the image has not come back";
    case PendingWhy::full:
      return "as many reads of the image as may be are under way, and none comes back";
    case PendingWhy::changing:
      return "the client changes its address space, so that the kernel refuses to fill it (EAGAIN)";
    case PendingWhy::no_memory:
      return "there is no memory for it: the client's limit is reached, or no huge page is free";
    case PendingWhy::paused:
      return "it cannot be read, and the client is stopped";
  }
  return "?";
}

std::string describe_oldest(const SessionStatus& session) {
  const std::string where = session.oldest_offset == SessionWaiting::kNoOffset
                                ? std::string("of no image")
                                : fmt::format("at offset {} of {}", session.oldest_offset, session.image);
  const std::string retries = session.read_retries == 0
                                  ? ""
                                  : fmt::format(" (so far {} reads were tried again)", session.read_retries);
  return fmt::format("the page at {:#x}, {}, has been waited for {:.1f} s: {}{}", session.oldest_page, where,
                     seconds(session.oldest_pending_ns), describe(session.oldest_why), retries);
}

std::vector<std::string> Watchdog::look(std::span<const SessionStatus> sessions, std::int64_t now_ns) {
  std::vector<std::string> lines;
  std::set<SessionId> still_late;
  for (const SessionStatus& session : sessions) {
    const std::int64_t age_ns = session.oldest_pending_ns;
    const auto known = late_.find(session.id);
    // An operator knows of these, and nothing is late as long as the client is stopped.
    if (age_ns <= limit_ns_ || session.oldest_why == PendingWhy::paused) continue;
    still_late.insert(session.id);
    const std::int64_t since_ns = now_ns - age_ns;
    const bool same = known != late_.end() && std::llabs(known->second.since_ns - since_ns) < kSameFaultNs;
    if (!same) ++late_faults_;
    if (same && age_ns < 2 * known->second.said_age_ns) continue;
    late_[session.id] = {.since_ns = since_ns, .said_age_ns = age_ns};
    lines.push_back(fmt::format("session {}: {}", session.id, describe_oldest(session)));
  }
  for (auto late = late_.begin(); late != late_.end();) {
    if (still_late.contains(late->first)) {
      ++late;
      continue;
    }
    lines.push_back(
        fmt::format("session {}: nothing is waited for any longer than {:.1f} s, the longest was {:.1f} s",
                    late->first, seconds(limit_ns_), seconds(now_ns - late->second.since_ns)));
    late = late_.erase(late);
  }
  return lines;
}

}  // namespace uffdkit
