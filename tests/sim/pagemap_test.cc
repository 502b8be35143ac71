// PAGEMAP_SCAN on the model.
#include <gtest/gtest.h>

#include "sim/world.h"

namespace uffdkit::sim::test {
namespace {

struct TrackedWorld : World {
  TrackedWorld() : World(abi::kFeatureWpAsync), start(area(Memory::anonymous, 8, kWpMode)) {
    EXPECT_EQ(uffd.protect(pages(start, 8)).stop, Stop::complete);
  }

  // The written pages, which are armed again.
  ScanQuery written() const {
    return {.range = pages(start, 8),
            .mask = abi::kPageWritten,
            .report = abi::kPageWritten,
            .protect_matching = true,
            .require_wp_async = true};
  }
  ScanResult scan(const ScanQuery& query) { return pagemap.scan(query, found).value(); }

  Address start;
  Pagemap pagemap = Pagemap::open(0, process.system_calls()).value();
  std::array<ScannedRange, 4> found = {};
};

TEST(SimPagemap, FindsWhatWasWrittenSinceTheLastScanOnce) {
  TrackedWorld world;
  world.write(at(world.start, 2));
  world.write(at(world.start, 3));
  world.write(at(world.start, 6));
  ASSERT_EQ(world.scan(world.written()).ranges, 2u);
  EXPECT_EQ(world.found[0].range, pages(at(world.start, 2), 2));
  EXPECT_EQ(world.found[1].range, pages(at(world.start, 6), 1));
  EXPECT_EQ(world.scan(world.written()).ranges, 0u);
}

TEST(SimPagemap, StopsWhereTheMostPagesAreFoundAndSaysWhereToGoOn) {
  TrackedWorld world;
  for (std::uint64_t page = 0; page < 8; ++page) world.write(at(world.start, page));
  ScanQuery query = world.written();
  query.max_pages = 3;
  const ScanResult result = world.scan(query);
  ASSERT_EQ(result.ranges, 1u);
  EXPECT_EQ(world.found[0].range, pages(world.start, 3));
  EXPECT_EQ(result.walk_end, at(world.start, 3));
}

TEST(SimPagemap, RefusesMemoryWithoutAsynchronousProtectionWhereItIsRequired) {
  TrackedWorld world;
  ScanQuery query = world.written();
  query.range = pages(world.area(Memory::anonymous, 1), 1);
  const auto result = world.pagemap.scan(query, world.found);
  ASSERT_FALSE(result);
  EXPECT_EQ(result.error().os_error(), EPERM);
}

TEST(SimPagemap, OfAProcessThatHasExitedFindsNothing) {
  TrackedWorld world;
  world.write(world.start);
  Process& other = world.kernel.spawn();
  Pagemap pagemap = Pagemap::open(world.process.pid(), other.system_calls()).value();
  world.process.kill();
  EXPECT_EQ(pagemap.scan(world.written(), world.found).value().ranges, 0u);
}

TEST(SimPagemap, APageThatIsReadFirstIsTheSharedPageOfZerosOrOneOfItsOwn) {
  for (const bool shared : {true, false}) {
    KernelOptions options;
    options.reads_map_zero_page = shared;
    World world(0, options);
    const Address start = world.area(Memory::anonymous, 1, 0);
    world.read(start);
    const Pagemap pagemap = Pagemap::open(0, world.process.system_calls()).value();
    std::array<ScannedRange, 1> found = {};
    ASSERT_EQ(
        pagemap
            .scan({.range = pages(start, 1), .mask = abi::kPagePresent, .report = abi::kPagePfnZero}, found)
            .value()
            .ranges,
        1u);
    EXPECT_EQ(found[0].categories == abi::kPagePfnZero, shared);
  }
}

TEST(SimPagemap, AnotherUsersIsRefused) {
  TrackedWorld world;
  Process& other = world.kernel.spawn(user(1000, {1000}));
  EXPECT_FALSE(Pagemap::open(world.process.pid(), other.system_calls()));
}

}  // namespace
}  // namespace uffdkit::sim::test
