#include "engine/page_table.h"

#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace uffdkit {
namespace {

constexpr std::array kStates = {PageState::absent,  PageState::fetching, PageState::installed,
                                PageState::removed, PageState::zeroed,   PageState::poisoned};

class PageTableTest : public testing::Test {
 protected:
  static constexpr PageCount kGranules{37};
  std::vector<std::byte> cells_ = std::vector<std::byte>(page_table_bytes(kGranules).value);
  PageTable table_{cells_, kGranules};
};

TEST_F(PageTableTest, AnUntouchedGranuleIsAbsent) {
  for (std::uint64_t i = 0; i < kGranules.value; ++i) EXPECT_EQ(table_.get(PageIndex(i)), PageState::absent);
}

TEST_F(PageTableTest, SettingAGranuleLeavesItsNeighboursAlone) {
  for (const PageState state : kStates) {
    table_.set({PageIndex(0), kGranules}, PageState::removed);
    table_.set(PageIndex(4), state);
    table_.set(PageIndex(9), state);
    for (std::uint64_t i = 0; i < kGranules.value; ++i)
      EXPECT_EQ(table_.get(PageIndex(i)), i == 4 || i == 9 ? state : PageState::removed) << i;
  }
}

TEST_F(PageTableTest, SettingARangeSetsExactlyThatRange) {
  for (std::uint64_t first = 0; first <= 9; ++first) {
    for (std::uint64_t count = 0; first + count <= kGranules.value; ++count) {
      table_.set({PageIndex(0), kGranules}, PageState::installed);
      table_.set({PageIndex(first), PageCount(count)}, PageState::poisoned);
      for (std::uint64_t i = 0; i < kGranules.value; ++i)
        ASSERT_EQ(table_.get(PageIndex(i)),
                  i >= first && i < first + count ? PageState::poisoned : PageState::installed)
            << first << " " << count << " " << i;
    }
  }
}

TEST_F(PageTableTest, AValueThatNobodyWritesReadsAsPoisoned) {
  for (unsigned value = 6; value < 16; ++value) {
    cells_[1] = static_cast<std::byte>(value << 4);
    EXPECT_EQ(table_.get(PageIndex(2)), PageState::absent);
    EXPECT_EQ(table_.get(PageIndex(3)), PageState::poisoned) << value;
  }
}

TEST_F(PageTableTest, ARunEndsAtAnotherStateOrAtTheLimit) {
  table_.set({PageIndex(10), PageCount(7)}, PageState::removed);
  EXPECT_EQ(table_.end_of_run(PageIndex(10), PageIndex(30), PageState::removed), PageIndex(17));
  EXPECT_EQ(table_.end_of_run(PageIndex(10), PageIndex(12), PageState::removed), PageIndex(12));
  EXPECT_EQ(table_.end_of_run(PageIndex(9), PageIndex(30), PageState::removed), PageIndex(9));
  EXPECT_EQ(table_.start_of_run(PageIndex(17), PageIndex(0), PageState::removed), PageIndex(10));
  EXPECT_EQ(table_.start_of_run(PageIndex(17), PageIndex(12), PageState::removed), PageIndex(12));
  EXPECT_EQ(table_.start_of_run(PageIndex(18), PageIndex(0), PageState::removed), PageIndex(18));
}

TEST_F(PageTableTest, AChangeIsAskedOnceForEachRunAndMadeInTheRangeOnly) {
  table_.set({PageIndex(4), PageCount(9)}, PageState::fetching);
  table_.set({PageIndex(20), PageCount(kGranules.value - 20)}, PageState::fetching);
  std::vector<PageState> asked;
  table_.change({PageIndex(2), PageCount(20)}, [&](PageState state) {
    asked.push_back(state);
    return state == PageState::fetching ? PageState::installed : state;
  });
  EXPECT_EQ(asked,
            (std::vector{PageState::absent, PageState::fetching, PageState::absent, PageState::fetching}));
  for (std::uint64_t i = 0; i < kGranules.value; ++i)
    EXPECT_EQ(table_.get(PageIndex(i)), (i >= 4 && i < 13) || i == 20 || i == 21 ? PageState::installed
                                        : i >= 22                                ? PageState::fetching
                                                                                 : PageState::absent)
        << i;
}

TEST_F(PageTableTest, CostsFourBitsAGranule) {
  EXPECT_EQ(page_table_bytes(PageCount(8192)), ByteCount(4096));
  EXPECT_EQ(page_table_bytes(PageCount(1)), ByteCount(1));
}

}  // namespace
}  // namespace uffdkit
