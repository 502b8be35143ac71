#include "manager/blocking_work.h"

#include <algorithm>
#include <mutex>
#include <utility>

namespace uffdkit {

// How a thread finds its way back, if there is still one.
struct BlockingWork::Link {
  std::mutex mutex;
  EventLoop* loop;  // null: the manager has ended
};

BlockingWork::BlockingWork(EventLoop& loop) : threads_(loop.threads()), link_(std::make_shared<Link>()) {
  link_->loop = &loop;
}

BlockingWork::~BlockingWork() {
  const std::lock_guard lock(link_->mutex);
  link_->loop = nullptr;
}

BlockingWork::Ticket BlockingWork::run(const std::string& subject, Work work) {
  const Ticket ticket = ++last_ticket_;
  waiting_.push_back({.ticket = ticket, .subject = subject, .work = std::move(work)});
  start_what_can_be();
  return ticket;
}

void BlockingWork::forget(Ticket ticket) {
  std::erase_if(waiting_, [&](const Job& job) { return job.ticket == ticket; });
}

void BlockingWork::start_what_can_be() {
  while (under_way_.size() < kThreadsMax) {
    const auto next =
        std::ranges::find_if(waiting_, [&](const Job& job) { return !under_way_.contains(job.subject); });
    if (next == waiting_.end()) return;
    Job job = std::move(*next);
    waiting_.erase(next);
    start(std::move(job));
  }
}

void BlockingWork::start(Job job) {
  under_way_.insert(job.subject);
  const auto shared = std::make_shared<Job>(std::move(job));
  const auto run = [this, link = link_, shared] {
    Finish finish = shared->work();
    shared->work = nullptr;
    const std::lock_guard lock(link->mutex);
    if (link->loop == nullptr) return;
    link->loop->post([this, shared, finish = std::move(finish)] { ended(shared->subject, finish); });
  };
  if (!threads_.start_detached(run)) run();
}

void BlockingWork::ended(const std::string& subject, const Finish& finish) {
  under_way_.erase(subject);
  start_what_can_be();
  finish();
}

}  // namespace uffdkit
