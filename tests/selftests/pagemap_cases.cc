// pagemap_ioctl: PAGEMAP_SCAN, and memory whose writes are recorded by asynchronous protection.
#include <array>
#include <atomic>
#include <cerrno>
#include <random>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

constexpr MemoryTypes kTracked = {MemoryType::anon,    MemoryType::shmem,           MemoryType::shmem_private,
                                  MemoryType::hugetlb, MemoryType::hugetlb_private, MemoryType::file_private};
constexpr MemoryTypes kFile = {MemoryType::file_private};

constexpr ByteCount kPage = kPage4K.bytes();
constexpr std::uint64_t kHugePages = kPage2M.bytes().value / kPage.value;  // small ones of a huge one
constexpr std::uint64_t kAllButWritten = abi::kPageWpAllowed | abi::kPageFile | abi::kPagePresent |
                                         abi::kPageSwapped | abi::kPagePfnZero | abi::kPageHuge;
constexpr std::uint64_t kAll = kAllButWritten | abi::kPageWritten;
constexpr std::uint64_t kArm = abi::kScanWpMatching | abi::kScanCheckWpAsync;

// `count` small pages from page `first` of the range.
AddressRange part(AddressRange range, std::uint64_t first, std::uint64_t count) {
  return {range.start + ByteCount(first * kPage.value), ByteCount(count * kPage.value)};
}
std::uint64_t pages_of(AddressRange range) {
  return range.length.value / kPage.value;
}

// Writes of which are recorded, and asked for.
class Tracked {
 public:
  explicit Tracked(Case& test)
      : test_(test),
        uffd_(test.uffd(abi::kFeatureWpUnpopulated | abi::kFeatureWpAsync | abi::kFeatureWpHugetlbfsShmem)),
        pagemap_(Pagemap::open(0, test.system()).value()) {}

  // From now on; what is there now counts as not written.
  void track(AddressRange range) {
    const Result<RangeIoctls> registered = uffd_.register_range(range, kWriteProtect);
    ASSERT_TRUE(registered) << registered.error().text();
    ASSERT_TRUE(registered->has(RangeIoctls(abi::kHasWriteprotect)));
    ASSERT_EQ(uffd_.protect(range).stop, Stop::complete);
    arm(range);
  }
  void stop(AddressRange range) { EXPECT_TRUE(uffd_.unregister_range(range)); }

  void arm(AddressRange range) {
    const auto scanned = pagemap_.scan(
        {.range = range, .mask = abi::kPageWritten, .protect_matching = true, .require_wp_async = true}, {});
    EXPECT_TRUE(scanned) << scanned.error().text();
  }

  struct Found {
    std::vector<ScannedRange> ranges;
    Address walk_end;
    std::uint64_t pages = 0;
  };
  Found scan(const ScanQuery& query, std::size_t entries) const {
    Found found;
    found.ranges.resize(entries);
    const Result<ScanResult> scanned = pagemap_.scan(query, found.ranges);
    EXPECT_TRUE(scanned) << scanned.error().text();
    found.ranges.resize(scanned ? scanned->ranges : 0);
    if (scanned) found.walk_end = scanned->walk_end;
    for (const ScannedRange& range : found.ranges) found.pages += pages_of(range.range);
    return found;
  }
  // What was written; at most so many ranges and pages.
  Found written(AddressRange range, std::size_t entries = 2048, std::uint64_t max_pages = 0) const {
    return scan(query(range, max_pages), entries);
  }
  // The same, and arms it again.
  Found take(AddressRange range, std::size_t entries = 2048, std::uint64_t max_pages = 0) const {
    ScanQuery arming = query(range, max_pages);
    arming.protect_matching = arming.require_wp_async = true;
    return scan(arming, entries);
  }

