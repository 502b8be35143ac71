#include "engine/engine.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <deque>
#include <mutex>
#include <set>
#include <thread>
#include <unordered_map>
#include <utility>

#include "base/step.h"
#include "engine/actor.h"
#include "engine/target_watch.h"

namespace uffdkit {
namespace {

// What cannot be done without a thread.
constexpr const char* kStartThread = "start a thread of the engine";
// How often the supervisor looks, and after how many looks at which nothing has happened it sleeps.
constexpr std::int64_t kSampleNs = 20'000'000;
constexpr int kQuietSamples = 10;
// Beyond this, clients that hold workers up hold up each other.
constexpr std::size_t kWorkersMax = 64;
constexpr std::size_t kScratchBytes = kFetchGranulesMax * 4096;
// How long a command waits for a client that changes its address space without a pause.
constexpr std::int64_t kCommandRetriesNs = 2'000'000'000;
// How many clients' memory a worker looks at before it looks for faults: some tens of microseconds.
constexpr std::size_t kTargetsAtOnce = 16;

// What an epoll event is about: in the two lowest bits of its data, with the session's number above.
enum class Source : std::uint64_t { uffd, process, queue, timer };

std::uint64_t event_data(Source source, SessionId session) {
  return session << 2 | static_cast<std::uint64_t>(source);
}

// Memory of a worker's own, made at the start and locked where that is allowed, so that serving a fault takes
// none.
class Scratch {
 public:
  static Result<std::unique_ptr<Scratch>> make() {
    void* memory = ::mmap(nullptr, kScratchBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    if (memory == MAP_FAILED) return Failure(Error::from_errno("map a worker's memory", errno));
    (void)::mlock(memory, kScratchBytes);
    return std::unique_ptr<Scratch>(new Scratch(memory));
  }
  ~Scratch() { ::munmap(memory_, kScratchBytes); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  std::span<std::byte> bytes() const { return {static_cast<std::byte*>(memory_), kScratchBytes}; }

 private:
  explicit Scratch(void* memory) : memory_(memory) {}
  void* memory_;
};

// The caller has it run; false: it has ended.
bool check_target(Actor& actor) {
  return actor.post([](Session& served) { return served.check_target(), true; });
}

Error no_such_session(SessionId session) {
  return Error(fmt::format("there is no session {}", session), ESRCH);
}

}  // namespace

// What the workers share. Kept alive by its engine only; workers are joined before it goes.
class Engine::Shared final : public ActorScheduler {
 public:
  Shared(const EngineOptions& options, EngineListener& listener)
      : options_(options), listener_(listener), last_session_(options.last_session) {}

  Result<void> start();
  void stop();

  Result<SessionId> attach(Attachment attachment);
  // Runs `run` on the session and hands what it gives to `done`. `run` may answer EAGAIN for a while.
  template <class T>
  void command(SessionId session, std::function<Result<T>(Session&)> run,
               std::function<void(Result<T>)> done);
  std::shared_ptr<Actor> find(SessionId session);
  std::vector<SessionStatus> statuses();

  // ActorScheduler
  void schedule(SessionId session) override;
  void schedule_at(SessionId session, std::int64_t when_ns) override;
  bool arm(SessionId session, int uffd) override;
  bool others_wait() override;
  void serves(SessionId session, std::int64_t when_ns) override;
  bool others_served(SessionId session, std::int64_t since_ns) override;
  bool give_way() override;
  bool look_again(std::int64_t last_fault_ns) override;
  void ended(SessionId session) override;
  Result<SessionId> forked(SessionId parent, ForkedSession& child) override;
  void begin(SessionId child) override;

