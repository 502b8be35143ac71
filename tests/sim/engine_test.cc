// The engine's sessions on the model (tests/simulate): a sound engine passes, and one with a bug is found
// out.
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <map>
#include <string>

#include <cstring>
#include <memory>
#include <vector>

#include "engine/session.h"
#include "sim/world.h"
#include "simulate/world.h"
#include "support/forwarding_calls.h"

namespace uffdkit::simulate {
namespace {

// Every byte of it is 7.
class SevenStore final : public Store {
 public:
  ByteCount size() const noexcept override { return ByteCount(64 * sim::test::kPage); }
  std::string name() const override { return "seven"; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(size().value)};
  }
  Result<ReadStatus> read(StoreOffset, std::span<std::byte> to, Wait) noexcept override {
    std::memset(to.data(), 7, to.size());
    return ReadStatus::done;
  }
};

class Host final : public SessionHost {
 public:
  std::int64_t now_ns() override { return ++now_; }
  std::span<std::byte> scratch() override { return scratch_; }
  bool gives_way() override { return false; }
  void start_fetch(StoreLane&, std::unique_ptr<Fetch>) override {}
  bool kill_client() override { return false; }
  bool client_has_exited() override { return true; }
  bool stop_client() override { return false; }
  void continue_client() override {}
  Result<void> forked(std::unique_ptr<ForkedSession>&) override { return {}; }
  void page_failed(const Error&) override {}
  void detach_failed(const Error&) override {}
  void warn(const std::string&) override {}

 private:
  std::int64_t now_ = 0;
  std::vector<std::byte> scratch_ = std::vector<std::byte>(kFetchGranulesMax * sim::test::kPage);
};

// A client's threads do something at the instant before a range is unregistered.
class HookedCalls final : public uffdkit::test::ForwardingCalls {
 public:
  explicit HookedCalls(SystemCalls& calls) : ForwardingCalls(calls) {}
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override {
    if (request == abi::kIoctlUnregister && before_unregister) std::exchange(before_unregister, nullptr)();
    return calls_.ioctl(fd, request, argument);
  }

  std::function<void()> before_unregister;
};

// One process whose file memory shows the store, with a session that is stepped while a thread waits.
class SimLostPages : public testing::Test {
 protected:
  explicit SimLostPages(std::uint64_t features = abi::kFeatureEventRemove)
      : world_(features),
        file_(world_.kernel.make_shmem(ByteCount(kPages * sim::test::kPage))),
        start_(world_.area(sim::Memory::shmem_shared, kPages, sim::test::kMissingMode, file_)),
        session_(Uffd::adopt(world_.uffd.duplicate().value().release(), world_.uffd.features(), calls_),
                 SessionState::create("seven").value(), {}, {.fault_around = PageCount(1)}, host_) {
    session_
        .add_region(sim::test::pages(start_, kPages), StoreOffset(0), kPage4K,
                    StoreLane::create(std::make_shared<SevenStore>()).value())
        .value();
  }
  int read(std::uint64_t page) {
    sim::Thread& thread = world_.read(sim::test::at(start_, page));
    for (int steps = 0; steps < 10 && sim::test::asleep(thread); ++steps) {
      session_.step();
      world_.kernel.run();
    }
    return sim::test::byte_of(thread);
  }
  void punch(std::uint64_t first, std::uint64_t count) {
    file_->punch_hole(first * sim::test::kPage, ByteCount(count * sim::test::kPage));
  }

