// A userfaultfd of one's own memory is known by what the kernel answers; one of another process never is.
#include "kernel/own_memory.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <thread>

#include "support/child.h"
#include "support/mapping.h"
#include "support/serving.h"

namespace uffdkit {
namespace {

using test::Channel;
using test::Child;
using test::Mapping;
using test::user_faults;

class OwnMemory : public testing::TestWithParam<OwnMemoryWay> {
 protected:
  void SetUp() override {
    const Result<KernelFeatures> kernel = probe_features();
    if (!kernel) GTEST_SKIP() << "needs a userfaultfd: " << kernel.error().text();
    if (GetParam() == OwnMemoryWay::move && !kernel->available.has(Features(abi::kFeatureMove)))
      GTEST_SKIP() << "needs a kernel with UFFDIO_MOVE (6.8)";
  }
  static bool is_own(const Uffd& uffd) { return is_of_own_memory(uffd, GetParam()); }
  // What a child sends.
  static Uffd receive(const Child& child) {
    std::uint64_t ignored = 0;
    Result<Uffd> uffd = Uffd::receive(child.channel().receive_fd(ignored).release());
    EXPECT_TRUE(uffd) << uffd.error().text();
    return std::move(*uffd);
  }
};

INSTANTIATE_TEST_SUITE_P(Ways, OwnMemory, testing::Values(OwnMemoryWay::move, OwnMemoryWay::register_page),
                         [](const testing::TestParamInfo<OwnMemoryWay>& way) {
                           return way.param == OwnMemoryWay::move ? "Move" : "RegisterPage";
                         });

TEST_P(OwnMemory, IsKnown) {
  const Result<Uffd> bare = Uffd::create(user_faults());
  ASSERT_TRUE(bare) << bare.error().text();
  EXPECT_TRUE(is_own(*bare));
  const Mapping memory = Mapping::anonymous(64 * 4096);
  ASSERT_TRUE(bare->register_range(memory.range(), kMissing));
  EXPECT_TRUE(is_own(*bare));
}

TEST_P(OwnMemory, OfAnotherProcessIsNotOurs) {
  Child child([](const Channel& parent) {
    const Result<Uffd> uffd = Uffd::create(user_faults());
    if (!uffd) return 1;
    parent.send_fd(0, uffd->fd());
    parent.receive();
    return 0;
  });
  const Uffd uffd = receive(child);
  for (int times = 0; times < 20; ++times) EXPECT_FALSE(is_own(uffd));
  child.kill();
  EXPECT_FALSE(is_own(uffd)) << "when it is gone";
}

TEST_P(OwnMemory, OfAProcessWhoseEventsWaitIsNotOurs) {
  Child child([](const Channel& parent) {
    const Result<Uffd> uffd = Uffd::create(user_faults(abi::kFeatureEventRemove));
    if (!uffd) return 1;
    const Mapping memory = Mapping::anonymous(4096);
    if (!uffd->register_range(memory.range(), kMissing)) return 2;
    std::thread([&] { madvise(memory.data(), 4096, MADV_DONTNEED); }).detach();
    while (uffd->target() != Target::changing) usleep(1000);
    parent.send_fd(0, uffd->fd());
    parent.receive();
    return 0;
  });
  const Uffd uffd = receive(child);
  EXPECT_FALSE(is_own(uffd));
  child.kill();
}

TEST_P(OwnMemory, NothingOfTheOtherProcessIsChangedByTheQuestion) {
  Child child([](const Channel& parent) {
    const Result<Uffd> uffd = Uffd::create(user_faults());
    if (!uffd) return 1;
    const Mapping memory = Mapping::anonymous(16 * 4096);
    if (!uffd->register_range(memory.range(), kMissing)) return 2;
    parent.send_fd(memory.page(0).value, uffd->fd());
    parent.receive();
    // Every page is missing still: nothing answers these but who reads the userfaultfd.
    for (std::size_t page = 0; page < 16; ++page)
      if (uffd->zero({memory.page(page), ByteCount(4096)}).stop != Stop::complete) return 3;
    return 0;
  });
  const Uffd uffd = receive(child);
  for (int times = 0; times < 20; ++times) EXPECT_FALSE(is_own(uffd));
  child.channel().send(1);
  EXPECT_EQ(child.wait(), 0);
}

TEST(OwnMemoryOfAKernel, IsAskedByMoveWhereThereIsOne) {
  const Result<KernelFeatures> kernel = probe_features();
  if (!kernel) GTEST_SKIP() << "needs a userfaultfd: " << kernel.error().text();
  EXPECT_EQ(own_memory_way() == OwnMemoryWay::move, kernel->available.has(Features(abi::kFeatureMove)));
}

}  // namespace
}  // namespace uffdkit
