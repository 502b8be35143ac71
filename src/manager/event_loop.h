// The manager's own thread: descriptors, times, and what other threads ask of it. Nothing that it calls may
// block; page faults are served elsewhere (engine/), so that nothing here can hold one up. Threads: post()
// and stop() from any; everything else on the loop's thread, or before run().
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "base/threads.h"

namespace uffdkit {

class EventLoop {
 public:
  using Callback = std::function<void()>;
  using Timer = std::uint64_t;

  static Result<std::unique_ptr<EventLoop>> create(Threads threads = {});

  // Calls `ready` whenever `fd` has one of `events` (EPOLLIN, EPOLLOUT; errors and hang-up count as any). The
  // callback may remove any descriptor, its own too. Errors: no kernel memory; a kind of file that cannot be
  // waited for.
  Result<void> add(int fd, std::uint32_t events, Callback ready);
  // Waits for other events from now on.
  void change(int fd, std::uint32_t events);
  // Before `fd` is closed.
  void remove(int fd);

  // Calls `due` once, `delay_ms` from now.
  Timer after(std::int64_t delay_ms, Callback due);
  // Nothing happens if it was called already.
  void cancel(Timer timer);

  // By which it runs, and times all.
  const Threads& threads() const { return threads_; }

  // Has the loop call `work` soon.
  void post(Callback work);

  // Runs until stop().
  void run();
  void stop();

 private:
  EventLoop(Threads threads, UniqueFd epoll, UniqueFd wakeup)
      : threads_(threads), epoll_(std::move(epoll)), wakeup_(std::move(wakeup)) {}
  int run_timers();
  void run_posted();
  void wake();

  const Threads threads_;
  UniqueFd epoll_;
  UniqueFd wakeup_;
  std::unordered_map<int, std::shared_ptr<Callback>> ready_;
  std::multimap<std::int64_t, std::pair<Timer, Callback>> timers_;
  Timer last_timer_ = 0;
  bool stopped_ = false;

  std::mutex posted_mutex_;
  std::vector<Callback> posted_;
};

}  // namespace uffdkit