  static constexpr std::uint64_t kPages = 64;
  sim::test::World world_;
  HookedCalls calls_{world_.process.system_calls()};
  Host host_;
  sim::ObjectPtr file_;
  Address start_;
  Session session_;
};

TEST_F(SimLostPages, AreZeroWhereTheyWereThereAndTheStoresWhereTheyWereNot) {
  EXPECT_EQ(read(3), 7);
  EXPECT_EQ(read(4), 7);
  punch(4, 2);
  EXPECT_EQ(read(3), 7);
  EXPECT_EQ(read(4), 0);
  EXPECT_EQ(read(5), 7);
  punch(0, kPages);
  EXPECT_EQ(read(4), 0);
  EXPECT_EQ(read(3), 0);
}

class SimLostPagesUntold : public SimLostPages {
 protected:
  SimLostPagesUntold() : SimLostPages(0) {}
};

TEST_F(SimLostPagesUntold, AreTheStoresWhereNothingIsToldOfRemovals) {
  EXPECT_EQ(read(3), 7);
  punch(3, 1);
  EXPECT_EQ(read(3), 7);
}

class SimEndedSession : public SimLostPages {
 protected:
  void begin_to_remove(sim::Thread& thread, std::uint64_t page) {
    thread.advise(sim::test::pages(sim::test::at(start_, page), 1), sim::Advice::dont_need);
    world_.kernel.run();
  }
  void end_session() {
    session_.release();
    for (int steps = 0; steps < 10 && !session_.end(); ++steps) {
      session_.step();
      world_.kernel.run();
    }
    EXPECT_TRUE(session_.end());
  }
};

// Its client tells nothing of munmap(2): Firecracker's do not.
TEST_F(SimEndedSession, LeavesNoThreadAsleepWhereNothingIsMappedAnyMore) {
  sim::Thread& reader = world_.read(sim::test::at(start_, kPages - 1));
  sim::Thread& other = world_.process.spawn_thread();
  begin_to_remove(other, 9);
  // The fault is read, and cannot be served yet.
  session_.step();
  world_.kernel.run();
  other.unmap(sim::test::pages(sim::test::at(start_, kPages - 1), 1));
  world_.kernel.run();
  begin_to_remove(other, 9);
  ASSERT_TRUE(sim::test::asleep(reader));
  end_session();
  ASSERT_TRUE(reader.last());
  EXPECT_EQ(reader.last()->kind, sim::Completion::Kind::sigsegv);
}

TEST_F(SimEndedSession, LeavesNoThreadAsleepThatGaveBackWhatWasUnregisteredLast) {
  sim::Thread& one = world_.process.spawn_thread();
  sim::Thread& other = world_.process.spawn_thread();
  // As long as memory is changing, nobody can say how long its mapping is: its end comes later.
  begin_to_remove(one, 9);
  calls_.before_unregister = [&] { calls_.before_unregister = [&] { begin_to_remove(other, kPages - 1); }; };
  end_session();
  EXPECT_FALSE(calls_.before_unregister);
  EXPECT_EQ(sim::test::result_of(other), 0);
}

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

TEST(SimEngine, ServesEveryByteAndLeavesNoThreadAsleepUnder300Seeds) {
  std::size_t bytes_checked = 0;
  // What must have happened, and how often it did.
  std::map<std::string, std::size_t> happened = {
      {"mremap", 0},      {"shares the image", 0}, {"has a child", 0},      {"has huge pages", 0},
      {"is released", 0}, {"detached", 0},         {"another takes up", 0}, {"is killed", 0}};
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    const Found found = run(seed);
    ASSERT_EQ(found.wrong, "") << "simulate --seed " << seed << " -v shows it";
    bytes_checked += found.bytes_checked;
    for (auto& [what, times] : happened)
      times += static_cast<std::size_t>(std::ranges::count_if(
          found.events, [&](const std::string& event) { return event.contains(what); }));
  }
  EXPECT_GT(bytes_checked, 10'000u);
  for (const auto& [what, times] : happened) EXPECT_GE(times, 10u) << what;
}

TEST(SimEngine, LeavesNoDescriptorOpen) {
  run(1);
  const std::size_t before = open_descriptors();
  for (std::uint64_t seed = 1; seed <= 20; ++seed) run(seed);
  EXPECT_EQ(open_descriptors(), before);
}

TEST(SimEngine, ASeedGivesTheSameRunAgain) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) EXPECT_EQ(run(seed).events, run(seed).events);
}

TEST(SimEngine, NoWakeAfterPresentIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::no_wake_after_present, 20), 0u);
}
TEST(SimEngine, AFaultServedBeforeAnOlderRemoveIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::fault_before_older_remove, 20), 0u);
}
TEST(SimEngine, AStaleFetchIsFoundWithin100Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::stale_fetch, 100), 0u);
}
TEST(SimEngine, AShortCopyTakenForAWholeOneIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::short_copy_taken_for_whole, 20), 0u);
}
TEST(SimEngine, ALeakedDescriptorIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::leaked_descriptor, 20), 0u);
}
TEST(SimEngine, ARefusedFaultThatIsForgottenIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::refused_fault_forgotten, 20), 0u);
}

}  // namespace
}  // namespace uffdkit::simulate
