// hugetlbfs memory on the running kernel. Each test takes at most two huge pages.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <uffdkit/uffd.h>

#include <optional>
#include <vector>

#include "support/huge_pages.h"
#include "support/mapping.h"
#include "support/serving.h"

#ifndef MFD_HUGE_2MB
#define MFD_HUGE_2MB (21U << 26)
#endif

namespace uffdkit {
namespace {

using test::Background;
using test::HugePages;
using test::Mapping;
using test::next_fault;
using test::user_faults;

// Two huge pages of a memory file, mapped shared twice: as the client sees them, and as a server fills them.
class HugePagesTest : public testing::Test {
 protected:
  static constexpr std::size_t kSize = HugePages::kBytes;

  void SetUp() override {
    if (!pool_.lacking().empty()) GTEST_SKIP() << pool_.lacking();
    Result<Uffd> made =
        Uffd::create(user_faults(abi::kFeatureMissingHugetlbfs | abi::kFeatureMinorHugetlbfs));
    if (!made) GTEST_SKIP() << "needs a userfaultfd for huge pages: " << made.error().text();
    uffd_.emplace(std::move(*made));
    file_ = test::memory_file(2 * kSize, MFD_HUGETLB | MFD_HUGE_2MB);
    memory_.emplace(Mapping::of_file(file_.get(), 2 * kSize, MAP_SHARED));
  }
  AddressRange huge_page(std::size_t index) const {
    return {memory_->range().start + ByteCount(index * kSize), ByteCount(kSize)};
  }

  const HugePages pool_{2};
  std::optional<Uffd> uffd_;
  UniqueFd file_;
  std::optional<Mapping> memory_;
};

TEST_F(HugePagesTest, CopyFillsAWholeHugePage) {
  ASSERT_TRUE(uffd_->register_range(memory_->range(), kMissing));
  const std::vector<std::byte> bytes(kSize, std::byte{0x31});
  std::byte seen{};
  Background reader(*uffd_, memory_->range(), [&] { seen = memory_->read(512 + 7); });
  EXPECT_EQ(next_fault(*uffd_).address, huge_page(1).start) << "rounded to the huge page";
  const Outcome outcome = uffd_->copy(huge_page(1).start, bytes);
  reader.join();
  EXPECT_EQ(outcome.stop, Stop::complete);
  EXPECT_EQ(outcome.done, ByteCount(kSize));
  EXPECT_EQ(seen, std::byte{0x31});
}

TEST_F(HugePagesTest, CopyOfASmallPageIsInvalid) {
  ASSERT_TRUE(uffd_->register_range(memory_->range(), kMissing));
  EXPECT_EQ(uffd_->copy(memory_->page(0), test::page_of(1)).stop, Stop::invalid);
}

TEST_F(HugePagesTest, ZeroIsInvalid) {
  const Result<RangeIoctls> ioctls = uffd_->register_range(memory_->range(), kMissing);
  ASSERT_TRUE(ioctls);
  EXPECT_FALSE(ioctls->has(RangeIoctls(abi::kHasZeropage)));
  EXPECT_EQ(uffd_->zero(huge_page(0)).stop, Stop::invalid);
}

TEST_F(HugePagesTest, ResumeMapsWhatASecondMappingWrote) {
  const Mapping server = Mapping::of_file(file_.get(), 2 * kSize, MAP_SHARED);
  server.write(0, std::byte{0x21});
  ASSERT_TRUE(uffd_->register_range(memory_->range(), kMissing | kMinor));
  std::byte seen{};
  Background reader(*uffd_, memory_->range(), [&] { seen = memory_->read(0); });
  EXPECT_EQ(next_fault(*uffd_).kind, Fault::Kind::minor);
  EXPECT_EQ(uffd_->resume(huge_page(0)).stop, Stop::complete);
  reader.join();
  EXPECT_EQ(seen, std::byte{0x21});
}

}  // namespace
}  // namespace uffdkit
