#include "engine/store_lane.h"

#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
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
  std::mutex mutex;
  std::condition_variable work;
  std::deque<Job> queue;
  unsigned threads = 0;
  unsigned idle = 0;
  bool closed = false;
};

StoreLane::StoreLane(std::shared_ptr<Store> store)
    : store_(std::move(store)), shared_(std::make_shared<Shared>()) {}

Result<std::shared_ptr<StoreLane>> StoreLane::create(std::shared_ptr<Store> store) {
  std::shared_ptr<StoreLane> lane(new StoreLane(std::move(store)));
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
    if (shared->queue.empty()) {
      ++shared->idle;
      const bool woken =
          shared->work.wait_for(lock, kIdleTime, [&] { return shared->closed || !shared->queue.empty(); });
      --shared->idle;
      if (!woken && shared->threads > 1) break;
      continue;
    }
    Job job = std::move(shared->queue.front());
    shared->queue.pop_front();
    lock.unlock();
    read_fetch(*job.fetch);
    if (const auto sink = job.sink.lock()) sink->fetched(std::move(job.fetch));
    job = {};
    lock.lock();
  }
  --shared->threads;
}

}  // namespace uffdkit
