// Pages that are in the page cache but not mapped: minor, minor-wp, minor-collapse.
#include <sys/mman.h>

#include <algorithm>
#include <utility>
#include <variant>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

using test::Background;
using test::Mapping;

constexpr std::uint64_t kMinorFeatures = abi::kFeatureMinorShmem | abi::kFeatureMinorHugetlbfs;

// Memory that is mapped where it can fault, and again where it cannot.
struct TwoViews {
  AddressRange range;
  ByteCount page_bytes;
  std::byte* alias;

  std::byte* data(std::size_t page) const {
    return reinterpret_cast<std::byte*>(range.start.value + page * page_bytes.value);
  }
  std::size_t pages() const { return range.length.value / page_bytes.value; }
};

TwoViews views_of(const Area& area) {
  return {area.range(), area.page_bytes(), area.alias()};
}

std::vector<std::byte> flipped(std::size_t page, ByteCount bytes) {
  std::vector<std::byte> made = contents(page, bytes);
  std::ranges::transform(made, made.begin(), [](std::byte b) { return ~b; });
  return made;
}

bool all_flipped(const TwoViews& memory) {
  for (std::size_t page = 0; page < memory.pages(); ++page)
    if (!std::ranges::equal(std::span(memory.data(page), memory.page_bytes.value),
                            flipped(page, memory.page_bytes)))
      return false;
  return true;
}

// Writes contents through the alias, which gives no fault; then reads all of the memory, where each page
// gives one minor fault, which flips the page's bytes through the alias and maps it.
void read_by_minor_faults(const Uffd& uffd, const TwoViews& memory, Protect protect) {
  const ByteCount bytes = memory.page_bytes;
  for (std::size_t page = 0; page < memory.pages(); ++page)
    std::ranges::copy(contents(page, bytes), memory.alias + page * bytes.value);
  EXPECT_FALSE(uffd.wait_readable(0).value()) << "the alias gives no faults";

  bool right = false;
  std::size_t minor = 0, missing = 0;
  Background reader(uffd, memory.range, [&] { right = all_flipped(memory); });
  serve(uffd, reader, [&](const Message& message) {
    const auto& fault = std::get<Fault>(message);
    ++(fault.kind == Fault::Kind::minor ? minor : missing);
    const std::size_t page = (fault.address - memory.range.start).value / bytes.value;
    std::ranges::copy(flipped(page, bytes), memory.alias + page * bytes.value);
    const AddressRange range = {memory.range.start + ByteCount(page * bytes.value), bytes};
    EXPECT_EQ(uffd.resume(range, Wake::yes, protect).stop, Stop::complete);
  });
  reader.join();
  EXPECT_TRUE(right);
  EXPECT_EQ(minor, memory.pages());
  EXPECT_EQ(missing, 0u);
}

// A file of one huge page's size, mapped where a huge page can be, and again.
class Collapsible {
 public:
  Collapsible()
      : file_(test::memory_file(kBytes.value)),
        space_(Mapping::map(nullptr, 2 * kBytes.value, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1)),
        alias_(Mapping::of_file(file_.get(), kBytes.value, MAP_SHARED)) {
    const std::uint64_t start = kPage2M.round_down(space_.range().start.value + kBytes.value - 1);
    range_ = {Address(start), kBytes};
    void* mapped = mmap(reinterpret_cast<void*>(start), kBytes.value, PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_FIXED, file_.get(), 0);
    if (mapped == MAP_FAILED) throw std::runtime_error("mmap of a file in memory");
  }
  TwoViews views() const { return {range_, kPage4K.bytes(), alias_.data()}; }

 private:
  static constexpr ByteCount kBytes = kPage2M.bytes();
  UniqueFd file_;
  Mapping space_;
  Mapping alias_;
  AddressRange range_;
};

}  // namespace

KERNEL_CASE(minor, kSharedFiles) {
  const Uffd uffd = test.uffd(kMinorFeatures);
  const Area area = test.area();
  ASSERT_TRUE(uffd.register_range(area.range(), kMinor));
  read_by_minor_faults(uffd, views_of(area), Protect::no);
}

KERNEL_CASE(minor_wp, kSharedFiles) {
  // No feature tells of CONTINUE's mode to protect; a kernel that has this one has it.
  const Uffd uffd = test.uffd(kMinorFeatures | abi::kFeatureWpUnpopulated);
  const Area area = test.area();
  ASSERT_TRUE(uffd.register_range(area.range(), kMinor | kWriteProtect));
  read_by_minor_faults(uffd, views_of(area), Protect::yes);

  std::size_t protect_faults = 0;
  Background writer(uffd, area.range(), [&] {
    for (std::size_t page = 0; page < area.pages(); ++page) *area.data(page) = std::byte{0x77};
  });
  serve(uffd, writer, [&](const Message& message) {
    const auto& fault = std::get<Fault>(message);
    EXPECT_EQ(fault.kind, Fault::Kind::write_protect);
    EXPECT_EQ(uffd.unprotect(area.page(area.page_of(fault.address))).stop, Stop::complete);
    ++protect_faults;
  });
  writer.join();
  EXPECT_EQ(protect_faults, area.pages());
  for (std::size_t page = 0; page < area.pages(); ++page) EXPECT_EQ(*area.alias(page), std::byte{0x77});
}

KERNEL_CASE(minor_collapse, kShmem) {
  constexpr int kMadvCollapse = 25;  // 6.1; newer than the C library's headers
  const Uffd uffd = test.uffd(kMinorFeatures);
  const Collapsible memory;
  const TwoViews views = memory.views();
  ASSERT_TRUE(uffd.register_range(views.range, kMinor));
  read_by_minor_faults(uffd, views, Protect::no);

  if (madvise(views.data(0), views.range.length.value, kMadvCollapse) != 0)
    throw Lacking("needs MADV_COLLAPSE of files in memory, and a free transparent huge page");
  bool same = false;
  std::size_t messages = 0;
  Background reader(uffd, views.range, [&] { same = all_flipped(views); });
  serve(uffd, reader, [&](const Message&) {
    ++messages;
    EXPECT_TRUE(uffd.unregister_range(views.range));
  });
  reader.join();
  EXPECT_TRUE(same);
  EXPECT_EQ(messages, 0u);
  EXPECT_TRUE(is_mapped_huge(views.range.start));
}

}  // namespace uffdkit::selftests
