#include "engine/plan.h"

#include <gtest/gtest.h>

#include <vector>

namespace uffdkit {
namespace {

using Action = FaultPlan::Action;

class PlanTest : public testing::Test {
 protected:
  static Segment segment_of(PageSize page_size, std::uint64_t first, std::uint64_t granules) {
    return {.memory = {Address(1u << 30), ByteCount(granules * 4096)},
            .region = 0,
            .page_size = page_size,
            .first = PageIndex(first)};
  }
  FaultPlan plan(const Segment& segment, std::uint64_t fault, std::uint64_t around,
                 Lost lost = Lost::store) const {
    return plan_fault(table_, segment, PageIndex(fault), PageCount(around), lost);
  }
  static PageRange run(std::uint64_t first, std::uint64_t count) {
    return {PageIndex(first), PageCount(count)};
  }

  std::vector<std::byte> cells_ = std::vector<std::byte>(page_table_bytes(PageCount(4096)).value);
  PageTable table_{cells_, PageCount(4096)};
  const Segment all_ = segment_of(kPage4K, 0, 4096);
};

TEST_F(PlanTest, AnAbsentPageBringsItsAlignedWindow) {
  EXPECT_EQ(plan(all_, 37, 16).action, Action::read);
  EXPECT_EQ(plan(all_, 37, 16).granules, run(32, 16));
  EXPECT_EQ(plan(all_, 37, 1).granules, run(37, 1));
  EXPECT_EQ(plan(all_, 0, 512).granules, run(0, 512));
}

TEST_F(PlanTest, TheWindowEndsWithTheSegment) {
  const Segment part = segment_of(kPage4K, 35, 6);
  EXPECT_EQ(plan(part, 37, 16).granules, run(35, 6));
}

TEST_F(PlanTest, OnlyPagesThatWereNeverAskedForComeAlong) {
  for (const PageState state : {PageState::fetching, PageState::installed, PageState::removed,
                                PageState::zeroed, PageState::poisoned}) {
    table_.set(run(0, 4096), PageState::absent);
    table_.set(PageIndex(34), state);
    table_.set(PageIndex(40), state);
    EXPECT_EQ(plan(all_, 37, 16).granules, run(35, 5)) << static_cast<int>(state);
  }
}

TEST_F(PlanTest, AnInstalledPageIsReadAgainOrZeroAsItIsSaid) {
  table_.set(PageIndex(37), PageState::installed);
  EXPECT_EQ(plan(all_, 37, 4, Lost::store).action, Action::read);
  EXPECT_EQ(plan(all_, 37, 4, Lost::zero).action, Action::zero);
  EXPECT_EQ(plan(all_, 36, 4, Lost::zero).action, Action::read);
}

TEST_F(PlanTest, ALostHugePageIsZeroOnlyIfAllOfItWasThere) {
  const Segment huge = segment_of(kPage2M, 0, 1024);
  table_.set(run(0, 511), PageState::installed);
  EXPECT_EQ(plan(huge, 3, 16, Lost::zero).action, Action::read);
  table_.set(PageIndex(511), PageState::removed);
  EXPECT_EQ(plan(huge, 3, 16, Lost::zero).action, Action::zero);
}

TEST_F(PlanTest, ARemovedPageIsZeroTogetherWithItsRemovedNeighbours) {
  table_.set(run(36, 3), PageState::removed);
  const FaultPlan made = plan(all_, 37, 16);
  EXPECT_EQ(made.action, Action::zero);
  EXPECT_EQ(made.granules, run(36, 3));
}

TEST_F(PlanTest, AZeroedPageIsZeroAgain) {
  table_.set(PageIndex(37), PageState::zeroed);
  EXPECT_EQ(plan(all_, 37, 16).action, Action::zero);
}

TEST_F(PlanTest, APoisonedPageStaysSoAlone) {
  table_.set(run(36, 3), PageState::poisoned);
  EXPECT_EQ(plan(all_, 37, 16).action, Action::poison);
  EXPECT_EQ(plan(all_, 37, 16).granules, run(37, 1));
}

TEST_F(PlanTest, APageThatIsBeingFetchedIsWaitedFor) {
  table_.set(PageIndex(37), PageState::fetching);
  EXPECT_EQ(plan(all_, 37, 16).action, Action::wait);
}

TEST_F(PlanTest, AHugePageComesAloneAndWhole) {
  const Segment huge = segment_of(kPage2M, 512, 1024);
  EXPECT_EQ(plan(huge, 700, 16).granules, run(512, 512));
  EXPECT_EQ(plan(huge, 1024, 512).granules, run(1024, 512));
}

TEST_F(PlanTest, AHugePageOfWhichPartWasRemovedIsRead) {
  const Segment huge = segment_of(kPage2M, 0, 1024);
  table_.set(run(0, 511), PageState::removed);
  EXPECT_EQ(plan(huge, 3, 16).action, Action::read);
  table_.set(PageIndex(511), PageState::zeroed);
  EXPECT_EQ(plan(huge, 3, 16).action, Action::zero);
}

TEST_F(PlanTest, OneGranuleInFlightOrPoisonedDecidesForItsHugePage) {
  const Segment huge = segment_of(kPage2M, 0, 1024);
  table_.set(PageIndex(100), PageState::fetching);
  EXPECT_EQ(plan(huge, 3, 16).action, Action::wait);
  table_.set(PageIndex(100), PageState::poisoned);
  EXPECT_EQ(plan(huge, 3, 16).action, Action::poison);
  EXPECT_EQ(plan(huge, 3, 16).granules, run(0, 512));
}

TEST_F(PlanTest, AWindowOfSeveralHugePagesHoldsWholePagesOnly) {
  const Segment huge = segment_of(kPage2M, 0, 2048);
  table_.set(PageIndex(1700), PageState::removed);
  const FaultPlan made = plan(huge, 600, 2048);
  EXPECT_EQ(made.granules, run(0, 1536));
}

}  // namespace
}  // namespace uffdkit
