#include "engine/actor.h"

#include <fcntl.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "support/scripted_system_calls.h"

namespace uffdkit {
namespace {

class FakeScheduler final : public ActorScheduler {
 public:
  std::atomic<int> scheduled{0};
  std::vector<std::int64_t> at;
  int armed = 0;
  int ended_calls = 0;
  bool can_arm = true;
  bool others_are_waiting = false;
  bool others_are_served = false;
  std::function<bool()> on_look = [] { return false; };

  void schedule(SessionId) override { ++scheduled; }
  void schedule_at(SessionId, std::int64_t when_ns) override { at.push_back(when_ns); }
  bool arm(SessionId, int) override {
    ++armed;
    return can_arm;
  }
  bool others_wait() override { return others_are_waiting; }
  void serves(SessionId, std::int64_t) override {}
  bool others_served(SessionId, std::int64_t) override { return others_are_served; }
  bool give_way() override { return on_look(); }
  bool look_again(std::int64_t) override { return on_look(); }
  void ended(SessionId) override { ++ended_calls; }
  std::function<void(ForkedSession)> on_fork = [](ForkedSession) {};
  std::function<void()> on_begin = [] {};
  Result<SessionId> forked(SessionId, ForkedSession& child) override {
    on_fork(std::move(child));
    return 2;
  }
  void begin(SessionId) override { on_begin(); }
};

class FakeListener final : public EngineListener {
 public:
  int ends = 0;
  void session_ended(const SessionStatus&, SessionEnd) override { ++ends; }
  Result<SessionCounters*> session_forks(SessionId, SessionId, const SessionFiles&) override {
    return nullptr;
  }
  void session_forked(const SessionStatus&) override {}
  void detach_failed(SessionId, const Error&) override {}
  void page_failed(SessionId, const Error&) override {}
  void warn(SessionId, const std::string&) override {}
};

// One whose client has told it all that fits into one read, again and again; each call takes longer than a
// slice.
class FloodedSystemCalls final : public test::ScriptedSystemCalls {
 public:
  std::uint8_t event = abi::kEventPagefault;
  int reads = 0;
  int fills = 0;

  std::ptrdiff_t read(int, void* buffer, std::size_t bytes) override {
    ++reads;
    take_a_slice();
    for (std::size_t i = 0; i < bytes / sizeof(abi::Msg); ++i) {
      abi::Msg message{};
      message.event = event;
      if (event == abi::kEventPagefault)
        message.arg.pagefault.address = ++page_ * 4096;
      else
        message.arg.remove = {.start = 4096, .end = 8192};
      std::memcpy(static_cast<abi::Msg*>(buffer) + i, &message, sizeof message);
    }
    return static_cast<std::ptrdiff_t>(bytes);
  }
  int ioctl(int, unsigned long request, std::uintptr_t) override {
    if (request != abi::kIoctlWake) ++fills;
    take_a_slice();
    return -ENOENT;
  }

 private:
  static void take_a_slice() {
    for (const std::int64_t begin = monotonic_ns(); monotonic_ns() - begin <= FairShare::kSliceNs;) continue;
  }
  std::uint64_t page_ = 0;
};

// A userfaultfd to which nothing happens but these faults, which come one after another.
class QuietSystemCalls final : public test::ScriptedSystemCalls {
 public:
  std::uint64_t faults = 0;
  std::uint64_t empty_reads = 0;
  int child = -1;  // of a fork, told once

  std::ptrdiff_t read(int, void* buffer, std::size_t) override {
    if (child >= 0) {
      abi::Msg message{};
      message.event = abi::kEventFork;
      message.arg.fork.ufd = static_cast<std::uint32_t>(std::exchange(child, -1));
      std::memcpy(buffer, &message, sizeof message);
      return sizeof message;
    }
    if (faults == 0) {
      ++empty_reads;
      return -EAGAIN;
    }
    --faults;
    abi::Msg message{};
    message.event = abi::kEventPagefault;
    message.arg.pagefault.address = 0x10000;
    std::memcpy(buffer, &message, sizeof message);
    return sizeof message;
  }
  int ioctl(int, unsigned long, std::uintptr_t) override { return -ENOENT; }
};

class ActorTest : public testing::Test {
 protected:
  ActorTest()
      : actor_(std::make_shared<Actor>(1, 0, Uffd::adopt(calls_.make_descriptor(), Features(), calls_),
                                       SessionState::create("").value(),
                                       std::vector<std::shared_ptr<StoreLane>>(), SessionOptions{},
                                       std::nullopt, scheduler_, listener_)) {}
  void run() { actor_->run(scratch_); }

