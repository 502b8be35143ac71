#include "engine/store_lane.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/check.h"

namespace uffdkit {
namespace {

constexpr std::int64_t kIdleNs = 5'000'000'000;
// Threads that may read what nobody waits for, so that one is there for who does.
constexpr unsigned kUnaskedThreadsMax = StoreLane::kThreadsMax / 2;
// And such reads that wait for one.
constexpr std::size_t kUnaskedQueuedMax = 32;

}  // namespace

struct StoreLane::Job {
  // Where the file is whose part it wants, if it may be read with others.
  std::optional<FilePart> part_to_read_with_others() const {
    return alone ? std::nullopt : small_part(*fetch);
  }
  // To whoever wants it, if he still exists.
  void give() {
    if (const auto to = sink.lock()) to->fetched(std::move(fetch));
    *this = {};
  }

  std::unique_ptr<Fetch> fetch;
  std::weak_ptr<FetchSink> sink;
  bool alone = false;  // with others it could not be read
};

struct StoreLane::Shared {
  Shared(ReadRetries how, Threads runner, std::shared_ptr<BatchReaders> all)
      : retries(how), run_by(runner), readers(std::move(all)) {}

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
  // Whether the job and others that wait may be read together.
  bool has_company(const Job& job) const {
    return readers && !queues[0].empty() && job.part_to_read_with_others() &&
           queues[0].front().part_to_read_with_others();
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
  const std::shared_ptr<BatchReaders> readers;
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

void StoreLane::wake_one(const std::shared_ptr<Shared>& shared) {
  bool start = false;
  {
    const std::lock_guard lock(shared->mutex);
    std::size_t waiting = 0;
    for (const auto& queue : shared->queues) waiting += queue.size();
    start = shared->idle < waiting && shared->threads < kThreadsMax;
    if (start) ++shared->threads;
  }
  // Without a further thread the work waits for one of those that are there.
  if (!start || !start_thread(shared)) shared->work.notify_one();
}

void StoreLane::read_together(const std::shared_ptr<Shared>& shared, std::unique_lock<std::mutex>& lock,
                              Job first, BatchReader& reader) {
  std::unordered_map<std::uint64_t, Job> under_way;
  std::uint64_t last_tag = 0;
  std::deque<Job>& queue = shared->queues[0];
  const auto begin = [&](Job job, FilePart part) {
    reader.begin(part, job.fetch->buffer_bytes(), ++last_tag);
    under_way.emplace(last_tag, std::move(job));
  };
  const auto begin_next = [&] {
    if (queue.empty()) return false;
    const std::optional<FilePart> part = queue.front().part_to_read_with_others();
    if (!part) return false;
    Job job = std::move(queue.front());
    queue.pop_front();
    begin(std::move(job), *part);
    return true;
  };
  const std::optional<FilePart> first_part = first.part_to_read_with_others();
  CHECK(first_part.has_value());
  begin(std::move(first), *first_part);
  while (!under_way.empty()) {
    shared->queue_what_is_due();
    while (under_way.size() < reader.most() && begin_next()) continue;
    const bool others_wait = !queue.empty();
    lock.unlock();
    // What cannot be read with these must not wait for them.
    if (others_wait) wake_one(shared);
    std::vector<Job> failed;
    for (const BatchReader::Done& done : reader.wait()) {
      Job job = std::move(under_way.extract(done.tag).mapped());
      if (done.result == static_cast<std::int64_t>(job.fetch->bytes().value))
        job.give();
      else
        failed.push_back(std::move(job));
    }
    lock.lock();
    for (Job& job : failed) {
      job.alone = true;
      queue.push_front(std::move(job));
    }
  }
}

StoreLane::StoreLane(std::shared_ptr<Store> store, UniqueFd file, std::shared_ptr<Shared> shared)
    : store_(std::move(store)), file_(std::move(file)), shared_(std::move(shared)) {}

Result<std::shared_ptr<StoreLane>> StoreLane::create(std::shared_ptr<Store> store, ReadRetries retries,
                                                     UniqueFd file, Threads threads,
                                                     std::shared_ptr<BatchReaders> readers) {
  std::shared_ptr<StoreLane> lane(new StoreLane(
      std::move(store), std::move(file), std::make_shared<Shared>(retries, threads, std::move(readers))));
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
  {
    const std::lock_guard lock(shared_->mutex);
    shared_->push({.fetch = std::move(fetch), .sink = std::move(sink)});
  }
  wake_one(shared_);
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
    if (shared->has_company(job)) {
      const BorrowedReader reader(shared->readers.get());
      if (reader) {
        read_together(shared, lock, std::move(job), *reader);
        continue;
      }
    }
    lock.unlock();
    Fetch& fetch = *job.fetch;
    if (fetch.urgency != Urgency::demand) {
      // What cannot be read now is tried again when somebody asks for it.
      read_fetch(fetch, shared->readers.get());
      job.give();
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
    job.give();
    lock.lock();
  }
  --shared->threads;
}

}  // namespace uffdkit