 private:
  Result<void> admit(SessionId id, const std::shared_ptr<Actor>& actor, bool must_be_watched);
  // The client's memory is looked at from time to time from now on.
  void watch_target(SessionId id, const Actor& actor);
  void exit_was_told(SessionId id);
  SessionId next_session();
  Result<void> watch(int operation, int fd, std::uint32_t events, std::uint64_t data) const;
  struct Worker {
    std::unique_ptr<Scratch> scratch;
    std::atomic<std::uint32_t> turns{0};  // odd while it serves an event
    Thread thread;
  };
  // Under supervisor_mutex_, or before there is a supervisor.
  Result<void> start_worker();
  void work(Worker& worker);
  void supervise();
  void wake_supervisor();
  // Waits for an event, and serves it.
  void serve_event(Worker& worker);
  void run_queued(const Scratch& scratch);
  void run_what_is_due(const Scratch& scratch);
  // Looks whether the client's memory is still there. A client may hold up who looks.
  void look_at_target(SessionId id);
  // To the first of all times, with timer_mutex_ held.
  void set_timer();

  const EngineOptions options_;
  const Threads threads_ = options_.threads;
  EngineListener& listener_;

  UniqueFd epoll_;
  UniqueFd queued_;        // an eventfd that counts what is in queue_
  Timer timer_{threads_};  // fires when the first of due_ and targets_ is due
  std::atomic<bool> stopping_{false};
  std::vector<std::unique_ptr<Worker>> workers_;

  std::mutex supervisor_mutex_;
  Condition supervisor_wakeup_{threads_};
  std::atomic<bool> supervisor_asleep_{false};
  Thread supervisor_;

  std::mutex sessions_mutex_;
  std::unordered_map<SessionId, std::shared_ptr<Actor>> sessions_;
  std::atomic<std::size_t> sessions_count_{0};  // to be read without the mutex
  SessionId last_session_ = 0;

  // When a fault was last served of the sessions of this number, modulo the size.
  std::array<std::atomic<std::int64_t>, 16> served_at_ns_{};

  std::mutex queue_mutex_;
  std::deque<SessionId> queue_;

  std::mutex timer_mutex_;
  std::set<std::pair<std::int64_t, SessionId>> due_;
  std::unordered_map<SessionId, std::int64_t> due_of_;  // the same by session
  TargetWatch targets_;
  std::int64_t timer_at_ns_ = 0;  // what timer_ was set to; 0: it has fired
};

// ---- threads ----------------------------------------------------------------------------------------------

Result<void> Engine::Shared::start() {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  queued_.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK | EFD_SEMAPHORE));
  if (!epoll_ || !queued_ || timer_.fd() < 0)
    return Failure(Error::from_errno("create the engine's descriptors", errno));
  if (auto ok = watch(EPOLL_CTL_ADD, queued_.get(), EPOLLIN, event_data(Source::queue, 0)); !ok) return ok;
  if (auto ok = watch(EPOLL_CTL_ADD, timer_.fd(), EPOLLIN | EPOLLET, event_data(Source::timer, 0)); !ok)
    return ok;

