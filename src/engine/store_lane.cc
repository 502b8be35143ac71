#include "engine/store_lane.h"

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>

#include "engine/signals_blocked.h"

namespace uffdkit {
namespace {

constexpr std::chrono::seconds kIdleTime{5};

struct Job {
  std::unique_ptr<Fetch> fetch;
  std::weak_ptr<FetchSink> sink;
};

}  // namespace

struct StoreLane::Shared {
  explicit Shared(ReadRetries how) : retries(how) {}

  // Queues what is due, with `mutex` held; says when to look again.
  std::chrono::steady_clock::time_point queue_what_is_due() {
    const auto now = std::chrono::steady_clock::now();
    while (!later.empty() && later.begin()->first <= now) {
      queue.push_back(std::move(later.begin()->second));
      later.erase(later.begin());
    }
    return later.empty() ? now + kIdleTime : std::min(later.begin()->first, now + kIdleTime);
  }

  const ReadRetries retries;
  std::mutex mutex;
  std::condition_variable work;
  std::deque<Job> queue;
  std::multimap<std::chrono::steady_clock::time_point, Job> later;  // to be tried again
  unsigned threads = 0;
  unsigned idle = 0;
  bool closed = false;
};

StoreLane::StoreLane(std::shared_ptr<Store> store, ReadRetries retries, UniqueFd file)
    : store_(std::move(store)), file_(std::move(file)), shared_(std::make_shared<Shared>(retries)) {}

Result<std::shared_ptr<StoreLane>> StoreLane::create(std::shared_ptr<Store> store, ReadRetries retries,
                                                     UniqueFd file) {
  std::shared_ptr<StoreLane> lane(new StoreLane(std::move(store), retries, std::move(file)));
  lane->shared_->threads = 1;
  if (!start_thread(lane->shared_))
    return Failure(Error("cannot start a thread for " + lane->store_->name(), EAGAIN)
                       .with_remedy("raise the limit on threads (ulimit -u, TasksMax=)"));
  return lane;
}

bool StoreLane::start_thread(const std::shared_ptr<Shared>& shared) {
  const SignalsBlocked blocked;
  try {
    std::thread(&StoreLane::run, shared).detach();
    return true;
  } catch (const std::system_error&) {
    const std::lock_guard lock(shared->mutex);
    --shared->threads;
    return false;
  }
}

StoreLane::~StoreLane() {
  const std::lock_guard lock(shared_->mutex);
  shared_->closed = true;
  shared_->queue.clear();
  shared_->later.clear();
  shared_->work.notify_all();
}

void StoreLane::submit(std::unique_ptr<Fetch> fetch, std::weak_ptr<FetchSink> sink) {
  bool start = false;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->queue.push_back({std::move(fetch), std::move(sink)});
    start = shared_->idle < shared_->queue.size() && shared_->threads < kThreadsMax;
    if (start) ++shared_->threads;
  }
  // Without a further thread the work waits for one of those that are there.
  if (!start || !start_thread(shared_)) shared_->work.notify_one();
}

void StoreLane::run(std::shared_ptr<Shared> shared) {
  std::unique_lock lock(shared->mutex);
  while (!shared->closed) {
    const auto look_again = shared->queue_what_is_due();
    if (shared->queue.empty()) {
      ++shared->idle;
      const bool woken =
          shared->work.wait_until(lock, look_again, [&] { return shared->closed || !shared->queue.empty(); });
      --shared->idle;
      if (!woken && shared->threads > 1 && shared->later.empty()) break;
      continue;
    }
    Job job = std::move(shared->queue.front());
    shared->queue.pop_front();
    lock.unlock();
    Fetch& fetch = *job.fetch;
    fetch.failed.any() ? read_failed_again(fetch) : read_fetch(fetch);
    if (fetch.failed.any() && fetch.retries < shared->retries.count && !job.sink.expired()) {
      const auto pause = shared->retries.first_pause * (1u << (2 * std::min(fetch.retries, 8u)));
      lock.lock();
      if (!shared->closed) shared->later.emplace(std::chrono::steady_clock::now() + pause, std::move(job));
      continue;
    }
    if (const auto sink = job.sink.lock()) sink->fetched(std::move(job.fetch));
    job = {};
    lock.lock();
  }
  --shared->threads;
}

}  // namespace uffdkit