  // Writes to `count` pages from page `first`, every `step`th.
  void write(AddressRange range, std::uint64_t first, std::uint64_t count, std::uint64_t step = 1) {
    for (std::uint64_t page = first; page < first + count; page += step)
      ASSERT_TRUE(test_.here().write(part(range, page, 1).start, std::byte{0x5a}));
  }
  void write_all(AddressRange range) { write(range, 0, pages_of(range)); }

  // The ioctl with these arguments: its result, or -errno.
  int raw(AddressRange range, std::uint64_t flags, std::uint64_t mask, std::uint64_t any_of,
          std::uint64_t inverted, std::uint64_t report, std::size_t entries, bool vector = true) {
    const int fd = test_.system().open("/proc/self/pagemap", 0);
    std::vector<abi::PageRegion> found(std::max<std::size_t>(entries, 1));
    abi::ScanArgs args{.size = sizeof args,
                       .flags = flags,
                       .start = range.start.value,
                       .end = range.end().value,
                       .walk_end = 0,
                       .vec = vector ? reinterpret_cast<std::uintptr_t>(found.data()) : 0,
                       .vec_len = entries,
                       .max_pages = 0,
                       .category_inverted = inverted,
                       .category_mask = mask,
                       .category_anyof_mask = any_of,
                       .return_mask = report};
    const int result =
        test_.system().ioctl(fd, abi::kIoctlPagemapScan, reinterpret_cast<std::uintptr_t>(&args));
    test_.system().close(fd);
    return result;
  }

 private:
  static ScanQuery query(AddressRange range, std::uint64_t max_pages) {
    return {.range = range, .mask = abi::kPageWritten, .report = abi::kPageWritten, .max_pages = max_pages};
  }

  Case& test_;
  Uffd uffd_;
  Pagemap pagemap_;
};

AddressRange small_pages(Case& test, std::size_t pages) {
  return test.machine().map(MemoryType::anon, pages).range();
}

// Whole huge pages, present.
AddressRange huge_pages(Case& test, std::size_t count) {
  const Area area = test.machine().map(MemoryType::anon, count * kHugePages);
  if (test.here().advise(area.range(), Advice::huge_page) != 0) throw Lacking("needs transparent huge pages");
  for (std::size_t page = 0; page < area.pages; ++page)
    EXPECT_TRUE(test.here().write(area.at(page), std::byte{0}));
  for (std::size_t page = 0; page < area.pages; page += kHugePages)
    if (!test.is_mapped_huge(area.at(page))) throw Lacking("needs a free transparent huge page");
  return area.range();
}

// The list that the kernel's test goes through on each kind of memory.
void check_base(Tracked& tracked, AddressRange range) {
  const std::uint64_t pages = pages_of(range);
  const std::uint64_t middle = pages / 2;
  tracked.track(range);
  EXPECT_EQ(tracked.take(range, 1, pages - 2).ranges.size(), 0u) << "new pages are not written";

  tracked.write_all(range);
  EXPECT_EQ(tracked.written(range, 1).pages, pages) << "all pages are written";

  EXPECT_EQ(tracked.take(range, 1).pages, pages);
  tracked.write(range, 1, pages - 2);
  const Tracked::Found most = tracked.take(range, 1);
  EXPECT_EQ(most.ranges.size(), 1u) << "all but the first and the last";
  EXPECT_GE(most.pages, pages - 2);
  EXPECT_LE(most.pages, pages);
  EXPECT_EQ(tracked.written(range, 1).ranges.size(), 0u) << "they were armed again";

  tracked.write(range, middle, 1);
  const Tracked::Found one = tracked.take(range);
  EXPECT_EQ(one.ranges.size(), 1u) << "only the middle one";
  EXPECT_GE(one.pages, 1u);

  tracked.write(range, middle, 2);
  const Tracked::Found two = tracked.written(part(range, middle, 2), 1);
  ASSERT_EQ(two.ranges.size(), 1u) << "only the two in the middle, which alone are looked at";
  EXPECT_EQ(two.ranges[0].range, part(range, middle, 2));
  tracked.stop(range);
}

}  // namespace

