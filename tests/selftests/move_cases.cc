// UFFDIO_MOVE: move, move-pmd, move-pmd-split.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <variant>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

using test::Background;
using test::Mapping;

constexpr ByteCount kChunk = kPage2M.bytes();
constexpr std::size_t kChunks = 2;

// Anonymous memory of some chunks that begins where a huge page can be.
class Aligned {
 public:
  explicit Aligned(int advice) : mapping_(Mapping::anonymous((kChunks + 1) * kChunk.value)) {
    if (madvise(data(), kChunks * kChunk.value, advice) != 0) throw Lacking("needs transparent huge pages");
  }
  AddressRange range() const {
    return {Address(kPage2M.round_down(mapping_.range().start.value + kChunk.value - 1)),
            ByteCount(kChunks * kChunk.value)};
  }
  std::byte* data() const { return mapping_.data() + (range().start - mapping_.range().start).value; }

 private:
  Mapping mapping_;
};

// Fills `source` with contents and keeps it out of children: a page shared by fork(2) cannot be moved.
void prepare_source(std::byte* source, std::size_t pages, ByteCount page_bytes) {
  ASSERT_EQ(madvise(source, pages * page_bytes.value, MADV_DONTFORK), 0);
  for (std::size_t page = 0; page < pages; ++page)
    std::ranges::copy(contents(page, page_bytes), source + page * page_bytes.value);
}

// Reads all of `to` while each of its faults is answered by moving the `step` that has it. Returns how many
// faults there were.
std::size_t read_by_moving(const Uffd& uffd, AddressRange to, AddressRange from, ByteCount step) {
  const auto* data = reinterpret_cast<const std::byte*>(to.start.value);
  std::vector<std::byte> expected;
  for (std::size_t chunk = 0; chunk < to.length.value / step.value; ++chunk)
    std::ranges::copy(contents(chunk, step), std::back_inserter(expected));
  bool right = true;
  Background reader(uffd, to, [&] {
    for (std::size_t at = 0; at < expected.size(); at += kPage4K.bytes().value)
      right &= std::memcmp(data + at, expected.data() + at, kPage4K.bytes().value) == 0;
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
  reader.join();
  EXPECT_TRUE(right);
  EXPECT_TRUE(is_zero(reinterpret_cast<const std::byte*>(from.start.value), from.length));
  return faults;
}

}  // namespace

KERNEL_CASE(move, kAnonymous) {
  const Uffd uffd = test.uffd(abi::kFeatureMove);
  const Area source = test.area();
  const Area area = test.area();
  prepare_source(source.data(), source.pages(), source.page_bytes());
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  EXPECT_EQ(read_by_moving(uffd, area.range(), source.range(), area.page_bytes()), area.pages());
}

KERNEL_CASE(move_pmd, kAnonymous) {
  const Uffd uffd = test.uffd(abi::kFeatureMove);
  const Aligned source(MADV_HUGEPAGE);
  const Aligned area(MADV_HUGEPAGE);
  prepare_source(source.data(), kChunks, kChunk);
  if (!is_mapped_huge(source.range().start)) throw Lacking("needs a free transparent huge page");
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  EXPECT_EQ(read_by_moving(uffd, area.range(), source.range(), kChunk), kChunks);
  EXPECT_TRUE(is_mapped_huge(area.range().start));
}

KERNEL_CASE(move_pmd_split, kAnonymous) {
  const Uffd uffd = test.uffd(abi::kFeatureMove);
  const Aligned source(MADV_HUGEPAGE);
  const Aligned area(MADV_NOHUGEPAGE);
  prepare_source(source.data(), kChunks * kChunk.value / kPage4K.bytes().value, kPage4K.bytes());
  if (!is_mapped_huge(source.range().start)) throw Lacking("needs a free transparent huge page");
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  EXPECT_EQ(read_by_moving(uffd, area.range(), source.range(), kPage4K.bytes()),
            kChunks * kChunk.value / kPage4K.bytes().value);
  EXPECT_FALSE(is_mapped_huge(area.range().start));
}

}  // namespace uffdkit::selftests
