#include "engine/layout.h"

#include <gtest/gtest.h>

#include <map>
#include <optional>
#include <random>

namespace uffdkit {
namespace {

constexpr std::uint64_t kPage = 4096;

AddressRange pages(std::uint64_t first, std::uint64_t count) {
  return {Address(first * kPage), ByteCount(count * kPage)};
}

Segment segment(std::uint64_t page, std::uint64_t count, RegionId region, std::uint64_t first = 0) {
  return {.memory = pages(page, count), .region = region, .page_size = kPage4K, .first = PageIndex(first)};
}

bool no_file(RegionId) {
  return false;
}
bool any_file(RegionId) {
  return true;
}

// What a page of the address space shows, page by page: a layout as anybody would believe it.
class NaiveLayout {
 public:
  using Shown = std::optional<std::pair<RegionId, std::uint64_t>>;

  void add(const Segment& added) {
    for (std::uint64_t i = 0; i < added.granules().count.value; ++i)
      pages_[added.memory.start.value / kPage + i] = {
          added.region, added.region == kZeroRegion ? 0 : added.first.value + i};
  }
  void erase(AddressRange memory) {
    pages_.erase(pages_.lower_bound(memory.start.value / kPage),
                 pages_.lower_bound(memory.end().value / kPage));
  }
  void move(AddressRange from, Address to) {
    std::map<std::uint64_t, std::pair<RegionId, std::uint64_t>> moving;
    const std::uint64_t first = from.start.value / kPage;
    for (std::uint64_t i = 0; i < from.length.value / kPage; ++i) {
      const auto page = pages_.find(first + i);
      if (page == pages_.end()) continue;
      moving[to.value / kPage + i] = page->second;
      page->second = {kZeroRegion, 0};
    }
    for (const auto& [page, shown] : moving) pages_[page] = shown;
  }
  Shown at(std::uint64_t page) const {
    const auto found = pages_.find(page);
    return found == pages_.end() ? Shown() : Shown(found->second);
  }

