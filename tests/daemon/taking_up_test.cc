// Workers that take over and cannot have all that the one before had: nobody reads zeros or hangs for that.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>

#include "daemon/fixture.h"
#include "manager/manager.h"
#include "manager/records.h"
#include "support/native_connection.h"
#include "support/program.h"
#include "support/sigbus.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPages = 512;

class TakingUp : public ManagerTest {
 protected:
  void end_worker() const { ::kill(manager_.worker_pid(), SIGKILL); }
  bool another_takes_over(std::uint64_t takeovers = 1) const {
    end_worker();
    return eventually([&] { return manager_.count("takeovers") == takeovers; });
  }
  // Touches page 0 before the takeover and these after it, each of which either is right or raises SIGBUS;
  // then, when the image is whole again, all.
  Child touching(std::size_t right, std::size_t unreadable) const {
    return client(image_, whole(image_), socket_,
                  after_one_page([=](const ClientMemory& memory, const Channel& channel) {
                    memory.check(0);
                    memory.check(right);
                    require(raises_sigbus(memory.bytes(unreadable).data()), "it raises no SIGBUS");
                    channel.send(2);
                    channel.receive();
                    for (std::size_t page = 0; page < kPages; ++page)
                      if (page != unreadable) memory.check(page);
                  }));
  }

  const Image image_{directory_ / "image", kPages};
  const std::string socket_ = directory_ / "fc.sock";
  const ManagerProcess manager_{
      directory_, {"--firecracker", socket_ + "=" + image_.path(), "--fault-around", "1", "--no-prefetch"}};
};

