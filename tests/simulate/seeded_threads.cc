#include "simulate/seeded_threads.h"

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"

namespace uffdkit::simulate {
namespace {

// What passes at most from one turn to the next: some turns fill a slice of a worker's time.
constexpr std::uint64_t kTurnMaxNs = 4'000;
// Some threads are slower than others, so that one comes late for what many others have done meanwhile.
constexpr std::array<std::uint64_t, 4> kWeights = {1, 4, 4, 16};

}  // namespace

SeededThreads::SeededThreads(std::uint64_t seed) : random_(seed) {
  members_.push_back(std::make_unique<Member>(0, 8));
}

SeededThreads::~SeededThreads() {
  CHECK(running_ == 0 && others() == 0);
  for (const auto& member : members_)
    if (member->thread.joinable()) member->thread.join();
}

void SeededThreads::trace(std::uint64_t decision) {
  trace_ = (trace_ ^ decision) * 0x100'0000'01b3;
}

// ---- who runs ---------------------------------------------------------------------------------------------

void SeededThreads::wait_for_turn(State state, std::int64_t until_ns) {
  std::unique_lock lock(mutex_);
  Member& own = self();
  own.state = state;
  own.until_ns = until_ns;
  choose();
  own.turn.wait(lock, [&] { return running_ == own.id; });
  own.state = State::runnable;
}

void SeededThreads::choose() {
  now_ns_ += static_cast<std::int64_t>(random_.draw(kTurnMaxNs));
  std::vector<Member*> able = who_can_run();
  while (able.empty()) {
    // Everybody waits, the first one too, for somebody's end.
    const std::int64_t next = next_time();
    if (next == kNever)
      wake_all_who_sleep();
    else
      now_ns_ = std::max(now_ns_, next);
    able = who_can_run();
  }
  std::uint64_t weights = 0;
  for (const Member* member : able) weights += member->weight;
  std::uint64_t drawn = random_.draw(weights);
  std::size_t chosen = 0;
  while (drawn >= able[chosen]->weight) drawn -= able[chosen++]->weight;
  running_ = able[chosen]->id;
  trace(running_);
  trace(static_cast<std::uint64_t>(now_ns_));
  able[chosen]->turn.notify_one();
}

void SeededThreads::wake_all_who_sleep() {
  got_stuck_ = true;
  bool anybody = false;
  for (const auto& member : members_) {
    if (member->state != State::condition) continue;
    member->state = State::runnable;
    anybody = true;
  }
  CHECK(anybody);
}

std::vector<SeededThreads::Member*> SeededThreads::who_can_run() {
  fire_timers();
  // Many may wait for the same descriptors.
  std::vector<pollfd> epolls;
  for (const auto& member : members_)
    if (member->state == State::descriptors &&
        std::ranges::none_of(epolls, [&](const pollfd& known) { return known.fd == member->epoll; }))
      epolls.push_back({.fd = member->epoll, .events = POLLIN, .revents = 0});
  CHECK(::poll(epolls.data(), epolls.size(), 0) >= 0);
  const auto is_ready = [&](int epoll) {
    const auto found = std::ranges::find(epolls, epoll, &pollfd::fd);
    return found != epolls.end() && found->revents != 0;
  };
  std::vector<Member*> able;
  for (const auto& member : members_) {
    const bool is_able = member->state == State::runnable ||
                         (member->state == State::descriptors && is_ready(member->epoll)) ||
                         (member->state == State::join && members_[member->joined]->state == State::ended) ||
                         (member->state != State::ended && member->until_ns <= now_ns_);
    if (is_able) able.push_back(member.get());
  }
  if (members_.front()->state == State::idle && (able.empty() || --turns_left_ == 0))
    able = {members_.front().get()};
  return able;
}

std::int64_t SeededThreads::next_time() const {
  std::int64_t next = kNever;
  for (const auto& member : members_)
    if (member->state != State::ended && member->state != State::runnable)
      next = std::min(next, member->until_ns);
  for (const auto& [timer, when_ns] : timers_) next = std::min(next, when_ns);
  return next;
}

bool SeededThreads::run_until_idle(int turns_max) {
  turns_left_ = turns_max;
  wait_for_turn(State::idle);
  return turns_left_ > 0;
}

bool SeededThreads::let_time_pass() {
  const std::lock_guard lock(mutex_);
  const std::int64_t next = next_time();
  if (next == kNever) return false;
  now_ns_ = std::max(now_ns_, next);
  return true;
}

std::size_t SeededThreads::others() const {
  return static_cast<std::size_t>(std::ranges::count_if(
      members_, [](const auto& member) { return member->id != 0 && member->state != State::ended; }));
}

// ---- what threads ask -------------------------------------------------------------------------------------

SeededThreads::ThreadId SeededThreads::start(std::function<void()> run) {
  const std::lock_guard lock(mutex_);
  const ThreadId id = members_.size();
  members_.push_back(std::make_unique<Member>(id, kWeights[random_.draw(kWeights.size())]));
  Member& member = *members_.back();
  member.thread = std::thread([this, &member, run = std::move(run)]() mutable {
    {
      std::unique_lock own(mutex_);
      member.turn.wait(own, [&] { return running_ == member.id; });
    }
    run();
    // What it owns goes while it has its turn.
    run = nullptr;
    const std::lock_guard own(mutex_);
    member.state = State::ended;
    member.until_ns = kNever;
    choose();
  });
  return id;
}

void SeededThreads::join(ThreadId thread) {
  self().joined = thread;
  wait_for_turn(State::join);
}

void SeededThreads::yield() {
  wait_for_turn(State::runnable);
}

int SeededThreads::wait(int epoll, epoll_event& event, int timeout_ms) {
  self().epoll = epoll;
  wait_for_turn(State::descriptors, timeout_ms < 0 ? kNever : now_ns_ + std::int64_t{timeout_ms} * 1'000'000);
  // Somebody else may have taken it.
  return ::epoll_wait(epoll, &event, 1, 0);
}

void SeededThreads::sleep(const void* condition, std::unique_lock<std::mutex>& lock, std::int64_t until_ns) {
  self().condition = condition;
  lock.unlock();
  wait_for_turn(State::condition, until_ns);
  lock.lock();
}

void SeededThreads::wake(const void* condition, bool all) {
  const std::lock_guard lock(mutex_);
  std::vector<Member*> asleep;
  for (const auto& member : members_)
    if (member->state == State::condition && member->condition == condition) asleep.push_back(member.get());
  if (asleep.empty()) return;
  if (!all) asleep = {asleep[random_.draw(asleep.size())]};
  for (Member* member : asleep) member->state = State::runnable;
}

// ---- timers -----------------------------------------------------------------------------------------------

UniqueFd SeededThreads::make_timer() {
  return UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
}

void SeededThreads::set_timer(int timer, std::int64_t when_ns) {
  const std::lock_guard lock(mutex_);
  timers_[timer] = when_ns;
}

void SeededThreads::forget_timer(int timer) {
  const std::lock_guard lock(mutex_);
  timers_.erase(timer);
}

void SeededThreads::fire_timers() {
  for (auto& [timer, when_ns] : timers_) {
    if (when_ns > now_ns_) continue;
    when_ns = kNever;
    const std::uint64_t one = 1;
    CHECK(::write(timer, &one, sizeof one) == sizeof one);
  }
}

}  // namespace uffdkit::simulate