 private:
  std::map<std::uint64_t, std::pair<RegionId, std::uint64_t>> pages_;
};

NaiveLayout::Shown shown_by(const Layout& layout, std::uint64_t page) {
  const Segment* found = layout.find(Address(page * kPage + 17));
  if (found == nullptr) return std::nullopt;
  if (found->region == kZeroRegion) return std::pair{kZeroRegion, std::uint64_t{0}};
  return std::pair{found->region, found->granule_at(Address(page * kPage)).value};
}

void expect_same(const Layout& layout, const NaiveLayout& naive, std::uint64_t pages_in_all) {
  for (std::uint64_t page = 0; page < pages_in_all; ++page)
    ASSERT_EQ(shown_by(layout, page), naive.at(page)) << "page " << page;
  Address free_from{0};
  for (const Segment& found : layout.segments()) {
    ASSERT_GE(found.memory.start, free_from);
    ASSERT_GT(found.memory.length.value, 0u);
    free_from = found.memory.end();
  }
}

TEST(Layout, FindsNothingOutsideOfSegments) {
  Layout layout;
  layout.add(segment(10, 4, 0));
  EXPECT_EQ(layout.find(Address(10 * kPage - 1)), nullptr);
  ASSERT_NE(layout.find(Address(10 * kPage)), nullptr);
  EXPECT_NE(layout.find(Address(14 * kPage - 1)), nullptr);
  EXPECT_EQ(layout.find(Address(14 * kPage)), nullptr);
}

TEST(Layout, ErasingCutsAtEveryOffset) {
  for (std::uint64_t first = 8; first < 16; ++first) {
    for (std::uint64_t count = 1; first + count <= 18; ++count) {
      Layout layout;
      NaiveLayout naive;
      layout.add(segment(10, 4, 7, 100));
      naive.add(segment(10, 4, 7, 100));
      layout.erase(pages(first, count));
      naive.erase(pages(first, count));
      expect_same(layout, naive, 20);
    }
  }
}

TEST(Layout, MovingCutsAtEveryOffset) {
  for (std::uint64_t first = 8; first < 16; ++first) {
    for (std::uint64_t count = 1; first + count <= 18; ++count) {
      Layout layout;
      NaiveLayout naive;
      for (const Segment& added : {segment(10, 4, 7, 100), segment(30, 6, 3)}) {
        layout.add(added);
        naive.add(added);
      }
      layout.move(pages(first, count), Address(28 * kPage), no_file);
      naive.move(pages(first, count), Address(28 * kPage));
      expect_same(layout, naive, 50);
    }
  }
}

TEST(Layout, AnUnalignedRangeIsWidenedToWholePages) {
  Layout layout;
  layout.add(segment(10, 4, 0));
  layout.erase({Address(11 * kPage + 1), ByteCount(1)});
  EXPECT_NE(layout.find(Address(10 * kPage)), nullptr);
  EXPECT_EQ(layout.find(Address(11 * kPage)), nullptr);
  EXPECT_NE(layout.find(Address(12 * kPage)), nullptr);
}

TEST(Layout, ErasingNothingChangesNothing) {
  Layout layout;
  layout.add(segment(10, 4, 0));
  layout.erase(pages(11, 0));
  EXPECT_EQ(layout.segments().size(), 1u);
}

TEST(Layout, PartsInNamesTheGranulesOfRegionsOnly) {
  Layout layout;
  layout.add(segment(10, 4, 2, 50));
  layout.add(segment(14, 2, kZeroRegion));
  layout.add(segment(16, 4, 3));
  const auto parts = layout.parts_in(pages(12, 6));
  ASSERT_EQ(parts.size(), 2u);
  EXPECT_EQ(parts[0].region, 2u);
  EXPECT_EQ(parts[0].granules, (PageRange{PageIndex(52), PageCount(2)}));
  EXPECT_EQ(parts[1].region, 3u);
  EXPECT_EQ(parts[1].granules, (PageRange{PageIndex(0), PageCount(2)}));
}

TEST(Layout, PiecesThatAreMovedAwayAndBackBecomeWholeAgain) {
  Layout layout;
  layout.add(segment(10, 64, 0));
  for (std::uint64_t i = 0; i < 64; ++i) {
    layout.move(pages(10 + i, 1), Address((200 + i) * kPage), no_file);
    layout.erase(pages(10 + i, 1));
  }
  for (std::uint64_t i = 0; i < 64; ++i) {
    layout.move(pages(200 + i, 1), Address((10 + i) * kPage), no_file);
    layout.erase(pages(200 + i, 1));
  }
  ASSERT_EQ(layout.segments().size(), 1u);
  EXPECT_EQ(layout.segments()[0].memory, pages(10, 64));
}

TEST(Layout, AgreesWithANaiveModelUnderRandomChanges) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  constexpr std::uint64_t kPages = 120;
  for (int run = 0; run < 40; ++run) {
    Layout layout;
    NaiveLayout naive;
    RegionId next_region = 0;
    for (int change = 0; change < 60; ++change) {
      const std::uint64_t count = 1 + random() % 20;
      const std::uint64_t first = random() % (kPages - count);
      switch (random() % 3) {
        case 0: {
          const Segment added = segment(first, count, next_region++, random() % 3);
          layout.add(added);
          naive.add(added);
          break;
        }
        case 1:
          layout.erase(pages(first, count));
          naive.erase(pages(first, count));
          break;
        default: {
          const std::uint64_t to = random() % (kPages - count);
          if (pages(first, count).overlaps(pages(to, count))) break;  // mremap(2) refuses it
          layout.move(pages(first, count), Address(to * kPage), no_file);
          naive.move(pages(first, count), Address(to * kPage));
        }
      }
      expect_same(layout, naive, kPages);
      if (HasFatalFailure()) return;
    }
  }
}

// ---- memory that is mapped more than once -----------------------------------------------------------------

TEST(Layout, WhatAMoveLeavesBehindMayShowTheSameAndIsNoPartOfTheRegionUntilThatIsKnown) {
  Layout layout;
  layout.add(segment(10, 8, 1));
  layout.move(pages(12, 4), Address(30 * kPage), any_file);
  ASSERT_EQ(layout.segments().size(), 4u);
  const Segment* left = layout.find(Address(13 * kPage));
  ASSERT_NE(left, nullptr);
  EXPECT_TRUE(left->left_behind);
  EXPECT_EQ(left->granule_at(Address(13 * kPage)), PageIndex(3));
  EXPECT_TRUE(layout.parts_in(pages(12, 4)).empty());
  EXPECT_EQ(layout.find(1, PageIndex(3))->memory, pages(30, 4));
}

TEST(Layout, WhatWasLeftBehindBecomesOneWithItsNeighboursWhenItIsAFilesAndZeroWhenItIsNot) {
  for (const bool is_file : {true, false}) {
    Layout layout;
    layout.add(segment(10, 8, 1));
    layout.move(pages(12, 4), Address(30 * kPage), any_file);
    layout.settle(Address(13 * kPage), is_file);
    EXPECT_EQ(layout.segments().size(), is_file ? 2u : 4u);
    EXPECT_EQ(layout.find(Address(12 * kPage))->region, is_file ? RegionId{1} : kZeroRegion);
    EXPECT_FALSE(layout.find(Address(12 * kPage))->left_behind);
  }
}

TEST(Layout, ASegmentIsAddedUpToTheNextOneAndNotOverAny) {
  Layout layout;
  layout.add(segment(20, 4, 1));
  layout.add_where_free(segment(12, 20, 1, 5));
  EXPECT_EQ(shown_by(layout, 19), NaiveLayout::Shown({1, 12}));
  EXPECT_EQ(shown_by(layout, 20), NaiveLayout::Shown({1, 0}));
  EXPECT_EQ(shown_by(layout, 24), std::nullopt);
  layout.add_where_free(segment(22, 20, 1, 50));
  EXPECT_EQ(shown_by(layout, 24), std::nullopt);
}

TEST(Layout, TheLastSegmentBeforeAnAddress) {
  Layout layout;
  EXPECT_EQ(layout.last_before(Address(9 * kPage)), nullptr);
  layout.add(segment(10, 2, 1));
  layout.add(segment(20, 2, 1));
  EXPECT_EQ(layout.last_before(Address(9 * kPage)), nullptr);
  EXPECT_EQ(layout.last_before(Address(12 * kPage))->memory, pages(10, 2));
  EXPECT_EQ(layout.last_before(Address(40 * kPage))->memory, pages(20, 2));
}

}  // namespace
}  // namespace uffdkit
