#include "engine/store_lane.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "base/signals_blocked.h"

namespace uffdkit {
namespace {

constexpr std::chrono::seconds kIdleTime{5};
// Threads that may read what nobody waits for, so that one is there for who does.
constexpr unsigned kUnaskedThreadsMax = StoreLane::kThreadsMax / 2;
// And such reads that wait for one.
constexpr std::size_t kUnaskedQueuedMax = 32;

struct Job {
  std::unique_ptr<Fetch> fetch;
  std::weak_ptr<FetchSink> sink;
};

}  // namespace

struct StoreLane::Shared {
  explicit Shared(ReadRetries how) : retries(how) {}

  // With `mutex` held: the most urgent job that may be begun now, if there is one.
  std::optional<Job> take() {
    for (std::deque<Job>& queue : queues) {
      const bool asked = &queue == queues.data();
      if (queue.empty() || (!asked && unasked == kUnaskedThreadsMax)) continue;
      if (!asked) ++unasked;
      Job job = std::move(queue.front());
      queue.pop_front();
      return job;
    }
    return std::nullopt;
  }
  bool may_begin() const {
    const bool waits = !queues[1].empty() || !queues[2].empty();
    return !queues[0].empty() || (waits && unasked < kUnaskedThreadsMax);
  }
  void push(Job job) { queues[static_cast<std::size_t>(job.fetch->urgency)].push_back(std::move(job)); }

  // Queues what is due, with `mutex` held; says when to look again.
  std::chrono::steady_clock::time_point queue_what_is_due() {
    const auto now = std::chrono::steady_clock::now();
    while (!later.empty() && later.begin()->first <= now) {
      push(std::move(later.begin()->second));
      later.erase(later.begin());
    }
    return later.empty() ? now + kIdleTime : std::min(later.begin()->first, now + kIdleTime);
  }

  const ReadRetries retries;
  std::mutex mutex;
  std::condition_variable work;
  std::array<std::deque<Job>, 3> queues;                            // by Urgency
  std::multimap<std::chrono::steady_clock::time_point, Job> later;  // to be tried again
  unsigned threads = 0;
  unsigned idle = 0;
  unsigned unasked = 0;  // threads that read what no fault waits for
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
  for (auto& queue : shared_->queues) queue.clear();
  shared_->later.clear();
  shared_->work.notify_all();
}

void StoreLane::submit(std::unique_ptr<Fetch> fetch, std::weak_ptr<FetchSink> sink) {
  bool start = false;
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->push({std::move(fetch), std::move(sink)});
    std::size_t waiting = 0;
    for (const auto& queue : shared_->queues) waiting += queue.size();
    start = shared_->idle < waiting && shared_->threads < kThreadsMax;
    if (start) ++shared_->threads;
  }
  // Without a further thread the work waits for one of those that are there.
  if (!start || !start_thread(shared_)) shared_->work.notify_one();
}

bool StoreLane::takes_unasked() const {
  const std::lock_guard lock(shared_->mutex);
  return shared_->queues[1].size() + shared_->queues[2].size() < kUnaskedQueuedMax;
}

void StoreLane::run(std::shared_ptr<Shared> shared) {
  std::unique_lock lock(shared->mutex);
  while (!shared->closed) {
    const auto look_again = shared->queue_what_is_due();
    std::optional<Job> taken = shared->take();
    if (!taken) {
      ++shared->idle;
      const bool woken =
          shared->work.wait_until(lock, look_again, [&] { return shared->closed || shared->may_begin(); });
      --shared->idle;
      if (!woken && shared->threads > 1 && shared->later.empty()) break;
      continue;
    }
    Job job = *std::move(taken);
    lock.unlock();
    Fetch& fetch = *job.fetch;
    if (fetch.urgency != Urgency::demand) {
      // What cannot be read now is tried again when somebody asks for it.
      read_fetch(fetch);
      if (const auto sink = job.sink.lock()) sink->fetched(std::move(job.fetch));
      job = {};
      lock.lock();
      --shared->unasked;
      continue;
    }
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
