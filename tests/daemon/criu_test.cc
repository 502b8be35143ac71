// uffdkit criu lazy-pages as a program, with process trees that a stand-in for criu restores.
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "support/criu_checkpoint.h"
#include "support/criu_restorer.h"
#include "support/lazy_pages.h"
#include "support/program.h"
#include "support/temp_dir.h"

namespace uffdkit {
namespace {

using test::CriuArea;
using test::CriuRestore;
using test::CriuTask;
using test::CriuWork;
using test::LazyPages;
using test::TempDir;

// Far from everything else that a process maps.
constexpr Address kHere{0x200000000000};

// Two mappings of some MiB with a hole between them.
std::vector<CriuArea> some_areas(std::size_t pages) {
  return {{.address = kHere, .pages = pages},
          {.address = Address(kHere.value + (pages + 500) * 4096), .pages = pages / 2}};
}

CriuTask task(std::int32_t pid, CriuWork work, std::size_t pages = 1024) {
  return {.pid = pid, .areas = some_areas(pages), .work = work};
}

class CriuLazyPages : public testing::Test {
 protected:
  void SetUp() override {
    const Result<Uffd> uffd = Uffd::create({.required = Features(abi::kFeatureEventFork)});
    if (!uffd) GTEST_SKIP() << "needs a userfaultfd that follows forks: " << uffd.error().text();
  }

  // Restores `tasks` with a daemon of their own; everything must be right, and end by itself.
  void restore_and_check(const std::vector<CriuTask>& tasks, const std::vector<std::string>& arguments = {}) {
    LazyPages daemon(directory_.path(), arguments);
    CriuRestore restore(directory_.path(), tasks, {.seed = 7});
    EXPECT_TRUE(restore.wait_released());
    EXPECT_TRUE(restore.wait_worked());
    EXPECT_EQ(daemon.wait(), 0) << daemon.log();
    EXPECT_EQ(restore.finish(), 0) << daemon.log();
  }

  void make_and_check(const std::vector<CriuTask>& tasks) {
    test::write_criu_checkpoint(directory_.path(), tasks);
    restore_and_check(tasks);
  }

