// PAGEMAP_SCAN on the running kernel: finding and re-arming written pages.
#include <gtest/gtest.h>
#include <uffdkit/uffd.h>

#include <array>
#include <cerrno>
#include <vector>

#include "support/child.h"
#include "support/mapping.h"
#include "support/serving.h"

namespace uffdkit {
namespace {

using test::Channel;
using test::Child;
using test::Mapping;
using test::user_faults;

// The written pages of `range`, in one round of a dirty-tracking loop: they are found and armed again.
ScanQuery written_pages(AddressRange range) {
  return {.range = range,
          .mask = abi::kPageWritten,
          .report = abi::kPageWritten,
          .protect_matching = true,
          .require_wp_async = true};
}

std::vector<AddressRange> found_ranges(const Pagemap& pagemap, const ScanQuery& query) {
  std::array<ScannedRange, 16> found;
  const Result<ScanResult> result = pagemap.scan(query, found);
  if (!result) {
    ADD_FAILURE() << result.error().text();
    return {};
  }
  std::vector<AddressRange> ranges;
  for (const ScannedRange& entry : std::span(found).first(result->ranges)) ranges.push_back(entry.range);
  return ranges;
}

#define WRITE_TRACKING_OR_SKIP(uffd, memory)                       \
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureWpAsync));           \
  ASSERT_TRUE(uffd.register_range(memory.range(), kWriteProtect)); \
  ASSERT_EQ(uffd.protect(memory.range()).stop, Stop::complete)

TEST(PagemapScan, FindsWhatWasWrittenSinceTheLastRound) {
  const Mapping memory = Mapping::anonymous(8 * 4096);
  WRITE_TRACKING_OR_SKIP(uffd, memory);
  const Result<Pagemap> pagemap = Pagemap::open(0);
  ASSERT_TRUE(pagemap);
  memory.write(2, std::byte{1});
  memory.write(3, std::byte{1});
  memory.write(6, std::byte{1});
  const ScanQuery query = written_pages(memory.range());
  EXPECT_EQ(found_ranges(*pagemap, query), (std::vector{memory.pages(2, 2), memory.pages(6, 1)}));
  EXPECT_TRUE(found_ranges(*pagemap, query).empty());
  memory.write(3, std::byte{2});
  EXPECT_EQ(found_ranges(*pagemap, query), std::vector{memory.pages(3, 1)});
}

TEST(PagemapScan, GoesOnWhereASmallVectorEndedIt) {
  const Mapping memory = Mapping::anonymous(8 * 4096);
  WRITE_TRACKING_OR_SKIP(uffd, memory);
  const Result<Pagemap> pagemap = Pagemap::open(0);
  ASSERT_TRUE(pagemap);
  std::vector<AddressRange> written;
  for (const std::size_t page : {1u, 3u, 7u}) {
    memory.write(page, std::byte{1});
    written.push_back(memory.pages(page, 1));
  }
  std::vector<AddressRange> found;
  Address from = memory.page(0);
  while (from < memory.range().end()) {
    ScannedRange one;
    const Result<ScanResult> result =
        pagemap->scan(written_pages({from, memory.range().end() - from}), {&one, 1});
    ASSERT_TRUE(result) << result.error().text();
    ASSERT_GT(result->walk_end, from);
    if (result->ranges == 1) found.push_back(one.range);
    from = result->walk_end;
  }
  EXPECT_EQ(found, written);
}

TEST(PagemapScan, StopsAfterTheMostPagesAskedFor) {
  const Mapping memory = Mapping::anonymous(8 * 4096);
  WRITE_TRACKING_OR_SKIP(uffd, memory);
  const Result<Pagemap> pagemap = Pagemap::open(0);
  ASSERT_TRUE(pagemap);
  for (std::size_t page = 0; page < 8; ++page) memory.write(page, std::byte{1});
  ScanQuery query = written_pages(memory.range());
  query.max_pages = 3;
  std::array<ScannedRange, 4> found;
  const Result<ScanResult> result = pagemap->scan(query, found);
  ASSERT_TRUE(result) << result.error().text();
  ASSERT_EQ(result->ranges, 1u);
  EXPECT_EQ(found[0].range, memory.pages(0, 3));
  EXPECT_EQ(result->walk_end, memory.page(3));
}

TEST(PagemapScan, WorksOnAnotherProcess) {
  if (const auto possible = Uffd::create(user_faults(abi::kFeatureWpAsync)); !possible)
    GTEST_SKIP() << "needs the feature wp-async: " << possible.error().text();
  const Mapping memory = Mapping::anonymous(4 * 4096);
  Child child([&](const Channel& parent) {
    const Result<Uffd> uffd = Uffd::create(user_faults(abi::kFeatureWpAsync));
    if (!uffd || !uffd->register_range(memory.range(), kWriteProtect)) return 2;
    if (uffd->protect(memory.range()).stop != Stop::complete) return 3;
    for (std::uint64_t page = 1; page < 4; ++page) {
      memory.write(page, std::byte{1});
      parent.send(page);
      parent.receive();
    }
    return 0;
  });
  const Result<Pagemap> pagemap = Pagemap::open(child.pid());
  if (!pagemap) GTEST_SKIP() << "needs the right to ptrace a child: " << pagemap.error().text();
  for (std::size_t page = 1; page < 4; ++page) {
    child.channel().receive();
    EXPECT_EQ(found_ranges(*pagemap, written_pages(memory.range())), std::vector{memory.pages(page, 1)});
    child.channel().send(0);
  }
  EXPECT_EQ(child.wait(), 0);
  EXPECT_TRUE(found_ranges(*pagemap, written_pages(memory.range())).empty()) << "the process has exited";
}

TEST(PagemapScan, RefusesMemoryWithoutAsynchronousProtectionWhereItIsRequired) {
  UFFD_OR_SKIP(possible, user_faults(abi::kFeatureWpAsync));
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kWriteProtect));
  const Result<Pagemap> pagemap = Pagemap::open(0);
  ASSERT_TRUE(pagemap);
  std::array<ScannedRange, 4> found;
  const Result<ScanResult> result = pagemap->scan(written_pages(memory.range()), found);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().os_error(), EPERM);
}

TEST(PagemapScan, ArmsWithoutReportingWhereNoVectorIsGiven) {
  const Mapping memory = Mapping::anonymous(4 * 4096);
  WRITE_TRACKING_OR_SKIP(uffd, memory);
  const Result<Pagemap> pagemap = Pagemap::open(0);
  ASSERT_TRUE(pagemap);
  memory.write(1, std::byte{1});
  const Result<ScanResult> result = pagemap->scan(written_pages(memory.range()), {});
  ASSERT_TRUE(result) << result.error().text();
  EXPECT_EQ(result->ranges, 0u);
  EXPECT_EQ(result->walk_end, memory.range().end());
  EXPECT_TRUE(found_ranges(*pagemap, written_pages(memory.range())).empty());
}

TEST(PagemapOpen, NamesTheFileOfAProcessThatIsNotThere) {
  Child child([](const Channel&) { return 0; });
  const int pid = child.pid();
  child.wait();
  const Result<Pagemap> pagemap = Pagemap::open(pid);
  ASSERT_FALSE(pagemap);
  EXPECT_NE(pagemap.error().message().find("/pagemap"), std::string::npos);
}

}  // namespace
}  // namespace uffdkit
