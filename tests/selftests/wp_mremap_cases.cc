// uffd-wp-mremap: who did not ask for REMAP events has unarmed pages where mremap(2) moved armed ones.
#include <array>
#include <vector>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

constexpr MemoryTypes kSmallPages = {MemoryType::anon, MemoryType::shmem};

// Memory of one page, or of as many as a huge page has small ones, with something in it.
Area filled(Case& test, MemoryType type, std::size_t pages) {
  const Area area = test.machine().map(type, pages);
  for (std::size_t page = 0; page < pages; ++page)
    EXPECT_TRUE(test.here().write(area.at(page), std::byte{1}));
  return area;
}

bool is_swapped(Case& test, AddressRange range) {
  const Result<Pagemap> pagemap = Pagemap::open(0, test.system());
  std::array<ScannedRange, 1> found;
  const Result<ScanResult> scan = pagemap->scan(
      {.range = range, .mask = abi::kPageSwapped, .inverted = abi::kPageSwapped, .report = abi::kPageSwapped},
      found);
  if (!scan) throw Lacking("needs PAGEMAP_SCAN: " + scan.error().text());
  return scan->ranges == 0;
}

Area filled_huge(Case& test) {
  const Area area = filled(test, test.type(), kPage2M.bytes().value / kPage4K.bytes().value);
  test.here().advise(area.range(), Advice::huge_page);
  if (test.here().advise(area.range(), Advice::collapse) != 0 || !test.is_mapped_huge(area.start))
    throw Lacking("needs MADV_COLLAPSE, and a free transparent huge page");
  return area;
}

enum class Swapped : bool { no, yes };

void check_mremap(Case& test, const Area& area, Swapped swapped) {
  Thread& self = test.here();
  const Uffd uffd = test.uffd();
  ASSERT_TRUE(uffd.register_range(area.range(), kWriteProtect));
  ASSERT_EQ(uffd.protect(area.range()).stop, Stop::complete);
  if (swapped == Swapped::yes) {
    self.advise(area.range(), Advice::page_out);
    if (!is_swapped(test, area.range())) throw Lacking("needs swap");
  }
  for (std::size_t page = 0; page < area.pages; ++page) ASSERT_TRUE(self.is_armed(area.at(page)));
  const Address to = test.machine().place(area.range().length);
  ASSERT_EQ(self.remap(area.range(), to), 0);
  for (std::size_t page = 0; page < area.pages; ++page)
    ASSERT_FALSE(self.is_armed(to + ByteCount(page * area.page_bytes.value))) << "page " << page;
  EXPECT_EQ(self.read(to), std::byte{1});
}

// Of each size that the machine has.
void check_transparent(Case& test, Swapped swapped) {
  const std::vector<ByteCount> sizes = test.machine().transparent_sizes(test.type());
  if (sizes.empty()) throw Lacking("needs transparent huge pages between 4 KiB and 2 MiB (Linux 6.8)");
  for (const ByteCount bytes : sizes) {
    SCOPED_TRACE(bytes.value);
    check_mremap(test, test.machine().map_transparent(test.type(), bytes), swapped);
    if (testing::Test::HasFatalFailure()) return;
  }
}

}  // namespace

KERNEL_CASE(wp_mremap, kAllTypes) {
  check_mremap(test, filled(test, test.type(), 1), Swapped::no);
}

KERNEL_CASE(wp_mremap_swapped, kSmallPages) {
  check_mremap(test, filled(test, test.type(), 1), Swapped::yes);
}

KERNEL_CASE(wp_mremap_mthp, kSmallPages) {
  check_transparent(test, Swapped::no);
}

KERNEL_CASE(wp_mremap_mthp_swapped, kSmallPages) {
  check_transparent(test, Swapped::yes);
}

KERNEL_CASE(wp_mremap_thp, kSmallPages) {
  check_mremap(test, filled_huge(test), Swapped::no);
}

KERNEL_CASE(wp_mremap_thp_swapped, kSmallPages) {
  check_mremap(test, filled_huge(test), Swapped::yes);
}

}  // namespace uffdkit::selftests
