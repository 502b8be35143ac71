#include "engine/actor.h"

#include <signal.h>
#include <unistd.h>

#include <utility>

#include "base/process.h"

namespace uffdkit {
namespace {

// Turns in a row, then the session queues behind the others.
constexpr int kTurnsMax = 4;
// How long after its last fault a session counts as one whose client may want the CPU.
constexpr std::int64_t kNeighbourNs = 2'000'000;
// How long it looks for more faults in a row, even if nobody waits.
constexpr std::int64_t kRunMaxNs = 5'000'000;
// After so many sleeps in a row before which looking for the next fault was in vain, it is looked for before
// every kSpinAgain-th sleep only. So it is at once where the worker gave way and did not get the CPU back in
// time: on a busy CPU it waits for milliseconds then, and one that is woken does not.
constexpr unsigned kSpinMissesMax = 8;
constexpr unsigned kSpinAgain = 1024;
constexpr std::int64_t kSpinLateNs = 100'000;
// Where the scheduler lets the thread that has just been answered run at once, its next fault is there when
// the worker looks straight after the answer; where it does not, that look is in vain. After so many of these
// in a row only every kEarlyAgain-th answer is followed by one.
constexpr unsigned kEarlyMissesMax = 8;
constexpr unsigned kEarlyAgain = 16;
// When a command that was refused for now is tried again, and a descriptor that could not be armed.
constexpr std::int64_t kRetryNs = 200'000;

}  // namespace

Actor::Actor(SessionId id, SessionId parent, Uffd uffd, SessionState state,
             std::vector<std::shared_ptr<StoreLane>> lanes, SessionOptions options,
             std::optional<UniqueFd> process, ActorScheduler& scheduler, EngineListener& listener,
             Threads threads)
    : id_(id),
      parent_(parent),
      scheduler_(scheduler),
      listener_(listener),
      threads_(threads),
      process_(std::move(process)),
      session_(std::move(uffd), std::move(state), std::move(lanes), std::move(options), *this) {
  update_shape();
}

bool Actor::post(Command command) {
  const std::lock_guard lock(mailbox_mutex_);
  if (closed_) return false;
  commands_.push_back(std::move(command));
  mail_.store(true, std::memory_order_release);
  return true;
}

void Actor::fetched(std::unique_ptr<Fetch> fetch) {
  const std::lock_guard lock(mailbox_mutex_);
  if (closed_) return;
  returned_.push_back(std::move(fetch));
  mail_.store(true, std::memory_order_release);
  // Under the lock: the scheduler may be gone as soon as the mailbox can be closed.
  scheduler_.schedule(id_);
}

[[gnu::hot]] void Actor::run(std::span<std::byte> scratch) {
  RunState state = run_state_.load();
  do {
    // While somebody runs it, leave word; else become the one.
  } while (!run_state_.compare_exchange_weak(state,
                                             state == RunState::idle ? RunState::running : RunState::again));
  if (state != RunState::idle) return;

  turn_ns_ = threads_.now_ns();
  if (turn_ns_ < share_.rests_until_ns()) {
    const std::int64_t until_ns = share_.rests_until_ns();
    run_state_.store(RunState::idle);
    // Whatever it was to be run for is still there then.
    scheduler_.schedule_at(id_, until_ns);
    return;
  }
  share_.begin(turn_ns_, told());
  gives_way_ = false;
  scratch_ = scratch;
  const std::atomic<std::uint64_t>& faults = session_.counters().faults;
  std::int64_t first_fault_ns = 0;
  std::int64_t last_fault_ns = 0;
  const bool may_spin = spin_misses_ < kSpinMissesMax || ++spins_left_out_ % kSpinAgain == 0;
  bool spun = false;
  bool early = false;
  for (int turns = 1;; ++turns) {
    const std::uint64_t faults_before = faults.load(std::memory_order_relaxed);
    const bool more = turn();
    if (const std::optional<SessionEnd> end = session_.end()) {
      // Stays `running`: nobody runs it any more.
      close_mailbox();
      // The place where it was counted may be another's from then on.
      session_.count_in(nullptr);
      // Told before it is forgotten, so that what it has done is always counted somewhere.
      listener_.session_ended(status(), *end);
      scheduler_.ended(id_);
      return;
    }
    // A thread that has just been answered often faults again before this worker gets to sleep. Looking once
    // more is cheaper than an event, which would also wake another worker if the fault is there already.
    const std::uint64_t faults_now = faults.load(std::memory_order_relaxed);
    const bool came = faults_now != faults_before;
    if (std::exchange(early, false)) early_misses_ = came ? 0 : early_misses_ + 1;
    if (came) {
      const bool late = turn_ns_ - last_fault_ns > kSpinLateNs;
      if (std::exchange(spun, false)) spin_misses_ = late ? kSpinMissesMax : 0;
      last_fault_ns = turn_ns_;
      scheduler_.serves(id_, turn_ns_);
    }
    if (first_fault_ns == 0) first_fault_ns = last_fault_ns;
    const std::int64_t now_ns = threads_.now_ns();
    gives_way_ = gives_way_ || leaves_to_others(now_ns);
    const bool may_look = !gives_way_ && first_fault_ns != 0 && last_fault_ns - first_fault_ns < kRunMaxNs;
    if (!more && may_look) {
      const bool looks_early =
          came && (early_misses_ < kEarlyMissesMax || ++early_left_out_ % kEarlyAgain == 0);
      const bool spins =
          !looks_early && may_spin && (came ? scheduler_.give_way() : scheduler_.look_again(last_fault_ns));
      if (looks_early || spins) {
        early = looks_early;
        spun = spins;
        turns = 0;
        turn_ns_ = looks_early ? now_ns : threads_.now_ns();
        continue;
      }
    }
    if (spun) spin_misses_ += now_ns - last_fault_ns > kSpinLateNs ? kSpinMissesMax : 1;
    if (is_to_rest(now_ns)) {
      share_.rest(now_ns);
      const std::int64_t until_ns = share_.rests_until_ns();
      run_state_.store(RunState::idle);
      scheduler_.schedule_at(id_, until_ns);
      return;
    }
    // Where more faults are probably there already, an event would only wake another worker, for nothing.
    if (!more && !(came && gives_way_)) {
      if (reads_ && !armed_.exchange(true) && !scheduler_.arm(id_, session_.uffd().fd())) {
        // A session that is not armed hears of no fault.
        armed_.store(false);
        scheduler_.schedule_at(id_, threads_.now_ns() + kRetryNs);
      }
      share_.end(now_ns);
      RunState expected = RunState::running;
      if (run_state_.compare_exchange_strong(expected, RunState::idle)) return;
      run_state_.store(RunState::running);
      share_.begin(now_ns, told());
    }
    if (!gives_way_ && turns < kTurnsMax) {
      turn_ns_ = now_ns;
      continue;
    }
    share_.end(now_ns);
    run_state_.store(RunState::idle);
    scheduler_.schedule(id_);
    return;
  }
}

bool Actor::gives_way() {
  return gives_way_ = gives_way_ || leaves_to_others(threads_.now_ns());
}

[[gnu::hot]] bool Actor::leaves_to_others(std::int64_t now_ns) {
  if (!share_.slice_has_ended(now_ns)) return false;
  if (is_to_rest(now_ns) || scheduler_.others_wait()) return true;
  // The client of another session that has been answered may wait for this CPU.
  if (share_.has_told_events(told()) && scheduler_.others_served(id_, now_ns - kNeighbourNs) &&
      scheduler_.give_way())
    share_.begin_slice(threads_.now_ns());
  return false;
}

[[gnu::hot]] bool Actor::is_to_rest(std::int64_t now_ns) {
  return share_.floods(now_ns, told()) && scheduler_.others_served(id_, now_ns - kNeighbourNs);
}

[[gnu::hot]] FairShare::Told Actor::told() const {
  const SessionCounters& counters = session_.counters();
  return {.events = counters.events.load(std::memory_order_relaxed),
          .duplicates = counters.faults_merged.load(std::memory_order_relaxed)};
}

void Actor::prepare() {
  turn_ns_ = threads_.now_ns();
  take_mail();
  begin_children();
}

void Actor::begin_children() {
  for (const SessionId child : std::exchange(children_, {})) scheduler_.begin(child);
}

void Actor::stop() {
  session_.stop();
  close_mailbox();
}

[[gnu::hot]] void Actor::take_mail() {
  // A look is cheaper than an exchange, and there is mail for few turns only.
  if (mail_.load(std::memory_order_relaxed) && mail_.exchange(false, std::memory_order_acquire)) {
    std::vector<std::unique_ptr<Fetch>> returned;
    std::vector<Command> commands;
    {
      const std::lock_guard lock(mailbox_mutex_);
      returned.swap(returned_);
      commands.swap(commands_);
    }
    for (auto& fetch : returned) session_.fetched(std::move(fetch));
    for (Command& command : commands) commands_taken_.push_back(std::move(command));
  }
  if (!commands_taken_.empty() && commands_at_ns_ <= turn_ns_) run_commands();
}

void Actor::run_commands() {
  commands_at_ns_ = 0;
  while (!commands_taken_.empty() && !session_.end()) {
    if (!commands_taken_.front()(session_)) {
      commands_at_ns_ = threads_.now_ns() + kRetryNs;
      break;
    }
    commands_taken_.pop_front();
  }
  update_shape();
}

[[gnu::hot]] bool Actor::turn() {
  take_mail();
  const std::uint64_t events = session_.counters().events.load(std::memory_order_relaxed);
  Session::Next next = session_.step();
  if (!children_.empty()) begin_children();
  reads_ = next.reads;
  if (commands_at_ns_ != 0 && (next.wake_at_ns == 0 || commands_at_ns_ < next.wake_at_ns))
    next.wake_at_ns = commands_at_ns_;
  if (events != session_.counters().events.load(std::memory_order_relaxed)) update_shape();
  if (timer_fired_.load(std::memory_order_relaxed) && timer_fired_.exchange(false, std::memory_order_relaxed))
    wake_at_ns_ = 0;
  // The scheduler keeps the earliest time that it was told, so only an earlier one is news.
  if (next.wake_at_ns != 0 && (wake_at_ns_ == 0 || next.wake_at_ns < wake_at_ns_)) {
    scheduler_.schedule_at(id_, next.wake_at_ns);
    wake_at_ns_ = next.wake_at_ns;
  }
  return next.again || mail_.load(std::memory_order_relaxed);
}

void Actor::close_mailbox() {
  std::vector<Command> commands;
  {
    const std::lock_guard lock(mailbox_mutex_);
    closed_ = true;
    commands.swap(commands_);
    returned_.clear();
  }
  // They find the session ended.
  for (const Command& command : std::exchange(commands_taken_, {})) command(session_);
  for (const Command& command : commands) command(session_);
}

void Actor::update_shape() {
  std::uint64_t bytes = 0;
  for (const Segment& segment : session_.state().layout().segments()) bytes += segment.memory.length.value;
  std::size_t live = 0;
  for (const RegionRecord& region : session_.state().regions()) live += region.live ? 1 : 0;
  sharing_.store(session_.sharing(), std::memory_order_relaxed);
  memory_bytes_.store(bytes, std::memory_order_relaxed);
  regions_.store(live, std::memory_order_relaxed);
}

SessionStatus Actor::status() const {
  const SessionWaiting& waiting = session_.waiting();
  const std::int64_t oldest = waiting.oldest_since_ns.load(std::memory_order_relaxed);
  SessionStatus status{.id = id_,
                       .parent = parent_,
                       .sharing = sharing_.load(std::memory_order_relaxed),
                       .image = session_.state().image(),
                       .memory_bytes = memory_bytes_.load(std::memory_order_relaxed),
                       .regions = regions_.load(std::memory_order_relaxed),
                       .pending = waiting.pending.load(std::memory_order_relaxed),
                       .paused = waiting.paused.load(std::memory_order_relaxed),
                       .oldest_page = waiting.oldest_page.load(std::memory_order_relaxed),
                       .oldest_offset = waiting.oldest_offset.load(std::memory_order_relaxed),
                       .oldest_why = waiting.oldest_why.load(std::memory_order_relaxed),
                       .oldest_pending_ns = oldest == 0 ? 0 : threads_.now_ns() - oldest};
  set_counts(status, session_.counters());
  return status;
}

void set_counts(SessionStatus& status, const SessionCounters& counters) {
  const auto value = [](const SessionCounters::Counter& counter) {
    return counter.load(std::memory_order_relaxed);
  };
  status.faults = value(counters.faults);
  status.faults_merged = value(counters.faults_merged);
  status.events = value(counters.events);
  status.pages_copied = value(counters.pages_copied);
  status.pages_zeroed = value(counters.pages_zeroed);
  status.pages_shared = value(counters.pages_shared);
  status.pages_removed = value(counters.pages_removed);
  status.pages_poisoned = value(counters.pages_poisoned);
  status.pages_outside = value(counters.pages_outside);
  status.bytes_read = value(counters.bytes_read);
  status.fetches = value(counters.fetches);
  status.retries = value(counters.retries);
  status.read_retries = value(counters.read_retries);
  status.read_errors = value(counters.read_errors);
  status.pages_prefetched = value(counters.pages_prefetched);
  status.pages_background = value(counters.pages_background);
  status.prefetch_late = value(counters.prefetch_late);
  status.prefetch_missed = value(counters.prefetch_missed);
  status.prefetch_left_out = value(counters.prefetch_left_out);
  status.prefetch_left_out_used = value(counters.prefetch_left_out_used);
  status.prefetch_given_up = value(counters.prefetch_given_up) != 0;
}

Result<void> Actor::forked(std::unique_ptr<ForkedSession>& session) {
  Result<SessionId> child = scheduler_.forked(id_, *session);
  if (!child) return Failure(std::move(child).error());
  children_.push_back(*child);
  return {};
}

void Actor::start_fetch(StoreLane& lane, std::unique_ptr<Fetch> fetch) {
  if (const std::shared_ptr<SharedImage> shared = fetch->shared)
    return shared->fetch(std::move(fetch), weak_from_this());
  lane.submit(std::move(fetch), weak_from_this());
}

bool Actor::client_has_exited() {
  return !process_ || has_ended(process_->get());
}

bool Actor::signal_client(int number) {
  return process_ && !has_ended(process_->get()) && send_signal(process_->get(), number);
}

}  // namespace uffdkit