// ---- arguments ------------------------------------------------------------------------------------------

KERNEL_CASE(pagemap_arguments, kAnonymous) {
  Tracked tracked(test);
  const AddressRange range = small_pages(test, 100);
  const AddressRange empty = {range.start, ByteCount(0)};
  constexpr std::uint64_t kWritten = abi::kPageWritten;
  tracked.track(range);
  EXPECT_EQ(tracked.raw(empty, 0, kAll, 0, 0, kAll, 50), 0) << "an empty range";
  EXPECT_EQ(tracked.raw(range, 0, kAll, 0, 0, kAll, 50, false), -EINVAL) << "a length without a vector";
  EXPECT_EQ(tracked.raw(range, 0, kAll, 0, 0, kAll, 0), 0) << "no length";
  EXPECT_EQ(tracked.raw(range, 0, kAll, 0, 0, kAll, 0, false), 0) << "no vector";
  EXPECT_EQ(tracked.raw(range, ~std::uint64_t{0}, kWritten, 0, 0, kWritten, 50), -EINVAL) << "all flags";
  EXPECT_EQ(tracked.raw(range, kArm | 0xff, kWritten, 0, 0, kWritten, 50), -EINVAL) << "more flags";
  EXPECT_GE(tracked.raw(range, 0, 0, 0, 0, kWritten, 50), 0) << "no mask";
  EXPECT_EQ(tracked.raw(range, 0, kWritten, kWritten, 0, 0, 50), 0) << "nothing to report";
  EXPECT_EQ(tracked.raw(range, 0, kWritten, 0, 0, 0x1000, 50), -EINVAL) << "a category to report";
  EXPECT_EQ(tracked.raw(range, kArm, 0xfff, kWritten, 0, kWritten, 50), -EINVAL) << "a category in the mask";
  EXPECT_GE(tracked.raw(range, kArm, 0, 0, kAll, kWritten, 50), 0) << "all categories inverted";
  EXPECT_GE(tracked.raw(range, kArm, kAll, 0, 0, kAll, 50), 0) << "arming whatever was found";
  EXPECT_GE(tracked.raw(range, 0, kAll, 0, 0, kAll, 50), 0);
  EXPECT_GE(tracked.raw(range, 0, 0, kAll, 0, kAll, 50), 0);
  EXPECT_GE(tracked.raw(range, 0, 0, 0, kAll, kAll, 50), 0);
  EXPECT_GE(tracked.raw(range, 0, kAll, kAll, 0, kAll, 50), 0);
}

KERNEL_CASE(pagemap_masks, kAnonymous) {
  Tracked tracked(test);
  const AddressRange range = small_pages(test, 10);
  constexpr std::uint64_t kThere = abi::kPageWritten | abi::kPagePresent;
  tracked.track(range);
  tracked.write_all(range);
  const auto all_with = [&](const ScanQuery& query) {
    const Tracked::Found found = tracked.scan(query, 10);
    ASSERT_EQ(found.ranges.size(), 1u);
    EXPECT_EQ(found.ranges[0].range, range);
    EXPECT_EQ(found.ranges[0].categories & kThere, kThere);
  };
  all_with({.range = range, .any_of = kAll, .report = kAll});
  all_with({.range = range, .mask = kThere, .report = kAll});
  all_with({.range = range, .mask = abi::kPageWritten, .any_of = abi::kPagePresent, .report = kAll});
  const auto nothing_with = [&](std::uint64_t category) {
    const ScanQuery query{.range = range, .mask = category, .inverted = category, .report = kAll};
    EXPECT_EQ(tracked.scan(query, 10).ranges.size(), 0u);
  };
  nothing_with(abi::kPageWritten);
  nothing_with(abi::kPagePresent);
  const Tracked::Found found = tracked.scan({.range = range,
                                             .any_of = kAll,
                                             .report = abi::kPageWritten,
                                             .protect_matching = true,
                                             .require_wp_async = true},
                                            10);
  ASSERT_EQ(found.ranges.size(), 1u);
  EXPECT_EQ(found.ranges[0].range, range);
  EXPECT_EQ(found.ranges[0].categories, abi::kPageWritten) << "only what was to be reported is";
}