  TempDir directory_;
};

TEST_F(CriuLazyPages, AnIdleTaskHasAllOfItsMemoryInTheEnd) {
  make_and_check({task(100, CriuWork::idle)});
}

TEST_F(CriuLazyPages, ATaskThatReadsPageAfterPageSeesEveryByte) {
  make_and_check({task(100, CriuWork::sequential)});
}

TEST_F(CriuLazyPages, ATaskThatReadsAtRandomSeesEveryByte) {
  make_and_check({task(100, CriuWork::random)});
}

TEST_F(CriuLazyPages, FourThreadsThatReadAtRandomSeeEveryByte) {
  make_and_check({task(100, CriuWork::threads, 4096)});
}

TEST_F(CriuLazyPages, ChildrenOfChildrenHaveTheMemoryOfTheirFork) {
  make_and_check({task(100, CriuWork::forks)});
}

TEST_F(CriuLazyPages, MemoryIsRightAfterItWasMovedUnmappedAndGivenBack) {
  make_and_check({task(100, CriuWork::changes)});
}

TEST_F(CriuLazyPages, AWholeTreeIsServedAtOnce) {
  make_and_check({task(1, CriuWork::idle), task(2, CriuWork::threads), task(3, CriuWork::zombie),
                  task(4, CriuWork::forks), task(5, CriuWork::exits), task(6, CriuWork::changes),
                  task(7, CriuWork::executes), task(8, CriuWork::is_killed), task(9, CriuWork::zombie),
                  task(10, CriuWork::random)});
}

TEST_F(CriuLazyPages, TasksThatExitEarlyAreNoError) {
  make_and_check({task(1, CriuWork::exits), task(2, CriuWork::executes), task(3, CriuWork::is_killed)});
}

TEST_F(CriuLazyPages, OneDirectoryIsRestoredAgainAndAgain) {
  const std::vector<CriuTask> tasks = {task(100, CriuWork::random), task(101, CriuWork::changes)};
  test::write_criu_checkpoint(directory_.path(), tasks);
  const auto files = [&] {
    std::set<std::string> names;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(directory_.path()))
      names.insert(entry.path().filename());
    return names;
  };
  restore_and_check(tasks);
  const std::set<std::string> after_one = files();
  restore_and_check(tasks);
  EXPECT_EQ(files(), after_one);
  EXPECT_FALSE(after_one.contains("lazy-pages.socket"));
}

TEST_F(CriuLazyPages, TwoRestoresOfOneDirectoryRunSideBySideInTheirWorkDirectories) {
  const std::vector<CriuTask> tasks = {task(100, CriuWork::random)};
  test::write_criu_checkpoint(directory_.path(), tasks);
  const TempDir one;
  const TempDir two;
  LazyPages first(directory_.path(), {"-W", one.path()});
  LazyPages second(directory_.path(), {"--work-dir", two.path()});
  CriuRestore restore_first(one.path(), tasks, {});
  CriuRestore restore_second(two.path(), tasks, {});
  EXPECT_TRUE(restore_first.wait_released() && restore_first.wait_worked());
  EXPECT_TRUE(restore_second.wait_released() && restore_second.wait_worked());
  EXPECT_EQ(first.wait(), 0);
  EXPECT_EQ(second.wait(), 0);
  EXPECT_EQ(restore_first.finish(), 0);
  EXPECT_EQ(restore_second.finish(), 0);
}

TEST_F(CriuLazyPages, MoreMappingsThanASessionHasRegionsAreServed) {
  CriuTask many = task(100, CriuWork::random);
  many.areas.clear();
  for (std::uint64_t i = 0; i < 1500; ++i)
    many.areas.push_back({.address = Address(kHere.value + i * i * 8192), .pages = 1, .dense = true});
  make_and_check({many});
}

TEST_F(CriuLazyPages, ARestoreThatFailsEndsItWithOne) {
  const std::vector<CriuTask> tasks = {task(100, CriuWork::idle)};
  test::write_criu_checkpoint(directory_.path(), tasks);
  LazyPages daemon(directory_.path(), {});
  CriuRestore restore(directory_.path(), tasks, {.fails = true});
  EXPECT_EQ(daemon.wait(), 1);
  EXPECT_NE(daemon.log().find("gone before it was done"), std::string::npos) << daemon.log();
  EXPECT_EQ(restore.finish(), 0);
}

TEST_F(CriuLazyPages, PagesThatAreNotInTheImagesEndTheRestoreBeforeATaskRuns) {
  std::vector<CriuTask> tasks = {task(100, CriuWork::idle)};
  // The restore ends with its tasks, so what they would read of nobody's memory does not matter.
  tasks[0].early_faults = 0;
  test::write_criu_checkpoint(directory_.path(), tasks);
  std::filesystem::resize_file(directory_ / "pages-100.img", 4096 * 100);
  LazyPages daemon(directory_.path(), {});
  CriuRestore restore(directory_.path(), tasks, {});
  EXPECT_EQ(daemon.wait(), 1);
  EXPECT_NE(daemon.log().find("pages-100.img has 409600 bytes"), std::string::npos) << daemon.log();
  EXPECT_NE(restore.finish(), 0);
}

TEST_F(CriuLazyPages, ItReplacesASocketThatIsLeftOver) {
  const std::vector<CriuTask> tasks = {task(100, CriuWork::sequential)};
  test::write_criu_checkpoint(directory_.path(), tasks);
  {
    LazyPages killed(directory_.path(), {});
    kill(killed.pid(), SIGKILL);
    EXPECT_EQ(killed.wait(), -SIGKILL);
  }
  EXPECT_TRUE(std::filesystem::exists(directory_ / "lazy-pages.socket"));
  restore_and_check(tasks);
}

TEST_F(CriuLazyPages, ASignalBeforeTheRestoreEndsItAndLeavesNoSocket) {
  test::write_criu_checkpoint(directory_.path(), {task(100, CriuWork::idle)});
  LazyPages daemon(directory_.path(), {});
  kill(daemon.pid(), SIGTERM);
  EXPECT_EQ(daemon.wait(), 1);
  EXPECT_FALSE(std::filesystem::exists(directory_ / "lazy-pages.socket"));
}

TEST_F(CriuLazyPages, ItTakesTheOptionsOfCriu) {
  const std::vector<CriuTask> tasks = {task(100, CriuWork::sequential)};
  test::write_criu_checkpoint(directory_.path(), tasks);
  const TempDir work;
  LazyPages daemon(directory_.path(),
                   {"--work-dir", work.path(), "-v4", "-o", "daemon.log", "--pidfile", "pid"});
  std::string pid;
  std::ifstream(work / "pid") >> pid;
  CriuRestore restore(work.path(), tasks, {});
  EXPECT_TRUE(restore.wait_released() && restore.wait_worked());
  EXPECT_EQ(pid, std::to_string(daemon.pid()));
  EXPECT_EQ(daemon.wait(), 0) << daemon.log();
  EXPECT_EQ(restore.finish(), 0);
  EXPECT_EQ(daemon.log(), "");
  EXPECT_GT(std::filesystem::file_size(work / "daemon.log"), 0u);
}

TEST_F(CriuLazyPages, AsADaemonItServesInTheBackground) {
  const std::vector<CriuTask> tasks = {task(100, CriuWork::random)};
  test::write_criu_checkpoint(directory_.path(), tasks);
  const test::Finished started = test::run_program(
      "uffdkit", {"criu", "lazy-pages", "-D", directory_.path(), "-d", "--pidfile", "pid", "-o", "log"});
  ASSERT_EQ(started.exit_code, 0) << started.err;
  pid_t pid = 0;
  std::ifstream(directory_ / "pid") >> pid;
  ASSERT_GT(pid, 0);
  const UniqueFd daemon(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
  ASSERT_TRUE(daemon) << "it has ended: " << std::ifstream(directory_ / "log").rdbuf();
  CriuRestore restore(directory_.path(), tasks, {});
  EXPECT_TRUE(restore.wait_released() && restore.wait_worked());
  EXPECT_EQ(restore.finish(), 0);
  pollfd ended{.fd = daemon.get(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(poll(&ended, 1, 30'000), 1) << std::ifstream(directory_ / "log").rdbuf();
  // Nothing happens to one that has ended.
  syscall(SYS_pidfd_send_signal, daemon.get(), SIGKILL, nullptr, 0);
}

TEST(CriuCommand, RefusesWhatIsNoCheckpoint) {
  const TempDir directory;
  const auto run = [&] {
    return test::run_program("uffdkit", {"criu", "lazy-pages", "-D", directory.path()});
  };
  test::Finished refused = run();
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_NE(refused.err.find("inventory.img"), std::string::npos) << refused.err;
  test::write_file(directory / "inventory.img", test::criu_pstree({1}));
  refused = run();
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_NE(refused.err.find("inventory.img at byte 0: the magic number"), std::string::npos) << refused.err;
}

TEST(CriuCommand, RefusesAPageServer) {
  EXPECT_EQ(test::run_program("uffdkit", {"criu", "lazy-pages", "--page-server"}).exit_code, 2);
}

}  // namespace
}  // namespace uffdkit