  const unsigned count =
      options_.workers != 0 ? options_.workers : std::max(2u, std::thread::hardware_concurrency());
  for (unsigned i = 0; i < count; ++i)
    if (auto started = start_worker(); !started) return started;
  Result<Thread> supervisor = threads_.start(kStartThread, [this] { supervise(); });
  if (!supervisor) return Failure(std::move(supervisor).error());
  supervisor_ = std::move(*supervisor);
  return {};
}

Result<void> Engine::Shared::start_worker() {
  Result<std::unique_ptr<Scratch>> scratch = Scratch::make();
  if (!scratch) return Failure(std::move(scratch).error());
  auto worker = std::make_unique<Worker>();
  worker->scratch = std::move(*scratch);
  Result<Thread> thread = threads_.start(kStartThread, [this, own = worker.get()] { work(*own); });
  if (!thread) return Failure(std::move(thread).error());
  worker->thread = std::move(*thread);
  workers_.push_back(std::move(worker));
  return {};
}

// A call into the kernel for one client can last: its memory cgroup reclaims in our thread, its page table
// lock is held. When every worker is held up so, the other clients get another worker.
void Engine::Shared::supervise() {
  std::vector<std::uint32_t> seen;
  int quiet = 0;
  std::unique_lock lock(supervisor_mutex_);
  while (!stopping_.load()) {
    bool changed = seen.size() != workers_.size();
    bool all_held_up = !changed;
    seen.resize(workers_.size());
    for (std::size_t i = 0; i < workers_.size(); ++i) {
      const std::uint32_t turns = workers_[i]->turns.load();
      changed = changed || turns != seen[i];
      all_held_up = all_held_up && turns == seen[i] && turns % 2 == 1;
      seen[i] = turns;
    }
    // Without a further thread the others wait until one of these goes on.
    if (all_held_up && workers_.size() < kWorkersMax) (void)start_worker();
    quiet = changed || all_held_up ? 0 : quiet + 1;
    if (quiet < kQuietSamples) {
      supervisor_wakeup_.wait_until(lock, threads_.now_ns() + kSampleNs);
      continue;
    }
    // Nothing happens: no more samples until something does. A worker that began before it could see that
    // nobody watches is seen here.
    supervisor_asleep_.store(true);
    const auto began = [&] {
      for (std::size_t i = 0; i < workers_.size(); ++i)
        if (workers_[i]->turns.load() != seen[i]) return true;
      return false;
    };
    if (!began())
      supervisor_wakeup_.wait(lock, [&] { return !supervisor_asleep_.load() || stopping_.load(); });
    supervisor_asleep_.store(false);
    quiet = 0;
  }
}

void Engine::Shared::wake_supervisor() {
  {
    const std::lock_guard lock(supervisor_mutex_);
    supervisor_asleep_.store(false);
  }
  supervisor_wakeup_.notify_one();
}

void Engine::Shared::stop() {
  stopping_.store(true);
  if (supervisor_.joinable()) {
    wake_supervisor();
    supervisor_.join();
  }
  // Never read when stopping, so that every worker sees it.
  const std::uint64_t many = 1u << 20;
  (void)::write(queued_.get(), &many, sizeof many);
  workers_.clear();
  std::unordered_map<SessionId, std::shared_ptr<Actor>> sessions;
  {
    const std::lock_guard lock(sessions_mutex_);
    sessions.swap(sessions_);
  }
  // A store that answers only now may hold an actor still.
  for (const auto& [id, actor] : sessions) actor->stop();
}

void Engine::Shared::work(Worker& worker) {
  while (!stopping_.load(std::memory_order_relaxed)) serve_event(worker);
}

void Engine::Shared::serve_event(Worker& worker) {
  epoll_event event;
  if (threads_.wait(epoll_.get(), event, -1) != 1 || stopping_.load(std::memory_order_relaxed)) return;
  const std::uint32_t turns = worker.turns.load(std::memory_order_relaxed);
  worker.turns.store(turns + 1);
  if (supervisor_asleep_.load()) wake_supervisor();
  const SessionId session = event.data.u64 >> 2;
  switch (static_cast<Source>(event.data.u64 & 3)) {
    case Source::queue:
      run_queued(*worker.scratch);
      break;
    case Source::timer:
      run_what_is_due(*worker.scratch);
      break;
    case Source::uffd:
      if (const auto actor = find(session)) {
        actor->disarmed();
        actor->run(worker.scratch->bytes());
      }
      break;
    case Source::process:
      if (const auto actor = find(session)) {
        exit_was_told(session);
        check_target(*actor);
        actor->run(worker.scratch->bytes());
      }
      break;
  }
  worker.turns.store(turns + 2, std::memory_order_relaxed);
}

void Engine::Shared::run_queued(const Scratch& scratch) {
  std::uint64_t one = 0;
  if (::read(queued_.get(), &one, sizeof one) != sizeof one) return;  // another worker took it
  std::shared_ptr<Actor> actor;
  {
    const std::lock_guard lock(queue_mutex_);
    if (queue_.empty()) return;
    const SessionId session = queue_.front();
    queue_.pop_front();
    actor = find(session);
  }
  if (actor) actor->run(scratch.bytes());
}

void Engine::Shared::run_what_is_due(const Scratch& scratch) {
  timer_.clear();
  std::vector<SessionId> now_due;
  std::vector<SessionId> targets;
  {
    const std::lock_guard lock(timer_mutex_);
    timer_at_ns_ = 0;
    const std::int64_t now = threads_.now_ns();
    while (!due_.empty() && due_.begin()->first <= now) {
      now_due.push_back(due_.begin()->second);
      due_of_.erase(due_.begin()->second);
      due_.erase(due_.begin());
    }
    targets = targets_.take_due(now, kTargetsAtOnce);
    set_timer();
  }
  std::shared_ptr<Actor> own;
  for (const SessionId session : now_due) {
    const auto actor = find(session);
    if (!actor) continue;
    actor->timer_fired();
    // One is run here, the others by whoever has time.
    if (own)
      schedule(session);
    else
      own = actor;
  }
  if (own) own->run(scratch.bytes());
  for (const SessionId session : targets) look_at_target(session);
}

void Engine::Shared::look_at_target(SessionId id) {
  const auto actor = find(id);
  if (!actor) return;
  if (actor->target_alive()) {
    const std::lock_guard lock(timer_mutex_);
    targets_.is_there(id, actor->faults(), threads_.now_ns());
    set_timer();
  } else if (check_target(*actor)) {
    schedule(id);
  }
}

void Engine::Shared::set_timer() {
  std::int64_t first = targets_.next_ns();
  if (!due_.empty() && (first == 0 || due_.begin()->first < first)) first = due_.begin()->first;
  if (first == 0 || first == timer_at_ns_) return;
  timer_at_ns_ = first;
  timer_.set(first);
}

// ---- ActorScheduler ---------------------------------------------------------------------------------------

Result<void> Engine::Shared::watch(int operation, int fd, std::uint32_t events, std::uint64_t data) const {
  epoll_event event{};
  event.events = events;
  event.data.u64 = data;
  if (::epoll_ctl(epoll_.get(), operation, fd, &event) < 0)
    return Failure(Error::from_errno("watch a descriptor", errno));
  return {};
}

void Engine::Shared::schedule(SessionId session) {
  {
    const std::lock_guard lock(queue_mutex_);
    queue_.push_back(session);
  }
  const std::uint64_t one = 1;
  (void)::write(queued_.get(), &one, sizeof one);
}

void Engine::Shared::schedule_at(SessionId session, std::int64_t when_ns) {
  const std::lock_guard lock(timer_mutex_);
  const auto known = due_of_.find(session);
  if (known != due_of_.end()) {
    // One time for each session, the earliest that it asked for: when that comes, it asks again.
    if (known->second <= when_ns) return;
    due_.erase({known->second, session});
  }
  due_of_[session] = when_ns;
  due_.emplace(when_ns, session);
  set_timer();
}

bool Engine::Shared::arm(SessionId session, int uffd) {
  // The set has held the descriptor since the session was admitted, unless there was no kernel memory for
  // that.
  const std::uint64_t data = event_data(Source::uffd, session);
  return watch(EPOLL_CTL_MOD, uffd, EPOLLIN | EPOLLONESHOT, data).has_value() ||
         watch(EPOLL_CTL_ADD, uffd, EPOLLIN | EPOLLONESHOT, data).has_value();
}

bool Engine::Shared::give_way() {
  if (options_.spin_ns == 0) return false;
  threads_.yield();
  return true;
}

bool Engine::Shared::look_again(std::int64_t last_fault_ns) {
  if (options_.spin_ns == 0 || threads_.now_ns() - last_fault_ns >= options_.spin_ns) return false;
  // The thread that has the next fault may be waiting for this CPU.
  threads_.yield();
  // Whatever else there is to do comes first.
  return !others_wait();
}

bool Engine::Shared::others_wait() {
  if (sessions_count_.load(std::memory_order_relaxed) < 2) return false;
  pollfd events{.fd = epoll_.get(), .events = POLLIN, .revents = 0};
  return ::poll(&events, 1, 0) != 0;
}

void Engine::Shared::serves(SessionId session, std::int64_t when_ns) {
  if (sessions_count_.load(std::memory_order_relaxed) < 2) return;
  served_at_ns_[session % served_at_ns_.size()].store(when_ns, std::memory_order_relaxed);
}

bool Engine::Shared::others_served(SessionId session, std::int64_t since_ns) {
  for (std::size_t i = 0; i < served_at_ns_.size(); ++i)
    if (i != session % served_at_ns_.size() && served_at_ns_[i].load(std::memory_order_relaxed) >= since_ns)
      return true;
  return false;
}

void Engine::Shared::ended(SessionId session) {
  std::shared_ptr<Actor> actor;
  const std::lock_guard lock(sessions_mutex_);
  const auto found = sessions_.find(session);
  if (found == sessions_.end()) return;
  actor = std::move(found->second);
  sessions_.erase(found);
  sessions_count_.store(sessions_.size(), std::memory_order_relaxed);
  {
    const std::lock_guard timer_lock(timer_mutex_);
    targets_.remove(session);
  }
  // Other holders of the descriptors may keep them open, so closing ours does not take them out of the set.
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, actor->uffd(), nullptr);
  if (actor->process() >= 0) (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, actor->process(), nullptr);
}

