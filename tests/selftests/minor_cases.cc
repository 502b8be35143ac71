// Pages that are in the page cache but not mapped: minor, minor-wp, minor-collapse.
#include <algorithm>
#include <variant>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

constexpr std::uint64_t kMinorFeatures = abi::kFeatureMinorShmem | abi::kFeatureMinorHugetlbfs;

std::vector<std::byte> flipped(std::size_t page, ByteCount bytes) {
  std::vector<std::byte> made = contents(page, bytes);
  std::ranges::transform(made, made.begin(), [](std::byte b) { return ~b; });
  return made;
}

bool all_flipped(Thread& self, const Area& area) {
  std::vector<std::byte> seen(area.page_bytes.value);
  for (std::size_t page = 0; page < area.pages; ++page)
    if (!self.read(area.at(page), seen) || seen != flipped(page, area.page_bytes)) return false;
  return true;
}

// Writes contents through the alias, which gives no fault; then reads all of the memory, where each page
// gives one minor fault, which flips the page's bytes through the alias and maps it.
void read_by_minor_faults(Case& test, const Uffd& uffd, const Area& area, Protect protect) {
  const ByteCount bytes = area.page_bytes;
  for (std::size_t page = 0; page < area.pages; ++page)
    EXPECT_TRUE(test.here().write(area.alias(page), contents(page, bytes)));
  EXPECT_FALSE(uffd.wait_readable(0).value()) << "the alias gives no faults";

  bool right = false;
  std::size_t minor = 0, missing = 0;
  auto reader =
      test.machine().start(uffd, area.range(), [&](Thread& self) { right = all_flipped(self, area); });
  serve(uffd, reader, [&](const Message& message) {
    const auto& fault = std::get<Fault>(message);
    ++(fault.kind == Fault::Kind::minor ? minor : missing);
    const std::size_t page = area.page_of(fault.address);
    EXPECT_TRUE(test.here().write(area.alias(page), flipped(page, bytes)));
    EXPECT_EQ(uffd.resume(area.page(page), Wake::yes, protect).stop, Stop::complete);
  });
  reader->join();
  EXPECT_TRUE(right);
  EXPECT_EQ(minor, area.pages);
  EXPECT_EQ(missing, 0u);
}

}  // namespace

KERNEL_CASE(minor, kSharedFiles) {
  const Uffd uffd = test.uffd(kMinorFeatures);
  const Area area = test.area();
  ASSERT_TRUE(uffd.register_range(area.range(), kMinor));
  read_by_minor_faults(test, uffd, area, Protect::no);
}

KERNEL_CASE(minor_wp, kSharedFiles) {
  // No feature tells of CONTINUE's mode to protect; a kernel that has this one has it.
  const Uffd uffd = test.uffd(kMinorFeatures | abi::kFeatureWpUnpopulated);
  const Area area = test.area();
  ASSERT_TRUE(uffd.register_range(area.range(), kMinor | kWriteProtect));
  read_by_minor_faults(test, uffd, area, Protect::yes);

  std::size_t protect_faults = 0;
  auto writer = test.machine().start(uffd, area.range(), [&](Thread& self) {
    for (std::size_t page = 0; page < area.pages; ++page) self.write(area.at(page), std::byte{0x77});
  });
  serve(uffd, writer, [&](const Message& message) {
    const auto& fault = std::get<Fault>(message);
    EXPECT_EQ(fault.kind, Fault::Kind::write_protect);
    EXPECT_EQ(uffd.unprotect(area.page(area.page_of(fault.address))).stop, Stop::complete);
    ++protect_faults;
  });
  writer->join();
  EXPECT_EQ(protect_faults, area.pages);
  for (std::size_t page = 0; page < area.pages; ++page)
    EXPECT_EQ(test.here().read(area.alias(page)), std::byte{0x77});
}

KERNEL_CASE(minor_collapse, kShmem) {
  const Uffd uffd = test.uffd(kMinorFeatures);
  // One huge page's worth of a file, where a huge page can be.
  const Area area = test.machine().map(MemoryType::shmem, kPage2M.bytes().value / kPage4K.bytes().value);
  ASSERT_TRUE(uffd.register_range(area.range(), kMinor));
  read_by_minor_faults(test, uffd, area, Protect::no);

  if (test.here().advise(area.range(), Advice::collapse) != 0)
    throw Lacking("needs MADV_COLLAPSE of files in memory, and a free transparent huge page");
  bool same = false;
  std::size_t messages = 0;
  auto reader =
      test.machine().start(uffd, area.range(), [&](Thread& self) { same = all_flipped(self, area); });
  serve(uffd, reader, [&](const Message&) {
    ++messages;
    EXPECT_TRUE(uffd.unregister_range(area.range()));
  });
  reader->join();
  EXPECT_TRUE(same);
  EXPECT_EQ(messages, 0u);
  EXPECT_TRUE(test.is_mapped_huge(area.start));
}

}  // namespace uffdkit::selftests