TEST_F(TakingUp, WhatIsMissingOfAnImageThatIsGoneAnswersWithSigbusUntilItIsBack) {
  Child process = touching(0, 100);
  process.channel().receive();
  image_.cut(0);
  ASSERT_TRUE(another_takes_over()) << manager_.log();
  process.channel().send(1);
  EXPECT_EQ(process.channel().receive(), 2u) << manager_.log();
  // Its client goes on before what it has just got is counted.
  EXPECT_TRUE(eventually([&] { return manager_.total("pages_poisoned") == 1; })) << manager_.log();
  EXPECT_EQ(manager_.total("read_errors"), 1u);
  const Image again(image_.path(), kPages);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

TEST_F(TakingUp, OfAnImageThatHasBecomeShorterTheRestIsServed) {
  Child process = touching(50, 100);
  process.channel().receive();
  image_.cut(64);
  ASSERT_TRUE(another_takes_over()) << manager_.log();
  process.channel().send(1);
  EXPECT_EQ(process.channel().receive(), 2u) << manager_.log();
  const Image again(image_.path(), kPages);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

TEST_F(TakingUp, ASocketWhoseImageIsGoneStaysAndTurnsClientsAwayUntilAWorkerFindsItAgain) {
  const auto listeners = manager_.status().at("listeners");
  image_.cut(0);
  ASSERT_TRUE(another_takes_over()) << manager_.log();
  EXPECT_EQ(manager_.status().at("listeners"), listeners);
  const UniqueFd refused = connect_to(socket_);
  EXPECT_TRUE(eventually([&] { return manager_.count("clients_refused") == 1; })) << manager_.log();
  const Image again(image_.path(), kPages);
  ASSERT_TRUE(another_takes_over(2)) << manager_.log();
  EXPECT_EQ(manager_.status().at("listeners"), listeners);
  Child process = client(again, whole(again), socket_, check_all_pages);
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

TEST_F(TakingUp, AWorkerThatCannotIsFollowedByOneThatCan) {
  Child process = client(image_, whole(image_), socket_, after_one_page(check_all_pages));
  process.channel().receive();
  // No room for the stack of a thread.
  std::uint64_t pages = 0;
  std::ifstream("/proc/" + std::to_string(manager_.pid()) + "/statm") >> pages;
  rlimit before;
  rlimit tight;
  ASSERT_EQ(::prlimit(manager_.pid(), RLIMIT_AS, nullptr, &before), 0);
  tight = {.rlim_cur = pages * 4096 + (4u << 20), .rlim_max = before.rlim_max};
  ASSERT_EQ(::prlimit(manager_.pid(), RLIMIT_AS, &tight, nullptr), 0);
  end_worker();
  EXPECT_TRUE(eventually([&] { return manager_.logged("start a thread"); })) << manager_.log();
  ASSERT_EQ(::prlimit(manager_.pid(), RLIMIT_AS, &before, nullptr), 0);
  EXPECT_TRUE(eventually([&] { return manager_.sessions() == 1; })) << manager_.log();
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

TEST_F(TakingUp, WhatWasCountedIsCountedOn) {
  Child process =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        for (std::size_t i = 0; i < 100; ++i) memory.check(i * 37 % kPages);
        memory.give_back(0, 10, MADV_DONTNEED);
        channel.send(1);
        channel.receive();
      });
  process.channel().receive();
  // Its client goes on before what it has just got is counted.
  ASSERT_TRUE(eventually([&] {
    return manager_.total("pages_copied") + manager_.total("pages_zeroed") == 100 &&
           manager_.total("pages_removed") == 10;
  }));
  const auto before = manager_.status();
  ASSERT_TRUE(another_takes_over());
  const auto after = manager_.status();
  for (const char* counter :
       {"faults", "events", "pages_copied", "pages_zeroed", "pages_removed", "bytes_read"}) {
    EXPECT_EQ(after.at("total").at(counter), before.at("total").at(counter)) << counter;
    EXPECT_EQ(after.at("sessions").at(0).at(counter), before.at("sessions").at(0).at(counter)) << counter;
  }
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
  ASSERT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
  const auto ended = manager_.status().at("total");
  ASSERT_TRUE(another_takes_over(2));
  EXPECT_EQ(manager_.status().at("total"), ended);
  EXPECT_EQ(manager_.count("sessions_ended"), 1u);
}

// A worker in this process, whose table of descriptors is its own.
class Recorded : public testing::TestWithParam<SessionKind> {};

// Takes up one session that has no state file but another kind of file.
void take_up_without_state(SessionKind kind) {
  const std::unique_ptr<Records> records = take(Records::create());
  const Uffd uffd = take(Uffd::create({.kernel_faults = false}));
  const UniqueFd file(::memfd_create("no state", MFD_CLOEXEC));
  require(::ftruncate(file.get(), 4096) == 0, "ftruncate");
  const std::shared_ptr<StoreLane> lane = take(StoreLane::create(
      take(open_file_store(file.get(), "image")), {}, UniqueFd(::fcntl(file.get(), F_DUPFD_CLOEXEC, 0))));
  (void)take(
      records->add({.id = 1, .kind = kind, .uffd = uffd.fd(), .state_file = file.get(), .acknowledged = true},
                   lane, nullptr));
  records->shared().is_ready = 1;
  const std::unique_ptr<Manager> manager = take(Manager::create({.records = records.get()}));
  succeed(manager->take_up());
  const bool stays = kind != SessionKind::native;
  require(records->sessions().size() == (stays ? 1u : 0u), "the record");
  require((::fcntl(uffd.fd(), F_GETFD) >= 0) == stays, "the userfaultfd");
  ::_exit(0);
}

TEST_P(Recorded, SessionThatCannotBeTakenUpNowStaysOpenUnlessItsClientCanHandItOverAgain) {
  Child worker = program([](const Channel&) { take_up_without_state(GetParam()); });
  EXPECT_EQ(worker.wait(), 0);
}

// Takes up a parent whose state cannot be read now, and whose inbox has the fork of a child that is gone.
void take_up_child_of_one_that_cannot() {
  const std::unique_ptr<Records> records = take(Records::create());
  const Uffd uffd = take(Uffd::create({.kernel_faults = false}));
  Child gone = program([](const Channel& channel) {
    channel.send_fd(0, take(Uffd::create({.kernel_faults = false})).fd());
    ::_exit(0);
  });
  std::uint64_t ignored = 0;
  const UniqueFd of_child = gone.channel().receive_fd(ignored);
  require(gone.wait() == 0, "the child");
  const UniqueFd file(::memfd_create("image", MFD_CLOEXEC));
  require(::ftruncate(file.get(), 4096) == 0, "ftruncate");
  const std::shared_ptr<StoreLane> lane = take(StoreLane::create(
      take(open_file_store(file.get(), "image")), {}, UniqueFd(::fcntl(file.get(), F_DUPFD_CLOEXEC, 0))));
  SessionState state = take(SessionState::create("image"));
  state.empty_inbox()[0] = {.event = abi::kEventFork,
                            .reserved = {},
                            .arg = {.fork = {.ufd = static_cast<std::uint32_t>(of_child.get())}}};
  require(::pwrite(state.fd(), "?", 1, 0) == 1, "break it");
  (void)take(records->add({.id = 1,
                           .kind = SessionKind::firecracker,
                           .uffd = uffd.fd(),
                           .state_file = state.fd(),
                           .acknowledged = true},
                          lane, nullptr));
  const SessionState of_child_state = take(SessionState::create("image"));
  (void)take(records->add_fork(1, 2, of_child.get(), of_child_state.fd()));
  records->shared().is_ready = 1;
  const std::unique_ptr<Manager> manager = take(Manager::create({.records = records.get()}));
  succeed(manager->take_up());
  // One that is run is found to be gone after a second, and ends.
  std::this_thread::sleep_for(std::chrono::milliseconds(1500));
  require(records->sessions().size() == 2, "the child's record");
  require(::fcntl(of_child.get(), F_GETFD) >= 0, "the child's userfaultfd");
  ::_exit(0);
}

TEST(TakenUp, AChildIsNotRunWhileTheInboxOfItsParentNamesIt) {
  Child worker = program([](const Channel&) { take_up_child_of_one_that_cannot(); });
  EXPECT_EQ(worker.wait(), 0);
}

// Takes up what a worker has left that died when a client had come back, before it let go of what it had of
// it.
void take_up_twice(const UniqueFd& uffd) {
  const std::unique_ptr<Records> records = take(Records::create());
  const UniqueFd file(::memfd_create("image", MFD_CLOEXEC));
  require(::ftruncate(file.get(), 4096) == 0, "ftruncate");
  const std::shared_ptr<StoreLane> lane = take(StoreLane::create(
      take(open_file_store(file.get(), "image")), {}, UniqueFd(::fcntl(file.get(), F_DUPFD_CLOEXEC, 0))));
  const SessionState state = take(SessionState::create("image"));
  for (const SessionId id : {1u, 2u})
    (void)take(records->add({.id = id,
                             .kind = SessionKind::native,
                             .uffd = ::fcntl(uffd.get(), F_DUPFD_CLOEXEC, 0),
                             .state_file = ::fcntl(state.fd(), F_DUPFD_CLOEXEC, 0),
                             .acknowledged = true},
                            lane, nullptr));
  records->shared().is_ready = 1;
  const std::unique_ptr<Manager> manager = take(Manager::create({.records = records.get()}));
  succeed(manager->take_up());
  require(records->sessions().size() == 1, "two sessions serve the same memory");
  ::_exit(0);
}

TEST(TakenUp, OneMemoryIsServedByOneSession) {
  Child client = program([](const Channel& channel) {
    const Uffd uffd = take(Uffd::create({.kernel_faults = false}));
    channel.send_fd(0, uffd.fd());
    channel.receive();
  });
  std::uint64_t ignored = 0;
  const UniqueFd uffd = client.channel().receive_fd(ignored);
  Child worker = program([&](const Channel&) { take_up_twice(uffd); });
  EXPECT_EQ(worker.wait(), 0);
}

INSTANTIATE_TEST_SUITE_P(Kinds, Recorded,
                         testing::Values(SessionKind::firecracker, SessionKind::native, SessionKind::fork));

// A manager that is to end while a session of before cannot be taken up yet.
class NotTakenUp : public ManagerTest {
 protected:
  enum class End : std::uint8_t { complete, now };

  // A client that has no descriptor any more; reports with it, and does `work` when it is told to.
  Child client_without_descriptor(const ClientWork& work) const {
    return program([&](const Channel& channel) {
      const ClientMemory memory(image_, whole(image_));
      channel.send_fd(memory.handshake().at(0).at("base_host_virt_addr"), memory.uffd().fd());
      memory.give_up_descriptor();
      channel.receive();
      work(memory, channel);
    });
  }
  // Is the worker that finds this client's session, and what is wrong with its state file, and then is told
  // to end. Whether its end was good.
  void take_up_and_end(
      const Child& client, SessionKind kind, bool is_mended, End end, bool is_good,
      const std::function<void()>& before_end = [] {}) const {
    std::uint64_t start = 0;
    const UniqueFd uffd = client.channel().receive_fd(start);
    Child worker = program([&](const Channel&) {
      const std::unique_ptr<Records> records = take(Records::create());
      UniqueFd file(::open(image_.path().c_str(), O_RDONLY | O_CLOEXEC));
      const std::shared_ptr<Store> store = take(open_file_store(file.get(), image_.path()));
      const std::shared_ptr<StoreLane> lane = take(StoreLane::create(store, {}, std::move(file)));
      SessionState state = take(SessionState::create(image_.path()));
      (void)take(state.add_region({Address(start), ByteCount(kPages * 4096)}, StoreOffset(0), kPage4K));
      char first = 0;
      require(::pread(state.fd(), &first, 1, 0) == 1 && ::pwrite(state.fd(), "?", 1, 0) == 1, "break it");
      const bool is_known = kind != SessionKind::fork;
      const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, client.pid(), 0)));
      (void)take(records->add({.id = 1,
                               .parent = is_known ? 0u : 7u,
                               .kind = kind,
                               .uffd = uffd.get(),
                               .state_file = state.fd(),
                               .process = is_known ? process.get() : -1,
                               .acknowledged = true},
                              lane, nullptr));
      records->shared().is_ready = 1;
      const std::unique_ptr<Manager> manager = take(Manager::create({.records = records.get()}));
      succeed(manager->take_up());
      if (is_mended) require(::pwrite(state.fd(), &first, 1, 0) == 1, "mend it");
      before_end();
      manager->stop();
      if (end == End::now) manager->stop();
      require(manager->run() == is_good, "the end");
      ::_exit(0);
    });
    EXPECT_EQ(worker.wait(), 0);
  }

  const Image image_{directory_ / "image", kPages};
};