// ---- sessions ---------------------------------------------------------------------------------------------

std::shared_ptr<Actor> Engine::Shared::find(SessionId session) {
  const std::lock_guard lock(sessions_mutex_);
  const auto found = sessions_.find(session);
  return found == sessions_.end() ? nullptr : found->second;
}

Result<SessionId> Engine::Shared::attach(Attachment attachment) {
  for (const RegionRecord& region : attachment.state.regions()) {
    if (!region.live) continue;
    const std::uint64_t size = attachment.lane ? attachment.lane->store()->size().value : 0;
    if (region.offset.value > size || region.length.value > size - region.offset.value)
      return Failure(Error(fmt::format("the session needs {} bytes from offset {} of its image, which has {}",
                                       region.length.value, region.offset.value, size),
                           ESTALE));
  }
  const bool taken_up = !attachment.state.layout().segments().empty();
  const SessionId id = attachment.id != 0 ? attachment.id : next_session();
  std::vector<std::shared_ptr<StoreLane>> lanes;
  for (const RegionRecord& region : attachment.state.regions())
    lanes.push_back(region.live ? attachment.lane : nullptr);
  auto actor = std::make_shared<Actor>(id, attachment.parent, std::move(attachment.uffd),
                                       std::move(attachment.state), std::move(lanes), options_.session,
                                       std::move(attachment.process), *this, listener_, threads_);
  // Nobody runs it yet, so the commands are done before the first fault is read.
  std::optional<Error> refused;
  actor->post([&](Session& session) {
    if (attachment.shared) session.share_all(attachment.shared);
    if (taken_up)
      session.apply_inbox([&](int fd) { return attachment.may_adopt && attachment.may_adopt(fd); });
    // Workers that live for less than the time between two looks would keep the dead for ever.
    if (taken_up) session.check_target();
    for (const RegionSpec& region : attachment.regions) {
      if (refused) return true;
      if (auto added = session.add_region(region.memory, region.offset, region.page_size, attachment.lane,
                                          region.tag, region.sharing);
          !added)
        refused = added.error();
    }
    if (attachment.record) session.record(attachment.record, attachment.lane);
    if (attachment.record && taken_up) session.record_what_is_there();
    if (attachment.prefetch) session.prefetch(attachment.prefetch, attachment.lane, id);
    if (taken_up) session.wake_all();
    return true;
  });
  actor->prepare();
  if (refused) return Failure(*std::move(refused));
  step();
  SessionCounters* counters = attachment.counters;
  if (attachment.begins) {
    const Result<SessionCounters*> begun = attachment.begins(id);
    if (!begun) return Failure(begun.error());
    counters = *begun;
  }
  if (counters != nullptr) actor->count_in(counters);
  // One that had its number before is not given up: it is watched when there is memory for that.
  const bool is_new = attachment.id == 0;
  if (auto admitted = admit(id, actor, is_new); !admitted) return Failure(std::move(admitted).error());
  return id;
}

