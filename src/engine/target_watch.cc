#include "engine/target_watch.h"

#include <algorithm>

namespace uffdkit {
namespace {

// A time to look is put off by up to this part of the pause before it, to one that others have as well.
constexpr std::int64_t kPutOffPart = 4;

}  // namespace

void TargetWatch::add(SessionId session, bool exit_is_told, std::int64_t now_ns) {
  put(session, watched_.emplace(session, Watched{.exit_is_told = exit_is_told}).first->second, now_ns);
}

void TargetWatch::exit_was_told(SessionId session, std::int64_t now_ns) {
  const auto found = watched_.find(session);
  if (found == watched_.end()) return;
  found->second.exit_is_told = false;
  found->second.pause_ns = kFirstPauseNs;
  put(session, found->second, now_ns);
}

void TargetWatch::remove(SessionId session) {
  const auto found = watched_.find(session);
  if (found == watched_.end()) return;
  due_.erase({found->second.due_ns, session});
  watched_.erase(found);
}

std::vector<TargetWatch::SessionId> TargetWatch::take_due(std::int64_t now_ns, std::size_t most) {
  std::vector<SessionId> taken;
  while (!due_.empty() && due_.begin()->first <= now_ns && taken.size() < most) {
    taken.push_back(due_.begin()->second);
    watched_.at(taken.back()).due_ns = 0;
    due_.erase(due_.begin());
  }
  return taken;
}

void TargetWatch::is_there(SessionId session, std::uint64_t faults, std::int64_t now_ns) {
  const auto found = watched_.find(session);
  if (found == watched_.end()) return;
  Watched& watched = found->second;
  const bool idle = faults == std::exchange(watched.faults, faults);
  const std::int64_t most = watched.exit_is_told ? kMostPauseOfToldNs : kMostPauseNs;
  watched.pause_ns = idle ? std::min(watched.pause_ns * 2, most) : kFirstPauseNs;
  put(session, watched, now_ns);
}

void TargetWatch::put(SessionId session, Watched& watched, std::int64_t now_ns) {
  due_.erase({watched.due_ns, session});
  const std::int64_t step = watched.pause_ns / kPutOffPart;
  watched.due_ns = (now_ns + watched.pause_ns + step - 1) / step * step;
  due_.emplace(watched.due_ns, session);
}

}  // namespace uffdkit