// ---- what was written -----------------------------------------------------------------------------------

KERNEL_CASE(pagemap_patterns, kAnonymous) {
  constexpr std::uint64_t kPages = 1000;
  Tracked tracked(test);
  const AddressRange range = small_pages(test, kPages);
  tracked.track(range);
  tracked.take(range);

  tracked.write(range, 0, kPages, 2);
  EXPECT_EQ(tracked.written(range, kPages / 2).ranges.size(), kPages / 2) << "every other page";
  const std::size_t first = tracked.take(range, kPages / 2, kPages / 2 - 2).ranges.size();
  EXPECT_EQ(tracked.written(range, 2).ranges.size(), 2u);
  const std::size_t rest = tracked.take(range, kPages / 2).ranges.size();
  EXPECT_EQ(first + rest, kPages / 2) << "every other page, in two parts";

  tracked.write(range, 0, kPages, 2);
  tracked.write(range, kPages - 1, 1);
  EXPECT_EQ(tracked.take(range, kPages / 2, kPages / 2).ranges.size(), kPages / 2);
  EXPECT_EQ(tracked.take(range, kPages / 2).ranges.size(), 1u) << "what was more than the most pages";

  tracked.write_all(range);
  const Tracked::Found two = tracked.take(part(range, 1, 2), 1, 2);
  ASSERT_EQ(two.ranges.size(), 1u);
  EXPECT_EQ(two.ranges[0].range, part(range, 1, 2));
  const Tracked::Found others = tracked.written(range);
  ASSERT_EQ(others.ranges.size(), 2u);
  EXPECT_EQ(others.ranges[0].range, part(range, 0, 1));
  EXPECT_EQ(others.ranges[1].range, part(range, 3, kPages - 3));
}

KERNEL_CASE(pagemap_two_areas, kAnonymous) {
  Tracked tracked(test);
  const AddressRange first = small_pages(test, 100);
  const AddressRange second = small_pages(test, 100);
  for (const AddressRange range : {first, second}) {
    tracked.track(range);
    tracked.write_all(range);
  }
  tracked.arm(first);
  EXPECT_EQ(tracked.written(second, 1).pages, 100u);
  EXPECT_EQ(tracked.written(first, 1).pages, 0u);
}

KERNEL_CASE(pagemap_most_pages, kAnonymous) {
  constexpr std::uint64_t kPages = 1050;
  Tracked tracked(test);
  const AddressRange range = small_pages(test, kPages);
  tracked.track(range);
  tracked.write(range, 0, kPages, 2);
  std::size_t found = 0;
  for (int i = 0; i < 3; ++i) found += tracked.take(range, kPages / 2, kPages / 5).ranges.size();
  EXPECT_EQ(found, kPages / 2);
}

KERNEL_CASE(pagemap_small_vector, kAnonymous) {
  constexpr std::uint64_t kPages = 2000;
  constexpr int kRounds = 10;
  Tracked tracked(test);
  const AddressRange range = small_pages(test, kPages);
  tracked.track(range);
  std::mt19937 random(1);
  for (int round = 0; round < kRounds; ++round) {
    std::uint64_t writes = 0, seen = 0;
    for (std::uint64_t page = 0; page < kPages; ++page) {
      if (random() % 2 == 0) continue;
      tracked.write(range, page, 1);
      ++writes;
    }
    for (Address at = range.start; at < range.end();) {
      const Tracked::Found found = tracked.take({at, range.end() - at}, 50);
      ASSERT_LE(found.ranges.size(), 50u);
      ASSERT_GT(found.walk_end, at);
      seen += found.pages;
      at = found.walk_end;
    }
    EXPECT_EQ(seen, writes);
  }
}