SessionId Engine::Shared::next_session() {
  const std::lock_guard lock(sessions_mutex_);
  return ++last_session_;
}

Result<void> Engine::Shared::admit(SessionId id, const std::shared_ptr<Actor>& actor, bool must_be_watched) {
  {
    const std::lock_guard lock(sessions_mutex_);
    sessions_.emplace(id, actor);
    sessions_count_.store(sessions_.size(), std::memory_order_relaxed);
  }
  watch_target(id, *actor);
  // Not armed yet: the first run arms it.
  Result<void> watched = watch(EPOLL_CTL_ADD, actor->uffd(), 0, event_data(Source::uffd, id));
  if (watched && actor->process() >= 0)
    watched = watch(EPOLL_CTL_ADD, actor->process(), EPOLLIN | EPOLLONESHOT, event_data(Source::process, id));
  if (!watched && must_be_watched) {
    ended(id);
    return watched;
  }
  if (!watched) exit_was_told(id);  // nobody will tell
  schedule(id);
  return {};
}

void Engine::Shared::watch_target(SessionId id, const Actor& actor) {
  const std::lock_guard lock(timer_mutex_);
  targets_.add(id, actor.process() >= 0, threads_.now_ns());
  set_timer();
}

void Engine::Shared::exit_was_told(SessionId id) {
  const std::lock_guard lock(timer_mutex_);
  targets_.exit_was_told(id, threads_.now_ns());
  set_timer();
}