  QuietSystemCalls calls_;
  FakeScheduler scheduler_;
  FakeListener listener_;
  std::vector<std::byte> scratch_ = std::vector<std::byte>(kFetchGranulesMax * 4096);
  std::shared_ptr<Actor> actor_;
};

TEST_F(ActorTest, AChildBeginsWhenItsForkCountsAsApplied) {
  std::vector<ForkedSession> children;
  std::vector<std::size_t> applied;
  const auto applied_messages = [&] {
    UniqueFd file(::fcntl(actor_->state_file(), F_DUPFD_CLOEXEC, 0));
    return SessionState::open(std::move(file)).value().unapplied();
  };
  scheduler_.on_fork = [&](ForkedSession child) {
    EXPECT_EQ(applied_messages(), 0u);
    children.push_back(std::move(child));
  };
  scheduler_.on_begin = [&] { applied.push_back(applied_messages()); };
  calls_.child = calls_.make_descriptor();
  run();
  EXPECT_EQ(children.size(), 1u);
  // Else one that ends at once would leave the number of its descriptor to somebody else, and a successor
  // would take that for the child's.
  EXPECT_EQ(applied, (std::vector<std::size_t>{1}));
}

TEST_F(ActorTest, OneThatIsHeldIsNotRunBeforeItBegins) {
  actor_->hold();
  run();
  EXPECT_EQ(scheduler_.armed, 0);
  actor_->begin();
  run();
  EXPECT_EQ(scheduler_.armed, 1);
}

TEST_F(ActorTest, ArmsOnceForEachEvent) {
  run();
  run();
  EXPECT_EQ(scheduler_.armed, 1);
  actor_->disarmed();
  run();
  EXPECT_EQ(scheduler_.armed, 2);
}

TEST_F(ActorTest, FaultsThatFollowAnAnswerAreServedBeforeItArms) {
  calls_.faults = 3;
  scheduler_.can_arm = false;  // whatever is left unread would stay so
  run();
  EXPECT_EQ(calls_.faults, 0u);
  EXPECT_EQ(scheduler_.armed, 1);
}

TEST_F(ActorTest, FaultsWithoutAnEndLeaveOthersTheirTurn) {
  constexpr std::uint64_t kEndless = 1ull << 60;
  calls_.faults = kEndless;
  scheduler_.others_are_waiting = true;
  run();
  EXPECT_GT(calls_.faults, kEndless - 1000);
  EXPECT_EQ(scheduler_.scheduled, 1);
  // However long the scheduler would have it look.
  scheduler_.on_look = [] { return true; };
  run();
  EXPECT_GT(calls_.faults, kEndless - 2000);
  EXPECT_EQ(scheduler_.scheduled, 2);
  // An event would wake another worker at once.
  EXPECT_EQ(scheduler_.armed, 0);
}

class FloodedActorTest : public testing::Test {
 protected:
  void run() { actor_->run(scratch_); }