KERNEL_CASE(pagemap_walk_end, kAnonymous) {
  constexpr std::uint64_t kPages = 1000;
  constexpr std::uint64_t kAny = ~std::uint64_t{0};
  Tracked tracked(test);
  const AddressRange range = small_pages(test, kPages);
  const AddressRange empty = {range.start, ByteCount(0)};
  tracked.track(range);
  tracked.write_all(range);
  const auto expect = [&](const char* what, const Tracked::Found& found, std::size_t ranges,
                          std::uint64_t end_page) {
    EXPECT_EQ(found.ranges.size(), ranges) << what;
    EXPECT_EQ(found.walk_end, part(range, end_page, 0).start) << what;
  };
  expect("nothing", tracked.written(empty, kPages), 0, 0);
  expect("nothing, armed", tracked.take(empty, kPages), 0, 0);
  expect("nothing, armed, not reported", tracked.take(empty, 0), 0, 0);
  expect("a big vector", tracked.written(range, kPages), 1, kPages);
  expect("one entry", tracked.written(range, 1), 1, kPages);
  expect("one entry, all pages", tracked.written(range, 1, kPages), 1, kPages);
  expect("half of the pages", tracked.written(range, kPages, kPages / 2), 1, kPages / 2);
  expect("one page", tracked.written(range, kPages, 1), 1, 1);
  expect("any number of pages", tracked.written(range, kPages, kAny), 1, kPages);

  tracked.arm(range);
  tracked.write(range, 0, kPages, 2);
  expect("sparse, a big vector", tracked.written(range, kPages), kPages / 2, kPages);
  expect("sparse, one entry", tracked.written(range, 1), 1, 2);
  expect("sparse, one entry, all pages", tracked.written(range, 1, kPages), 1, 2);
  expect("sparse, half a vector", tracked.written(range, kPages / 2, kPages), kPages / 2, kPages);
  expect("sparse, all pages", tracked.written(range, kPages, kPages), kPages / 2, kPages);
  expect("sparse, half of the pages", tracked.written(range, kPages, kPages / 2), kPages / 2, kPages);
  expect("sparse, one page", tracked.written(range, kPages, 1), 1, 2);
}

KERNEL_CASE(pagemap_again_and_again, kAnonymous) {
  Tracked tracked(test);
  const AddressRange range = small_pages(test, 1);
  tracked.track(range);
  for (int i = 0; i < 100; ++i) {
    ASSERT_EQ(tracked.written(range, 1).pages, 0u) << i;
    tracked.arm(range);
    tracked.write(range, 0, 1);
    ASSERT_EQ(tracked.written(range, 1).pages, 1u) << i;
    tracked.arm(range);
  }
}

// ---- each kind of memory --------------------------------------------------------------------------------

KERNEL_CASE(pagemap_base, kTracked) {
  Tracked tracked(test);
  check_base(tracked, test.machine().map(test.type(), is_huge(test.type()) ? 1 : 10).range());
}

KERNEL_CASE(pagemap_base_large, kAnonymous) {
  Tracked tracked(test);
  check_base(tracked, small_pages(test, 10 * kHugePages));
}

KERNEL_CASE(pagemap_base_thp, kAnonymous) {
  Tracked tracked(test);
  check_base(tracked, huge_pages(test, 1));
}