Result<SessionId> Engine::Shared::forked(SessionId parent, ForkedSession& child) {
  const SessionId id = next_session();
  const Result<SessionCounters*> counters =
      listener_.session_forks(parent, id, {.uffd = child.uffd.fd(), .state_file = child.state.fd()});
  if (!counters) return Failure(counters.error());
  auto actor = std::make_shared<Actor>(id, parent, std::move(child.uffd), std::move(child.state),
                                       std::move(child.lanes), options_.session, std::nullopt, *this,
                                       listener_, threads_);
  actor->post([&child](Session& session) {
    session.share(child.shared);
    return true;
  });
  actor->prepare();
  if (*counters != nullptr) actor->count_in(*counters);
  actor->hold();
  {
    const std::lock_guard lock(sessions_mutex_);
    sessions_.emplace(id, actor);
    sessions_count_.store(sessions_.size(), std::memory_order_relaxed);
  }
  // Whoever hears of it may ask something of it at once; nobody else runs it yet, so its end comes later.
  step();
  listener_.session_forked(actor->status());
  return id;
}

void Engine::Shared::begin(SessionId child) {
  const std::shared_ptr<Actor> actor = find(child);
  if (!actor) return;
  watch_target(child, *actor);
  actor->begin();
  // Its first run arms its descriptor.
  schedule(child);
}

template <class T>
void Engine::Shared::command(SessionId session, std::function<Result<T>(Session&)> run,
                             std::function<void(Result<T>)> done) {
  const std::shared_ptr<Actor> actor = find(session);
  const std::int64_t give_up_ns = threads_.now_ns() + kCommandRetriesNs;
  // Told here if there is nobody to run it.
  const auto tell = std::make_shared<const std::function<void(Result<T>)>>(std::move(done));
  const bool posted =
      actor && actor->post([=, this, runner = actor.get(), run = std::move(run)](Session& served) {
        Result<T> result = served.end() ? Failure(no_such_session(session)) : run(served);
        if (!result && result.error().os_error() == EAGAIN && threads_.now_ns() < give_up_ns) return false;
        // Whoever is told looks at the status next.
        runner->update_shape();
        (*tell)(std::move(result));
        return true;
      });
  if (!posted) return (*tell)(Failure(no_such_session(session)));
  schedule(session);
}

