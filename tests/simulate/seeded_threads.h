// Threads of the machine's that run one at a time, in an order that a seed gives, by a clock that stands
// while anybody can run: so whatever runs on base/threads.h runs the same way each time.
//
// A thread runs until it waits, yields or ends; then the seed says who is next. Descriptors are the real
// ones: a thread that waits for some can run as soon as epoll(7) says so. Hence whoever makes one ready must
// be one of these threads, or be waited for by one.
//
// Threads: whoever makes this is the first of them, and ends it when all others have ended.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/threads.h"
#include "simulate/random.h"

namespace uffdkit::simulate {

class SeededThreads : public ThreadScheduler {
 public:
  explicit SeededThreads(std::uint64_t seed);
  ~SeededThreads() override;
  SeededThreads(const SeededThreads&) = delete;
  SeededThreads& operator=(const SeededThreads&) = delete;

  // ---- from the first thread

  // Lets the others run until none of them can, at this time; or for so many turns, since they may wait for
  // what only this thread can do, and look for it again and again. Returns whether none can.
  bool run_until_idle(int turns_max = 1000);
  // Lets time pass until one of the others has waited for long enough. False: none waits for a time.
  bool let_time_pass();
  // How many others there are.
  std::size_t others() const;
  // Whether all of them have waited for each other, as they must not. To come to an end, all were woken then.
  bool got_stuck() const { return got_stuck_; }
  // Tells two runs apart: of all that was decided so far.
  std::uint64_t trace() const { return trace_; }

  // ---- ThreadScheduler

  const std::int64_t& clock_ns() const override { return now_ns_; }
  ThreadId start(std::function<void()> run) override;
  void join(ThreadId thread) override;
  void yield() override;
  int wait(int epoll, epoll_event& event, int timeout_ms) override;
  void sleep(const void* condition, std::unique_lock<std::mutex>& lock, std::int64_t until_ns) override;
  void wake(const void* condition, bool all) override;
  UniqueFd make_timer() override;
  void set_timer(int timer, std::int64_t when_ns) override;
  void forget_timer(int timer) override;

 private:
  enum class State : std::uint8_t { runnable, descriptors, condition, join, idle, ended };
  struct Member {
    Member(ThreadId number, std::uint64_t how_often) : id(number), weight(how_often) {}
    const ThreadId id;
    const std::uint64_t weight;  // how often it is chosen, beside others
    State state = State::runnable;
    int epoll = -1;
    const void* condition = nullptr;
    std::int64_t until_ns = kNever;
    ThreadId joined = 0;
    std::condition_variable turn;
    std::thread thread;
  };

  Member& self() { return *members_[running_]; }
  // Says that the caller waits as `state` says, and comes back when it is its turn again.
  void wait_for_turn(State state, std::int64_t until_ns = kNever);
  // Gives the turn to somebody.
  void choose();
  std::vector<Member*> who_can_run();
  void wake_all_who_sleep();
  void fire_timers();
  // The next time that anybody waits for.
  std::int64_t next_time() const;
  void trace(std::uint64_t decision);

  std::mutex mutex_;  // held by whoever runs while it decides
  Random random_;
  std::int64_t now_ns_ = 1'000'000'000;
  std::uint64_t trace_ = 0xcbf2'9ce4'8422'2325;
  std::vector<std::unique_ptr<Member>> members_;  // by number
  ThreadId running_ = 0;
  bool got_stuck_ = false;
  int turns_left_ = 0;  // while the first waits for the others to be idle
  std::map<int, std::int64_t> timers_;
};

}  // namespace uffdkit::simulate