KERNEL_CASE(pagemap_thp, kAnonymous) {
  constexpr std::uint64_t kPages = 2 * kHugePages;
  Tracked tracked(test);
  const auto tracked_pages = [&] {
    const AddressRange range = huge_pages(test, 2);
    tracked.track(range);
    return range;
  };
  {
    const AddressRange range = tracked_pages();
    EXPECT_EQ(tracked.take(range).pages, 0u) << "new ones are not written";
    EXPECT_EQ(tracked.written(range).pages, 0u);
    tracked.write_all(range);
    const Tracked::Found all = tracked.take(range);
    ASSERT_EQ(all.ranges.size(), 1u);
    EXPECT_EQ(all.ranges[0].range, range);
    EXPECT_EQ(all.ranges[0].categories, abi::kPageWritten);
  }
  {
    const AddressRange range = tracked_pages();
    tracked.write(range, kPages / 2, 1);
    const Tracked::Found found = tracked.written(range);
    EXPECT_EQ(found.ranges.size(), 1u) << "only the middle page";
    EXPECT_GT(found.pages, 0u);
  }
  {
    const AddressRange range = tracked_pages();
    tracked.write_all(range);
    tracked.arm(part(range, 0, kPages / 2));
    const Tracked::Found found = tracked.written(range);
    ASSERT_EQ(found.ranges.size(), 1u) << "the first half was armed";
    EXPECT_EQ(found.ranges[0].range, part(range, kPages / 2, kPages / 2));
  }
  {
    const AddressRange range = tracked_pages();
    tracked.write_all(range);
    tracked.take(range, 2048, kPages / 2);
    const Tracked::Found found = tracked.written(range);
    ASSERT_EQ(found.ranges.size(), 1u) << "the first half was taken";
    EXPECT_EQ(found.ranges[0].range, part(range, kPages / 2, kPages / 2));
  }
  {
    const AddressRange range = tracked_pages();
    tracked.write_all(range);
    tracked.take(part(range, kPages / 2, kPages / 2), 2048, kPages / 2);
    const Tracked::Found found = tracked.written(range);
    ASSERT_EQ(found.ranges.size(), 1u) << "the second half was taken";
    EXPECT_EQ(found.pages, kPages / 2);
  }
  {
    const AddressRange range = tracked_pages();
    tracked.write_all(range);
    const Tracked::Found half = tracked.take(range, 1, kHugePages / 2);
    EXPECT_EQ(half.pages, kHugePages / 2) << "half of a huge page";
    const Tracked::Found found = tracked.written(range);
    ASSERT_EQ(found.ranges.size(), 1u);
    EXPECT_EQ(found.pages, kPages - kHugePages / 2);
  }
}

KERNEL_CASE(pagemap_mapped_file, kFile) {
  Tracked tracked(test);
  const Area area = test.machine().map(MemoryType::file_private, 10);
  for (std::size_t page = 0; page < area.pages; ++page) ASSERT_TRUE(test.here().read(area.at(page)));
  const Tracked::Found read =
      tracked.scan({.range = area.range(), .any_of = kAllButWritten, .report = kAllButWritten}, area.pages);
  ASSERT_EQ(read.ranges.size(), 1u);
  EXPECT_EQ(read.ranges[0].range, area.range());
  EXPECT_NE(read.ranges[0].categories & abi::kPageFile, 0u);

  tracked.track(area.range());
  tracked.write_all(area.range());
  const Tracked::Found written =
      tracked.scan({.range = area.range(),
                    .mask = abi::kPageWritten,
                    .any_of = abi::kPagePresent | abi::kPageSwapped | abi::kPageFile,
                    .report = kAll},
                   area.pages);
  ASSERT_EQ(written.ranges.size(), 1u);
  EXPECT_EQ(written.ranges[0].range, area.range());
  EXPECT_NE(written.ranges[0].categories & abi::kPageWritten, 0u);
}

KERNEL_CASE(pagemap_unmapped, kAnonymous) {
  Tracked tracked(test);
  const Area area = test.area();
  ASSERT_EQ(test.here().unmap(area.range()), 0);
  const Tracked::Found found =
      tracked.scan({.range = area.range(), .mask = kAllButWritten, .report = kAllButWritten}, area.pages);
  EXPECT_EQ(found.ranges.size(), 0u);
  EXPECT_EQ(found.walk_end, area.range().end());
}