std::vector<SessionStatus> Engine::Shared::statuses() {
  std::vector<std::shared_ptr<Actor>> actors;
  {
    const std::lock_guard lock(sessions_mutex_);
    for (const auto& [id, actor] : sessions_) actors.push_back(actor);
  }
  std::vector<SessionStatus> statuses;
  statuses.reserve(actors.size());
  for (const auto& actor : actors) statuses.push_back(actor->status());
  std::sort(statuses.begin(), statuses.end(), [](const auto& a, const auto& b) { return a.id < b.id; });
  return statuses;
}

// ---- Engine -----------------------------------------------------------------------------------------------

Engine::Engine(std::shared_ptr<Shared> shared) : shared_(std::move(shared)) {}

Engine::~Engine() {
  shared_->stop();
}

Result<std::unique_ptr<Engine>> Engine::create(const EngineOptions& options, EngineListener& listener) {
  const std::uint64_t around = options.session.fault_around.value;
  if (!std::has_single_bit(around) || around > kFetchGranulesMax)
    return Failure(
        Error(fmt::format("fault_around is {}, not a power of two from 1 to {}", around, kFetchGranulesMax),
              EINVAL));
  std::unique_ptr<Engine> engine(new Engine(std::make_shared<Shared>(options, listener)));
  if (auto started = engine->shared_->start(); !started) return Failure(std::move(started).error());
  return engine;
}

Result<SessionId> Engine::attach(Attachment attachment) {
  return shared_->attach(std::move(attachment));
}

void Engine::add_region(SessionId session, const RegionSpec& region, std::shared_ptr<StoreLane> lane,
                        Done done) {
  const auto run = [region, lane = std::move(lane)](Session& served) -> Result<void> {
    if (served.is_changing())
      return Failure(Error("the client changes its address space without a pause", EAGAIN)
                         .with_remedy("map and unmap less while a region is added"));
    return served.add_region(region.memory, region.offset, region.page_size, lane, region.tag,
                             region.sharing);
  };
  shared_->command<void>(session, run, std::move(done));
}

void Engine::drop(SessionId session, AddressRange memory, Done done) {
  shared_->command<void>(session, [memory](Session& served) { return served.drop(memory); }, std::move(done));
}

void Engine::drop_tagged(SessionId session, RegionTag tag, Dropped done) {
  shared_->command<std::vector<AddressRange>>(
      session, [tag](Session& served) { return served.drop_tagged(tag); }, std::move(done));
}

void Engine::begin_detach(SessionId session, Unreadable unreadable, Done done) {
  shared_->command<void>(
      session,
      [unreadable](Session& served) -> Result<void> {
        return served.begin_detach(unreadable), Result<void>();
      },
      std::move(done));
}

void Engine::release(SessionId session, Done done) {
  shared_->command<void>(
      session, [](Session& served) -> Result<void> { return served.release(), Result<void>(); },
      std::move(done));
}

void Engine::abandon(SessionId session, Done done) {
  shared_->command<void>(
      session, [](Session& served) -> Result<void> { return served.abandon(), Result<void>(); },
      std::move(done));
}

void Engine::resume(SessionId session, Done done) {
  shared_->command<void>(
      session, [](Session& served) -> Result<void> { return served.resume(), Result<void>(); },
      std::move(done));
}

void Engine::kill(SessionId session, const std::string& why, Done done) {
  shared_->command<void>(
      session, [why](Session& served) -> Result<void> { return served.fail(why), Result<void>(); },
      std::move(done));
}

Result<UniqueFd> Engine::state_file(SessionId session) {
  const std::shared_ptr<Actor> actor = shared_->find(session);
  if (!actor) return Failure(no_such_session(session));
  UniqueFd file(::open(fmt::format("/proc/self/fd/{}", actor->state_file()).c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return Failure(Error::from_errno("reopen a session's state file", errno));
  return file;
}

std::vector<SessionStatus> Engine::sessions() {
  return shared_->statuses();
}

std::optional<SessionStatus> Engine::session(SessionId session) {
  const std::shared_ptr<Actor> actor = shared_->find(session);
  if (!actor) return std::nullopt;
  return actor->status();
}

}  // namespace uffdkit
