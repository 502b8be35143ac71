#include "simulate/manager_seam.h"

#include <uffdkit/abi.h>

#include <algorithm>

#include "simulate/cut_copy.h"
#include "simulate/expected.h"

namespace uffdkit::simulate {
namespace {

// One range of a successor's wakes has more pages, one of a fault's has not.
constexpr std::uint64_t kWakePages = 32;
constexpr int kLookAgainMs = 1000;

}  // namespace

void PlantedThreads::wake(const void* condition, bool all) {
  if (!loses(ManagerBug::lost_notification)) SeededThreads::wake(condition, all);
}

void PlantedThreads::set_timer(int timer, std::int64_t when_ns) {
  if (!loses(ManagerBug::lost_time)) SeededThreads::set_timer(timer, when_ns);
}

int PlantedThreads::wait(int epoll, epoll_event& event, int timeout_ms) {
  if (!loses_events_) return SeededThreads::wait(epoll, event, timeout_ms);
  const auto lost = std::ranges::find(lost_, epoll, &Lost::epoll);
  if (bug_ == ManagerBug::none && lost != lost_.end()) {
    event = lost->event;
    lost_.erase(lost);
    return 1;
  }
  // Not for ever, so that it is seen when all is mended.
  const int most_ms = timeout_ms < 0 ? kLookAgainMs : std::min(timeout_ms, kLookAgainMs);
  const int events = SeededThreads::wait(epoll, event, most_ms);
  if (events != 1 || !loses(ManagerBug::lost_event)) return events;
  lost_.push_back({.epoll = epoll, .event = event});
  return 0;
}

int YieldingCalls::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  if (bug_ == ManagerBug::no_wake_at_succession && request == abi::kIoctlWake &&
      reinterpret_cast<const abi::RangeArgs*>(argument)->len > kWakePages * kPage)
    return 0;
  threads_.yield();
  const int result = request == abi::kIoctlCopy ? cut_copy(calls_, random_, fd, argument)
                                                : calls_.ioctl(fd, request, argument);
  threads_.yield();
  return result;
}

std::ptrdiff_t YieldingCalls::read(int fd, void* buffer, std::size_t bytes) {
  threads_.yield();
  const std::ptrdiff_t got = calls_.read(fd, buffer, bytes);
  threads_.yield();
  return got;
}

int YieldingCalls::close(int fd) {
  if (bug_ == ManagerBug::leaked_descriptor && random_.one_in(4)) return 0;
  return calls_.close(fd);
}

}  // namespace uffdkit::simulate