// ---- mprotect -------------------------------------------------------------------------------------------

KERNEL_CASE(pagemap_mprotect, kAnonymous) {
  Tracked tracked(test);
  Thread& self = test.here();
  const AddressRange range = small_pages(test, 2);
  const AddressRange first = part(range, 0, 1), second = part(range, 1, 1);
  tracked.track(range);
  tracked.write_all(range);
  EXPECT_EQ(tracked.written(range, 1).pages, 2u);
  tracked.arm(range);
  EXPECT_EQ(tracked.written(range, 1).pages, 0u);

  ASSERT_EQ(self.map_over(second), 0);
  tracked.track(second);
  ASSERT_EQ(self.protect(first, false, false), 0);
  ASSERT_EQ(self.protect(range, true, false), 0);
  ASSERT_EQ(self.protect(range, true, true), 0);
  tracked.write_all(range);
  ASSERT_EQ(self.protect(first, false, false), 0);
  ASSERT_EQ(self.protect(first, true, false), 0);
  ASSERT_EQ(self.protect(first, true, true), 0);
  EXPECT_EQ(tracked.written(range, 1).pages, 2u) << "mprotect forgets nothing";

  tracked.arm(range);
  tracked.write_all(range);
  EXPECT_EQ(tracked.written(range, 1).pages, 2u);
}

KERNEL_CASE(pagemap_protections, kAnonymous) {
  Tracked tracked(test);
  Thread& self = test.here();
  const AddressRange range = small_pages(test, 16);
  ASSERT_EQ(self.protect(range, false, false), 0);
  tracked.track(range);
  for (std::uint64_t i = 0; i < 8; ++i) ASSERT_EQ(self.protect(part(range, 2 * i, 2), i != 5, i % 2 == 0), 0);
  tracked.arm(part(range, 1, 12));
  tracked.arm(range);
  EXPECT_EQ(tracked.take(range, 1, 14).ranges.size(), 0u) << "new pages are not written, whatever they allow";
}

// ---- races ----------------------------------------------------------------------------------------------

KERNEL_CASE(pagemap_no_write_is_lost, kAnonymous) {
  constexpr std::uint64_t kThreads = 3, kPagesEach = 32, kWrites = 8;
  constexpr int kRounds = 100;
  Tracked tracked(test);
  const AddressRange range = small_pages(test, kThreads * kPagesEach);
  tracked.track(range);
  tracked.write_all(range);
  EXPECT_GT(tracked.take(range).pages, 0u);
  EXPECT_EQ(tracked.take(range).pages, 0u);

  // The writers wait for each round to begin, and the scans for it to end.
  std::atomic<int> round = 0;
  std::atomic<std::uint64_t> written = 0;
  std::vector<std::unique_ptr<Work>> writers;
  const Uffd nobody = test.uffd();
  for (std::uint64_t writer = 0; writer < kThreads; ++writer)
    writers.push_back(test.machine().start(nobody, range, [&, writer](Thread& self) {
      for (int i = 1; i <= kRounds; ++i) {
        while (round < i) self.pause();
        for (std::uint64_t page = 0; page < kWrites; ++page)
          self.write(part(range, writer * kPagesEach + page, 1).start, std::byte(i));
        ++written;
      }
    }));
  for (int i = 1; i <= kRounds; ++i) {
    round = i;
    const std::uint64_t during = tracked.take(range).pages;
    while (written < kThreads * static_cast<std::uint64_t>(i)) test.here().pause();
    const std::uint64_t after = tracked.take(range).pages;
    // A page may be found twice: once armed again, its write is carried out again.
    EXPECT_LE(during, kThreads * kWrites) << "round " << i;
    EXPECT_LE(after, kThreads * kWrites) << "round " << i;
    EXPECT_GE(during + after, kThreads * kWrites) << "round " << i;
  }
  for (const auto& writer : writers) writer->join();
}

}  // namespace uffdkit::selftests
