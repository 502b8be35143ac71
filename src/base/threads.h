// Threads, what they wait for, and the clock: the machine's, or those of a test that runs one thread at a
// time, in an order that a seed gives (docs/decisions/0013-threads-seam.md).
//
// Engine and manager start, wait and look at the clock by a `Threads` only. It is a value, handed down
// through constructors; the default is the machine. Threads: any.
#pragma once

#include <sys/epoll.h>
#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <limits>
#include <mutex>
#include <thread>
#include <utility>

#include "base/clock.h"

namespace uffdkit {

// A time that never comes.
inline constexpr std::int64_t kNever = std::numeric_limits<std::int64_t>::max();

// What runs threads in the machine's place. Whoever calls is one of its threads; none of these calls is made
// with a mutex held, but for wake(), start() and the timers.
class ThreadScheduler {
 public:
  using ThreadId = std::uint64_t;

  virtual ~ThreadScheduler() = default;
  // Where the time is, for as long as this lives.
  virtual const std::int64_t& clock_ns() const = 0;
  virtual ThreadId start(std::function<void()> run) = 0;
  virtual void join(ThreadId thread) = 0;
  // sched_yield(2).
  virtual void yield() = 0;
  // epoll_wait(2) for one event.
  virtual int wait(int epoll, epoll_event& event, int timeout_ms) = 0;
  // Lets go of `lock` until somebody wakes `condition`, or it is `until_ns`; or for nothing.
  virtual void sleep(const void* condition, std::unique_lock<std::mutex>& lock, std::int64_t until_ns) = 0;
  virtual void wake(const void* condition, bool all) = 0;
  // A descriptor that can be read from the time on to which it was set last.
  virtual UniqueFd make_timer() = 0;
  virtual void set_timer(int timer, std::int64_t when_ns) = 0;
  // Before it is closed.
  virtual void forget_timer(int timer) = 0;
};

// A thread that is waited for by the destructor.
class Thread {
 public:
  Thread() = default;
  explicit Thread(std::thread thread) : thread_(std::move(thread)) {}
  Thread(ThreadScheduler& scheduler, ThreadScheduler::ThreadId id) : scheduler_(&scheduler), id_(id) {}
  ~Thread() {
    if (joinable()) join();
  }
  Thread(Thread&& other) noexcept
      : thread_(std::move(other.thread_)),
        scheduler_(std::exchange(other.scheduler_, nullptr)),
        id_(other.id_) {}
  // To one that has been waited for.
  Thread& operator=(Thread&& other) noexcept {
    thread_ = std::move(other.thread_);
    scheduler_ = std::exchange(other.scheduler_, nullptr);
    id_ = other.id_;
    return *this;
  }

  bool joinable() const { return scheduler_ != nullptr || thread_.joinable(); }
  void join() {
    if (scheduler_ != nullptr)
      std::exchange(scheduler_, nullptr)->join(id_);
    else
      thread_.join();
  }

 private:
  std::thread thread_;
  ThreadScheduler* scheduler_ = nullptr;
  ThreadScheduler::ThreadId id_ = 0;
};

class Threads {
 public:
  Threads() = default;
  // `scheduler` outlives all that is made with this.
  explicit Threads(ThreadScheduler& scheduler) : scheduler_(&scheduler), clock_ns_(&scheduler.clock_ns()) {}

  // Of the clock that everything is timed by. No virtual call: this is on the path of each fault.
  std::int64_t now_ns() const { return clock_ns_ == nullptr ? monotonic_ns() : *clock_ns_; }

  // Signals are blocked in the thread (base/signals_blocked.h). Errors: no thread to be had; the text says
  // that `what` could not be done.
  Result<Thread> start(const char* what, std::function<void()> run) const;
  // Likewise one that nobody waits for. False: no thread to be had.
  bool start_detached(std::function<void()> run) const;

  void yield() const {
    if (scheduler_ == nullptr)
      std::this_thread::yield();
    else
      scheduler_->yield();
  }
  // epoll_wait(2) for one event; -1 waits for ever.
  int wait(int epoll, epoll_event& event, int timeout_ms) const {
    if (scheduler_ == nullptr) [[likely]]
      return ::epoll_wait(epoll, &event, 1, timeout_ms);
    return scheduler_->wait(epoll, event, timeout_ms);
  }

 private:
  friend class Condition;
  friend class Timer;

  ThreadScheduler* scheduler_ = nullptr;  // none: the machine's
  const std::int64_t* clock_ns_ = nullptr;
};

// A condition variable.
class Condition {
 public:
  explicit Condition(Threads threads = {}) : threads_(threads) {}

  // Until it is notified, or the time has come; or for nothing.
  void wait_until(std::unique_lock<std::mutex>& lock, std::int64_t until_ns) {
    if (threads_.scheduler_ != nullptr) return threads_.scheduler_->sleep(this, lock, until_ns);
    if (until_ns == kNever) return condition_.wait(lock);
    condition_.wait_until(lock, std::chrono::steady_clock::time_point(std::chrono::nanoseconds(until_ns)));
  }
  // Until `holds`; returns whether it does.
  template <class Holds>
  bool wait_until(std::unique_lock<std::mutex>& lock, std::int64_t until_ns, const Holds& holds) {
    while (!holds()) {
      if (threads_.now_ns() >= until_ns) return false;
      wait_until(lock, until_ns);
    }
    return true;
  }
  template <class Holds>
  void wait(std::unique_lock<std::mutex>& lock, const Holds& holds) {
    (void)wait_until(lock, kNever, holds);
  }

  void notify_one() {
    if (threads_.scheduler_ != nullptr)
      threads_.scheduler_->wake(this, false);
    else
      condition_.notify_one();
  }
  void notify_all() {
    if (threads_.scheduler_ != nullptr)
      threads_.scheduler_->wake(this, true);
    else
      condition_.notify_all();
  }

 private:
  const Threads threads_;
  std::condition_variable condition_;
};

// A descriptor that can be read from a time on.
class Timer {
 public:
  // fd() is -1, and errno says why, if none is to be had.
  explicit Timer(Threads threads);
  ~Timer();
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;

  int fd() const { return fd_.get(); }
  // In the place of the time before, come or not.
  void set(std::int64_t when_ns) const;
  // It cannot be read any more, until the next time comes.
  void clear() const;

 private:
  const Threads threads_;
  UniqueFd fd_;
};

}  // namespace uffdkit