TEST_F(NotTakenUp, ASessionIsCompletedBeforeTheEndWhenItCanBeTakenUp) {
  for (const SessionKind kind : {SessionKind::firecracker, SessionKind::fork}) {
    Child process = client_without_descriptor(check_all_pages);
    take_up_and_end(process, kind, /*is_mended=*/true, End::complete, /*is_good=*/true);
    process.channel().send(1);
    EXPECT_EQ(process.wait(), 0);
  }
}

TEST_F(NotTakenUp, AClientIsKilledAtAnEndThatDoesNotWait) {
  Child process = client_without_descriptor(check_all_pages);
  take_up_and_end(process, SessionKind::firecracker, /*is_mended=*/false, End::now, /*is_good=*/false);
  EXPECT_EQ(process.wait(), -SIGKILL);
}

TEST_F(NotTakenUp, OneWhoseMemoryHasGoneIsWaitedForNoLonger) {
  Child process = client_without_descriptor(check_all_pages);
  take_up_and_end(process, SessionKind::fork, /*is_mended=*/false, End::complete, /*is_good=*/true,
                  [&] { ::kill(process.pid(), SIGKILL); });
  EXPECT_EQ(process.wait(), -SIGKILL);
}

TEST_F(NotTakenUp, AChildOfAForkHasSigbusAfterAnEndThatDoesNotWait) {
  if (const std::string lacking = poisoning_lacks(); !lacking.empty()) GTEST_SKIP() << lacking;
  Child process = client_without_descriptor([](const ClientMemory& memory, const Channel&) {
    require(raises_sigbus(memory.bytes(100).data()), "page 100 can be read");
  });
  take_up_and_end(process, SessionKind::fork, /*is_mended=*/true, End::now, /*is_good=*/false);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

}  // namespace
}  // namespace uffdkit::test
