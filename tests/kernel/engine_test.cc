// The engine's threads, against the running kernel.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <uffdkit/store.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <thread>

#include "engine/engine.h"
#include "support/mapping.h"
#include "support/serving.h"

namespace uffdkit {
namespace {

class NoListener final : public EngineListener {
  void session_ended(const SessionStatus&, SessionEnd) override {}
  Result<SessionCounters*> session_forks(SessionId, SessionId, const SessionFiles&) override {
    return nullptr;
  }
  void session_forked(const SessionStatus&) override {}
  void detach_failed(SessionId, const Error&) override {}
  void page_failed(SessionId, const Error&) override {}
  void warn(SessionId, const std::string&) override {}
};

// Every byte is 7. Breaks its contract: it blocks the thread that serves faults, as a client can whose memory
// cgroup is being reclaimed.
class BlockingStore final : public Store {
 public:
  std::atomic<bool> entered{false};
  std::atomic<bool> open{true};

  ByteCount size() const noexcept override { return ByteCount(16 * 4096); }
  std::string name() const override { return "blocking"; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(16 * 4096)};
  }
  Result<ReadStatus> read(StoreOffset, std::span<std::byte> to, Wait) noexcept override {
    entered.store(true);
    entered.notify_all();
    open.wait(false);
    std::memset(to.data(), 7, to.size());
    return ReadStatus::done;
  }
};

class ServedMapping {
 public:
  ServedMapping(Engine& engine, const std::shared_ptr<Store>& store, Uffd uffd) {
    EXPECT_TRUE(uffd.register_range(memory_.range(), kMissing));
    auto session = engine.attach({.uffd = std::move(uffd),
                                  .state = SessionState::create("test").value(),
                                  .regions = {{.memory = memory_.range(), .offset = StoreOffset(0)}},
                                  .lane = StoreLane::create(store).value(),
                                  .process = std::nullopt});
    EXPECT_TRUE(session);
  }
  unsigned char touch() const { return std::to_integer<unsigned char>(memory_.read(0)); }

 private:
  test::Mapping memory_ = test::Mapping::anonymous(16 * 4096);
};

TEST(Engine, AClientThatHoldsUpEveryWorkerDelaysNobodyElse) {
  Result<Uffd> first_uffd = Uffd::create(test::user_faults());
  Result<Uffd> second_uffd = Uffd::create(test::user_faults());
  if (!first_uffd || !second_uffd) GTEST_SKIP() << "needs a userfaultfd";
  NoListener listener;
  auto engine = Engine::create({.workers = 1}, listener).value();
  auto blocking = std::make_shared<BlockingStore>();
  blocking->open = false;
  const ServedMapping held_up(*engine, blocking, std::move(*first_uffd));
  const ServedMapping other(*engine, std::make_shared<BlockingStore>(), std::move(*second_uffd));

  std::atomic<unsigned char> seen{0};
  std::jthread waiting([&] { seen = held_up.touch(); });
  blocking->entered.wait(false);
  EXPECT_EQ(other.touch(), 7);
  EXPECT_EQ(seen, 0);
  blocking->open = true;
  blocking->open.notify_all();
  waiting.join();
  EXPECT_EQ(seen, 7);
}

// Threads that wait in faults which somebody else has read, when the session ends.
class WaitingAtTheEnd : public testing::Test {
 protected:
  // Hands over memory in which a writer waits for a protected page and a reader in a minor fault, has `end`
  // end the session, and waits for both.
  static void run(const std::function<void(Engine&, SessionId)>& end) {
    UFFD_OR_SKIP(uffd, test::user_faults(abi::kFeaturePagefaultFlagWp | abi::kFeatureMinorShmem));
    const test::Mapping written = test::Mapping::anonymous(4096);
    const UniqueFd file = test::memory_file(4096);
    const test::Mapping mapped = test::Mapping::of_file(file.get(), 4096, MAP_SHARED);
    written.write(0, std::byte{1});
    ASSERT_EQ(pwrite(file.get(), test::page_of(4).data(), 4096, 0), 4096);
    ASSERT_TRUE(uffd.register_range(written.range(), kMissing | kWriteProtect));
    ASSERT_TRUE(uffd.register_range(mapped.range(), kMissing | kMinor));
    ASSERT_EQ(uffd.protect(written.range()).stop, Stop::complete);
    test::Background writer(uffd, written.range(), [&] { written.write(0, std::byte{2}); });
    ASSERT_EQ(test::next_fault(uffd).kind, Fault::Kind::write_protect);
    test::Background reader(uffd, mapped.range(), [&] { EXPECT_EQ(mapped.read(0), std::byte{4}); });
    ASSERT_EQ(test::next_fault(uffd).kind, Fault::Kind::minor);

    NoListener listener;
    auto engine = Engine::create({.workers = 1}, listener).value();
    const auto session = engine->attach({.uffd = Uffd::receive(dup(uffd.fd())).value(),
                                         .state = SessionState::create("test").value(),
                                         .regions = {{.memory = written.range(), .offset = StoreOffset(0)},
                                                     {.memory = mapped.range(), .offset = StoreOffset(4096)}},
                                         .lane = StoreLane::create(std::make_shared<BlockingStore>()).value(),
                                         .process = std::nullopt});
    ASSERT_TRUE(session);
    end(*engine, *session);
    writer.join();
    reader.join();
    EXPECT_EQ(written.read(0), std::byte{2});
  }
};

TEST_F(WaitingAtTheEnd, DetachingAnswersThem) {
  run([](Engine& engine, SessionId session) {
    engine.begin_detach(session, Unreadable::poison, [](const Result<void>& done) { EXPECT_TRUE(done); });
  });
}

TEST_F(WaitingAtTheEnd, ReleasingAnswersThem) {
  run([](Engine& engine, SessionId session) {
    engine.release(session, [](const Result<void>& done) { EXPECT_TRUE(done); });
  });
}

}  // namespace
}  // namespace uffdkit
