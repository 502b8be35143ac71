// Descriptors of other processes: what receive() takes, and what a dead process looks like.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <cerrno>
#include <optional>

#include "support/child.h"
#include "support/mapping.h"
#include "support/serving.h"
#include "support/temp_dir.h"

namespace uffdkit {
namespace {

using test::Channel;
using test::Child;
using test::Mapping;
using test::page_of;
using test::user_faults;

bool is_open(int fd) {
  return fcntl(fd, F_GETFD) >= 0;
}

// Expects that `fd` is refused and closed; returns the error's text.
std::string refused(int fd) {
  const Result<Uffd> uffd = Uffd::receive(fd);
  EXPECT_FALSE(uffd);
  EXPECT_FALSE(is_open(fd));
  return uffd ? "" : uffd.error().text();
}

TEST(ReceiveDescriptor, TakesAnEnabledOneWithItsFeatures) {
  Result<Uffd> made = Uffd::create(user_faults(abi::kFeatureEventRemove | abi::kFeatureThreadId));
  if (!made) GTEST_SKIP() << "needs a userfaultfd: " << made.error().text();
  const Result<Uffd> received = Uffd::receive(made->release());
  ASSERT_TRUE(received) << received.error().text();
  EXPECT_EQ(received->features(), Features(abi::kFeatureEventRemove | abi::kFeatureThreadId));
}

TEST(ReceiveDescriptor, RefusesAPipe) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC | O_NONBLOCK), 0);
  const UniqueFd other(ends[1]);
  EXPECT_NE(refused(ends[0]).find("not a userfaultfd"), std::string::npos);
}

TEST(ReceiveDescriptor, RefusesADirectory) {
  const test::TempDir directory;
  EXPECT_NE(refused(open(directory.path().c_str(), O_RDONLY | O_DIRECTORY)).find("not a userfaultfd"),
            std::string::npos);
}

TEST(ReceiveDescriptor, RefusesABlockingOne) {
  UffdNeeds needs = user_faults();
  needs.non_blocking = false;
  Result<Uffd> made = Uffd::create(needs);
  if (!made) GTEST_SKIP() << "needs a userfaultfd: " << made.error().text();
  EXPECT_NE(refused(made->release()).find("O_NONBLOCK"), std::string::npos);
}

TEST(ReceiveDescriptor, RefusesOneThatIsNotEnabled) {
  const int fd = linux_system_calls().userfaultfd(O_CLOEXEC | O_NONBLOCK | abi::kUserModeOnly);
  if (fd < 0) GTEST_SKIP() << "needs the userfaultfd system call with UFFD_USER_MODE_ONLY (Linux 5.11)";
  EXPECT_NE(refused(fd).find("UFFDIO_API"), std::string::npos);
}

// A process that registers a page of its own and hands its userfaultfd over. Told 0 it exits; told 1 it calls
// exec and then waits for its standard input, which is the channel.
int client(const Channel& parent) {
  const Result<Uffd> uffd = Uffd::create(user_faults());
  if (!uffd) return 2;
  const Mapping memory = Mapping::anonymous(4096);
  if (!uffd->register_range(memory.range(), kMissing)) return 3;
  parent.send_fd(memory.page(0).value, uffd->fd());
  if (parent.receive() == 1) execl("/bin/sleep", "sleep", "1000", nullptr);
  return 0;
}

class OtherProcess : public testing::Test {
 protected:
  void SetUp() override {
    if (const Result<Uffd> possible = Uffd::create(user_faults()); !possible)
      GTEST_SKIP() << "needs a userfaultfd: " << possible.error().text();
    std::uint64_t address = 0;
    Result<Uffd> received = Uffd::receive(child_.channel().receive_fd(address).release());
    ASSERT_TRUE(received) << received.error().text();
    uffd_.emplace(std::move(*received));
    page_ = {Address(address), ByteCount(4096)};
  }

  Child child_{client};
  std::optional<Uffd> uffd_;
  AddressRange page_{};
};

TEST_F(OtherProcess, IsAliveWhileItRuns) {
  EXPECT_TRUE(uffd_->target_alive());
  EXPECT_EQ(uffd_->copy(page_.start, page_of(1)).stop, Stop::complete);
  EXPECT_TRUE(uffd_->target_alive());
}

TEST_F(OtherProcess, IsGoneAfterItsExit) {
  child_.channel().send(0);
  ASSERT_EQ(child_.wait(), 0);
  EXPECT_FALSE(uffd_->target_alive());
  for (const Outcome& outcome : {uffd_->copy(page_.start, page_of(1)), uffd_->zero(page_),
                                 uffd_->poison(page_), uffd_->resume(page_), uffd_->protect(page_)}) {
    EXPECT_EQ(outcome.stop, Stop::gone);
    EXPECT_EQ(outcome.os_error, ESRCH);
    EXPECT_EQ(outcome.done, ByteCount(0));
  }
  EXPECT_TRUE(uffd_->wake(page_));
  const Result<RangeIoctls> registered = uffd_->register_range(page_, kMissing);
  ASSERT_FALSE(registered);
  EXPECT_EQ(registered.error().os_error(), ENOMEM);
  EXPECT_FALSE(uffd_->unregister_range(page_));
}

TEST_F(OtherProcess, IsGoneAfterItsExec) {
  child_.channel().send(1);
  child_.channel().wait_closed();  // close-on-exec
  EXPECT_FALSE(uffd_->target_alive());
  EXPECT_EQ(uffd_->zero(page_).stop, Stop::gone);
}

TEST_F(OtherProcess, CannotBeMovedInto) {
  const Mapping source = Mapping::anonymous(4096);
  source.write(0, std::byte{1});
  EXPECT_EQ(uffd_->move(page_.start, source.range()).stop, Stop::invalid);
}

TEST(TargetAlive, ChangesNothingEvenAtTheTopOfTheAddressSpace) {
  UFFD_OR_SKIP(uffd, user_faults());
  // Where an unrandomised stack begins on x86-64.
  void* const top = reinterpret_cast<void*>(0x7fffffffe000);
  std::optional<Mapping> memory;
  try {
    memory.emplace(Mapping::map(top, 4096, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1));
  } catch (const std::exception&) {
    GTEST_SKIP() << "needs the last page below 2^47 to be free";
  }
  ASSERT_TRUE(uffd.register_range(memory->range(), kMissing));
  EXPECT_TRUE(uffd.target_alive());
  EXPECT_EQ(uffd.copy(memory->page(0), page_of(1)).stop, Stop::complete) << "the page was filled by asking";
}

}  // namespace
}  // namespace uffdkit