  FloodedSystemCalls calls_;
  FakeScheduler scheduler_;
  FakeListener listener_;
  std::vector<std::byte> scratch_ = std::vector<std::byte>(kFetchGranulesMax * 4096);
  std::shared_ptr<Actor> actor_ = std::make_shared<Actor>(
      1, 0, Uffd::adopt(calls_.make_descriptor(), Features(), calls_), SessionState::create("").value(),
      std::vector<std::shared_ptr<StoreLane>>(), SessionOptions{}, std::nullopt, scheduler_, listener_);
};

TEST_F(FloodedActorTest, ANeighbourWaitsForOneReadAndOneFillOfAFlood) {
  scheduler_.others_are_waiting = true;
  for (int runs = 1; runs <= 5; ++runs) {
    run();
    EXPECT_EQ(calls_.reads, runs);
    EXPECT_EQ(calls_.fills, runs);
    // Behind the neighbour.
    EXPECT_EQ(scheduler_.scheduled, runs);
  }
  EXPECT_EQ(scheduler_.armed, 0);
}

TEST_F(FloodedActorTest, AFloodOfEventsRestsWhileOthersAreServed) {
  scheduler_.others_are_served = true;
  calls_.event = abi::kEventRemove;
  run();
  EXPECT_EQ(calls_.reads, 1);
  EXPECT_EQ(scheduler_.scheduled, 0);
  EXPECT_EQ(scheduler_.at.size(), 1u);
  EXPECT_EQ(scheduler_.armed, 0);
}

TEST_F(ActorTest, LooksForFaultsAsLongAsTheSchedulerWants) {
  calls_.faults = 1;
  int looks = 0;
  scheduler_.on_look = [&] {
    if (++looks == 3) calls_.faults = 1;
    return looks < 5;
  };
  run();
  EXPECT_EQ(looks, 5);
  EXPECT_EQ(calls_.faults, 0u);
  EXPECT_EQ(scheduler_.armed, 1);
}

TEST_F(ActorTest, LooksThatAreAlwaysInVainAreLeftOutButForOneNowAndThen) {
  constexpr int kAnswers = 1000;
  for (int i = 0; i < kAnswers; ++i) {
    calls_.faults = 1;
    run();
  }
  EXPECT_GT(calls_.empty_reads, 0u);
  EXPECT_LT(calls_.empty_reads, kAnswers / 10);
  // Until one finds something.
  calls_.faults = 2 * kAnswers;
  while (calls_.faults > 0) run();
  calls_.empty_reads = 0;
  calls_.faults = 1;
  run();
  EXPECT_EQ(calls_.empty_reads, 1u);
}

TEST_F(ActorTest, ASessionWithoutFaultsIsNotLookedAtAgain) {
  scheduler_.on_look = []() -> bool { throw std::logic_error("looked"); };
  run();
  EXPECT_EQ(scheduler_.armed, 1);
}

TEST_F(ActorTest, ADescriptorThatCouldNotBeArmedIsArmedLater) {
  scheduler_.can_arm = false;
  run();
  EXPECT_EQ(scheduler_.armed, 1);
  ASSERT_EQ(scheduler_.at.size(), 1u);
  scheduler_.can_arm = true;
  run();
  EXPECT_EQ(scheduler_.armed, 2);
  run();
  EXPECT_EQ(scheduler_.armed, 2);
}

TEST_F(ActorTest, CommandsThatAreRefusedForNowKeepTheirOrder) {
  std::vector<int> order;
  int refusals = 2;
  actor_->post([&](Session&) {
    if (refusals-- > 0) return false;
    order.push_back(1);
    return true;
  });
  actor_->post([&](Session&) {
    order.push_back(2);
    return true;
  });
  run();
  EXPECT_TRUE(order.empty());
  ASSERT_FALSE(scheduler_.at.empty());  // it will be run again
  actor_->post([&](Session&) {
    order.push_back(3);
    return true;
  });
  while (order.size() < 3) run();
  EXPECT_EQ(order, (std::vector<int>{1, 2, 3}));
}

TEST_F(ActorTest, CommandsBehindAnEndFindTheSessionEnded) {
  int found_ended = 0;
  actor_->post([](Session&) { return false; });
  run();
  for (int i = 0; i < 2; ++i)
    actor_->post([&](Session& session) {
      found_ended += session.end() ? 1 : 0;
      return true;
    });
  actor_->stop();
  EXPECT_EQ(found_ended, 2);
  EXPECT_FALSE(actor_->post([](Session&) { return true; }));
  EXPECT_EQ(listener_.ends, 0);
}

TEST_F(ActorTest, AnEndIsToldOnce) {
  actor_->post([](Session& session) { return session.abandon(), true; });
  run();
  run();
  EXPECT_EQ(listener_.ends, 1);
  EXPECT_EQ(scheduler_.ended_calls, 1);
  EXPECT_FALSE(actor_->post([](Session&) { return true; }));
}

TEST_F(ActorTest, AFetchThatComesAfterItsStopAsksNobody) {
  actor_->stop();
  actor_->fetched(std::make_unique<Fetch>());
  EXPECT_EQ(scheduler_.scheduled, 0);
}

TEST_F(ActorTest, NothingThatIsPostedByManyThreadsIsLostOrRunByTwo) {
  constexpr int kThreads = 4;
  constexpr int kCommands = 500;
  int done = 0;  // not atomic: the actor orders them
  {
    std::vector<std::jthread> threads;
    for (int t = 0; t < kThreads; ++t)
      threads.emplace_back([&] {
        std::vector<std::byte> scratch(kFetchGranulesMax * 4096);
        for (int i = 0; i < kCommands; ++i) {
          actor_->post([&](Session&) { return ++done, true; });
          actor_->run(scratch);
        }
      });
  }
  // Whoever ran it last may have left the rest to the scheduler.
  if (scheduler_.scheduled > 0) run();
  EXPECT_EQ(done, kThreads * kCommands);
}

}  // namespace
}  // namespace uffdkit
