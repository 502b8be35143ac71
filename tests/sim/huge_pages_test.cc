// Transparent huge pages and pinned pages on the model, and looking at memory without touching it.
#include <gtest/gtest.h>

#include <cerrno>

#include "sim/world.h"

namespace uffdkit::sim::test {
namespace {

constexpr std::uint64_t kPagesOfAHugeOne = kHuge / kPage;

// Anonymous memory of 4 MiB that begins where a huge page can be, advised to have them.
struct HugeWorld : World {
  explicit HugeWorld(std::uint64_t features = 0) : World(features), thread(process.spawn_thread()) {
    EXPECT_TRUE(process.map({.length = ByteCount(2 * kHuge), .fixed = start}));
    thread.advise({start, ByteCount(2 * kHuge)}, Advice::huge_page);
    kernel.run();
    EXPECT_EQ(result_of(thread), 0);
  }

  bool is_huge(Address address) {
    return pagemap.scan({.range = pages(address, 1), .mask = abi::kPageHuge, .report = abi::kPageHuge}, found)
               .value()
               .ranges == 1;
  }

  Address start{0x200000000000};
  Thread& thread;
  Pagemap pagemap = Pagemap::open(0, process.system_calls()).value();
  std::array<ScannedRange, 4> found = {};
};

TEST(SimHugePages, AWriteMapsOneWhereItIsAdvisedAndNothingElseIs) {
  HugeWorld world;
  world.write(at(world.start, 7));
  EXPECT_TRUE(world.process.present(world.start));
  EXPECT_TRUE(world.is_huge(world.start));
  EXPECT_FALSE(world.process.present(world.start + ByteCount(kHuge)));
}

TEST(SimHugePages, ProtectingAPartOfOneSplitsItAndAllOfItDoesNot) {
  HugeWorld world;
  world.write(world.start);
  ASSERT_TRUE(world.uffd.register_range({world.start, ByteCount(kHuge)}, kWriteProtect));
  EXPECT_EQ(world.uffd.protect({world.start, ByteCount(kHuge)}).stop, Stop::complete);
  EXPECT_TRUE(world.is_huge(world.start));
  EXPECT_EQ(world.uffd.unprotect(pages(world.start, 1)).stop, Stop::complete);
  EXPECT_FALSE(world.is_huge(world.start));
}

TEST(SimHugePages, OneIsCollapsedOutOfSmallPagesIfAllAreThere) {
  World world;
  const Address start{0x200000000000};
  ASSERT_TRUE(world.process.map({.length = ByteCount(kHuge), .fixed = start}));
  const AddressRange range{start, ByteCount(kHuge)};
  ASSERT_TRUE(world.uffd.register_range(range, kMissing));
  EXPECT_EQ(world.copy(start, 5, kHuge - kPage).stop, Stop::complete);
  Thread& thread = world.process.spawn_thread();
  thread.advise(range, Advice::collapse);
  world.kernel.run();
  EXPECT_EQ(result_of(thread), -EBUSY);
  EXPECT_EQ(world.copy(at(start, kPagesOfAHugeOne - 1), 6).stop, Stop::complete);
  thread.advise(range, Advice::collapse);
  world.kernel.run();
  EXPECT_EQ(result_of(thread), 0);
  EXPECT_EQ(byte_of(world.read(at(start, kPagesOfAHugeOne - 1))), 6);
}

TEST(SimPin, ForkCopiesAPinnedPageAtOnceAndTheParentGoesOnWritingToIt) {
  World world;
  const Address page = world.area(Memory::anonymous, 1);
  world.write(page, 1);
  world.access({.address = page, .kernel_mode = true, .pin = true});
  Thread& forker = world.process.spawn_thread();
  forker.fork();
  world.kernel.run();
  world.write(page, 2);
  EXPECT_EQ(forker.last()->child->peek(page), std::byte{1});
  EXPECT_EQ(world.process.peek(page), std::byte{2});
}

TEST(SimPin, AMoveOfAPinnedPageIsBusyUntilItIsUnpinned) {
  World world;
  const Address to = world.area(Memory::anonymous, 1, kMissingMode);
  const Address from = world.area(Memory::anonymous, 1);
  world.write(from);
  world.access({.address = from, .kernel_mode = true, .pin = true});
  EXPECT_EQ(world.uffd.move(to, pages(from, 1)).stop, Stop::busy);
  world.process.unpin();
  EXPECT_EQ(world.uffd.move(to, pages(from, 1)).stop, Stop::complete);
}

TEST(SimAccess, AnExchangeWritesOnlyOverWhatItExpects) {
  World world;
  const Address page = world.area(Memory::anonymous, 1);
  const Access exchange{.address = page, .write = true, .value = std::byte{9}, .expected = std::byte{0}};
  EXPECT_EQ(byte_of(world.access(exchange)), 0);
  EXPECT_EQ(byte_of(world.access(exchange)), 9);
}

TEST(SimAccess, ManyBytesAreSeenAndWrittenUpToTheFirstPageThatIsNotThere) {
  World world;
  const Address start = world.area(Memory::anonymous, 3);
  world.write(start, 1);
  world.write(at(start, 1), 2);
  const std::vector<std::byte> bytes(3 * kPage, std::byte{7});
  std::vector<std::byte> seen(3 * kPage);
  EXPECT_EQ(world.process.poke(at(start, 0, 100), bytes), 2 * kPage - 100);
  EXPECT_EQ(world.process.peek(start, seen), 2 * kPage);
  EXPECT_EQ(seen[99], std::byte{0});
  EXPECT_EQ(seen[2 * kPage - 1], std::byte{7});
}

}  // namespace
}  // namespace uffdkit::sim::test
