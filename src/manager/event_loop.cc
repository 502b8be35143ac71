#include "manager/event_loop.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/check.h"

namespace uffdkit {

Result<std::unique_ptr<EventLoop>> EventLoop::create(Threads threads) {
  UniqueFd epoll(::epoll_create1(EPOLL_CLOEXEC));
  UniqueFd wakeup(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!epoll || !wakeup) return Failure(Error::from_errno("create the manager's event loop", errno));
  const int wakeup_fd = wakeup.get();
  std::unique_ptr<EventLoop> loop(new EventLoop(threads, std::move(epoll), std::move(wakeup)));
  EventLoop* self = loop.get();
  if (auto added = loop->add(wakeup_fd, EPOLLIN, [self] { self->run_posted(); }); !added)
    return Failure(std::move(added).error());
  return loop;
}

Result<void> EventLoop::add(int fd, std::uint32_t events, Callback ready) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) < 0)
    return Failure(Error::from_errno("watch a descriptor", errno));
  ready_[fd] = std::make_shared<Callback>(std::move(ready));
  return {};
}

void EventLoop::change(int fd, std::uint32_t events) {
  epoll_event event{};
  event.events = events;
  event.data.fd = fd;
  CHECK(::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, fd, &event) == 0);
}

void EventLoop::remove(int fd) {
  if (ready_.erase(fd) == 0) return;
  CHECK(::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, fd, nullptr) == 0);
}

EventLoop::Timer EventLoop::after(std::int64_t delay_ms, Callback due) {
  const Timer timer = ++last_timer_;
  timers_.emplace(threads_.now_ns() + delay_ms * 1'000'000, std::pair(timer, std::move(due)));
  return timer;
}

void EventLoop::cancel(Timer timer) {
  const auto found = std::find_if(timers_.begin(), timers_.end(),
                                  [&](const auto& entry) { return entry.second.first == timer; });
  if (found != timers_.end()) timers_.erase(found);
}

void EventLoop::wake() {
  const std::uint64_t one = 1;
  (void)!::write(wakeup_.get(), &one, sizeof one);
}

void EventLoop::post(Callback work) {
  {
    const std::lock_guard lock(posted_mutex_);
    posted_.push_back(std::move(work));
  }
  wake();
}

void EventLoop::run_posted() {
  std::uint64_t count = 0;
  (void)!::read(wakeup_.get(), &count, sizeof count);
  std::vector<Callback> posted;
  {
    const std::lock_guard lock(posted_mutex_);
    posted.swap(posted_);
  }
  for (const Callback& work : posted) work();
}

int EventLoop::run_timers() {
  while (!timers_.empty()) {
    const std::int64_t left_ns = timers_.begin()->first - threads_.now_ns();
    // Rounded up, so that it is due when the wait is over.
    if (left_ns > 0) return static_cast<int>(std::min<std::int64_t>(left_ns / 1'000'000 + 1, 60'000));
    const Callback due = std::move(timers_.begin()->second.second);
    timers_.erase(timers_.begin());
    due();
  }
  return -1;
}

void EventLoop::run() {
  stopped_ = false;
  while (!stopped_) {
    const int timeout_ms = run_timers();
    if (stopped_) return;
    // One event at a time: a callback may remove any other descriptor.
    epoll_event event;
    if (threads_.wait(epoll_.get(), event, timeout_ms) != 1) continue;
    const auto found = ready_.find(event.data.fd);
    if (found == ready_.end()) continue;
    const std::shared_ptr<Callback> ready = found->second;
    (*ready)();
  }
}

void EventLoop::stop() {
  post([this] { stopped_ = true; });
}

}  // namespace uffdkit
