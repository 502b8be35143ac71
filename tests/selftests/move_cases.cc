// UFFDIO_MOVE: move, move-pmd, move-pmd-split.
#include <variant>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

constexpr ByteCount kChunk = kPage2M.bytes();
constexpr std::size_t kChunks = 2;
constexpr std::size_t kChunkPages = kPage2M.bytes().value / kPage4K.bytes().value;

void ask_for_huge_pages(Case& test, const Area& area) {
  if (test.here().advise(area.range(), Advice::huge_page) != 0) throw Lacking("needs transparent huge pages");
}

// Fills `source` with contents, chunk by chunk, and keeps it out of children: a page shared by fork(2) cannot
// be moved.
void prepare_source(Case& test, const Area& source, ByteCount chunk) {
  ASSERT_EQ(test.here().advise(source.range(), Advice::dont_fork), 0);
  for (std::size_t i = 0; i < source.range().length.value / chunk.value; ++i)
    ASSERT_TRUE(test.here().write(source.start + ByteCount(i * chunk.value), contents(i, chunk)));
}

// Reads all of `to` while each of its faults is answered by moving the `step` that has it. Returns how many
// faults there were.
std::size_t read_by_moving(Case& test, const Uffd& uffd, const Area& to, const Area& from, ByteCount step) {
  bool right = true;
  const std::size_t steps = to.range().length.value / step.value;
  auto reader = test.machine().start(uffd, to.range(), [&](Thread& self) {
    for (std::size_t i = 0; i < steps; ++i)
      right &= has_contents(self, to.start + ByteCount(i * step.value), i, step);
  });
  std::size_t faults = 0;
  serve(uffd, reader, [&](const Message& message) {
    const auto& fault = std::get<Fault>(message);
    EXPECT_EQ(fault.kind, Fault::Kind::missing);
    const std::uint64_t offset = (fault.address - to.start).value / step.value * step.value;
    const Outcome outcome = uffd.move(to.start + ByteCount(offset), {from.start + ByteCount(offset), step});
    EXPECT_EQ(outcome.stop, Stop::complete) << to_string(outcome.stop);
    ++faults;
  });
  reader->join();
  EXPECT_TRUE(right);
  EXPECT_TRUE(is_zero(test.here(), from.start, from.range().length));
  return faults;
}

}  // namespace

KERNEL_CASE(move, kAnonymous) {
  const Uffd uffd = test.uffd(abi::kFeatureMove);
  const Area source = test.area();
  const Area area = test.area();
  prepare_source(test, source, source.page_bytes);
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  EXPECT_EQ(read_by_moving(test, uffd, area, source, area.page_bytes), area.pages);
}

KERNEL_CASE(move_pmd, kAnonymous) {
  const Uffd uffd = test.uffd(abi::kFeatureMove);
  const Area source = test.machine().map(MemoryType::anon, kChunks * kChunkPages);
  const Area area = test.machine().map(MemoryType::anon, kChunks * kChunkPages);
  ask_for_huge_pages(test, source);
  ask_for_huge_pages(test, area);
  prepare_source(test, source, kChunk);
  if (!test.is_mapped_huge(source.start)) throw Lacking("needs a free transparent huge page");
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  EXPECT_EQ(read_by_moving(test, uffd, area, source, kChunk), kChunks);
  EXPECT_TRUE(test.is_mapped_huge(area.start));
}

KERNEL_CASE(move_pmd_split, kAnonymous) {
  const Uffd uffd = test.uffd(abi::kFeatureMove);
  const Area source = test.machine().map(MemoryType::anon, kChunks * kChunkPages);
  const Area area = test.machine().map(MemoryType::anon, kChunks * kChunkPages);
  ask_for_huge_pages(test, source);
  prepare_source(test, source, kPage4K.bytes());
  if (!test.is_mapped_huge(source.start)) throw Lacking("needs a free transparent huge page");
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  EXPECT_EQ(read_by_moving(test, uffd, area, source, kPage4K.bytes()), area.pages);
  EXPECT_FALSE(test.is_mapped_huge(area.start));
}

}  // namespace uffdkit::selftests
