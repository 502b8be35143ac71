#include "engine/store_lane.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

namespace uffdkit {
namespace {

constexpr std::int64_t kIdleNs = 5'000'000'000;
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
  Shared(ReadRetries how, Threads runner) : retries(how), run_by(runner) {}

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
  // Likewise: a piece of work, if there is nothing to read.
  std::shared_ptr<IdleWork> take_work() {
    while (may_work()) {
      std::shared_ptr<IdleWork> next = work_when_idle.front().lock();
      work_when_idle.pop_front();
      if (next) return next;
    }
    return nullptr;
  }
  bool may_work() const {
    return !work_when_idle.empty() && !works &&
           std::ranges::all_of(queues, [](const auto& queue) { return queue.empty(); });
  }
  bool may_begin() const {
    if (may_work()) return true;
    const bool waits = !queues[1].empty() || !queues[2].empty();
    return !queues[0].empty() || (waits && unasked < kUnaskedThreadsMax);
  }
  void push(Job job) { queues[static_cast<std::size_t>(job.fetch->urgency)].push_back(std::move(job)); }

  // Queues what is due, with `mutex` held; says when to look again.
  std::int64_t queue_what_is_due() {
    const std::int64_t now = run_by.now_ns();
    while (!later.empty() && later.begin()->first <= now) {
      push(std::move(later.begin()->second));
      later.erase(later.begin());
    }
    return later.empty() ? now + kIdleNs : std::min(later.begin()->first, now + kIdleNs);
  }

  const ReadRetries retries;
  const Threads run_by;
  std::mutex mutex;
  Condition work{run_by};
  std::array<std::deque<Job>, 3> queues;   // by Urgency
  std::multimap<std::int64_t, Job> later;  // to be tried again, by when
  unsigned threads = 0;
  unsigned idle = 0;
  unsigned unasked = 0;  // threads that read what no fault waits for
  std::deque<std::weak_ptr<IdleWork>> work_when_idle;
  bool works = false;  // a thread does a piece of it
  bool closed = false;
};

StoreLane::StoreLane(std::shared_ptr<Store> store, ReadRetries retries, UniqueFd file, Threads threads)
    : store_(std::move(store)), file_(std::move(file)), shared_(std::make_shared<Shared>(retries, threads)) {}

Result<std::shared_ptr<StoreLane>> StoreLane::create(std::shared_ptr<Store> store, ReadRetries retries,
                                                     UniqueFd file, Threads threads) {
  std::shared_ptr<StoreLane> lane(new StoreLane(std::move(store), retries, std::move(file), threads));
  lane->shared_->threads = 1;
  if (!start_thread(lane->shared_))
    return Failure(Error("cannot start a thread for " + lane->store_->name(), EAGAIN)
                       .with_remedy("raise the limit on threads (ulimit -u, TasksMax=)"));
  return lane;
}

bool StoreLane::start_thread(const std::shared_ptr<Shared>& shared) {
  if (shared->run_by.start_detached([shared] { run(shared); })) return true;
  const std::lock_guard lock(shared->mutex);
  --shared->threads;
  return false;
}

StoreLane::~StoreLane() {
  const std::lock_guard lock(shared_->mutex);
  shared_->closed = true;
  for (auto& queue : shared_->queues) queue.clear();
  shared_->later.clear();
  shared_->work_when_idle.clear();
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

void StoreLane::when_idle(std::weak_ptr<IdleWork> work) {
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->work_when_idle.push_back(std::move(work));
  }
  shared_->work.notify_one();
}

void StoreLane::run(std::shared_ptr<Shared> shared) {
  std::unique_lock lock(shared->mutex);
  while (!shared->closed) {
    const std::int64_t look_again = shared->queue_what_is_due();
    std::optional<Job> taken = shared->take();
    if (std::shared_ptr<IdleWork> work = taken ? nullptr : shared->take_work()) {
      shared->works = true;
      lock.unlock();
      work->work_a_piece();
      work.reset();
      lock.lock();
      shared->works = false;
      continue;
    }
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
      const std::chrono::nanoseconds pause =
          shared->retries.first_pause * (1u << (2 * std::min(fetch.retries, 8u)));
      lock.lock();
      if (!shared->closed) shared->later.emplace(shared->run_by.now_ns() + pause.count(), std::move(job));
      continue;
    }
    if (const auto sink = job.sink.lock()) sink->fetched(std::move(job.fetch));
    job = {};
    lock.lock();
  }
  --shared->threads;
}

}  // namespace uffdkit
