// What may block for long, and so must not run on the manager's thread: opening files on a disk that is slow,
// or a network that does not answer.
//
// Each piece of work runs on a short-lived thread of its own, a bounded number of them at once. Work on one
// subject runs in order, one after the other, so what is stuck keeps one place only, however many ask for it.
// Threads: the loop's. Lifetime: destruction waits for nobody; work that is under way ends on its own, and
// what it brings is dropped.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <string>

#include "manager/event_loop.h"

namespace uffdkit {

class BlockingWork {
 public:
  static constexpr std::size_t kThreadsMax = 8;

  // What is done with the outcome, on the loop's thread.
  using Finish = std::function<void()>;
  // Runs on a thread of its own, so owns all that it uses.
  using Work = std::function<Finish()>;

  explicit BlockingWork(EventLoop& loop);
  ~BlockingWork();
  BlockingWork(const BlockingWork&) = delete;
  BlockingWork& operator=(const BlockingWork&) = delete;

  // Runs `work` when there is room. Where no thread can be had it runs on this one.
  using Ticket = std::uint64_t;
  Ticket run(const std::string& subject, Work work);
  // Nobody wants it any more: it is not begun, if it was not yet.
  void forget(Ticket ticket);

 private:
  struct Job {
    Ticket ticket;
    std::string subject;
    Work work;
  };
  struct Link;
  void start_what_can_be();
  void start(Job job);
  void ended(const std::string& subject, const Finish& finish);

  const Threads threads_;
  const std::shared_ptr<Link> link_;
  Ticket last_ticket_ = 0;
  std::deque<Job> waiting_;
  std::set<std::string> under_way_;
};

}  // namespace uffdkit
