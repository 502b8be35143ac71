#include "engine/fair_share.h"

#include <gtest/gtest.h>

namespace uffdkit {
namespace {

constexpr std::int64_t kSlice = FairShare::kSliceNs;
constexpr std::int64_t kNow = 1'000'000'000;

TEST(FairShare, OthersAreLookedForOnceASlice) {
  FairShare share;
  share.begin(kNow, {});
  EXPECT_FALSE(share.slice_has_ended(kNow + kSlice - 1));
  EXPECT_TRUE(share.slice_has_ended(kNow + kSlice));
  EXPECT_FALSE(share.slice_has_ended(kNow + kSlice + 1));
  EXPECT_TRUE(share.slice_has_ended(kNow + 2 * kSlice));
}

TEST(FairShare, AClientThatOnlyFaultsFloodsNobodyHoweverLongItIsServed) {
  FairShare share;
  share.begin(kNow, {});
  EXPECT_FALSE(share.floods(kNow + 1000 * kSlice, {}));
}

TEST(FairShare, EventsWithoutAPauseAreAFloodWhenASliceIsOver) {
  FairShare share;
  share.begin(kNow, {.events = 7});
  EXPECT_FALSE(share.floods(kNow + kSlice - 1, {.events = 100}));
  EXPECT_FALSE(share.floods(kNow + kSlice, {.events = 8}));
  EXPECT_TRUE(share.floods(kNow + kSlice, {.events = 100}));
}

TEST(FairShare, SoAreFaultsThatAreRepeatedWithoutAPause) {
  FairShare share;
  share.begin(kNow, {.duplicates = 5});
  // Several threads of a client may want one page.
  EXPECT_FALSE(share.floods(kNow + kSlice, {.duplicates = 5 + 7}));
  EXPECT_TRUE(share.floods(kNow + kSlice, {.duplicates = 5 + 8}));
}

TEST(FairShare, ShortRunsThatFollowEachOtherCloselyCountTogether) {
  FairShare share;
  share.begin(kNow, {});
  share.end(kNow + kSlice / 2);
  share.begin(kNow + kSlice, {.events = 50});
  EXPECT_FALSE(share.floods(kNow + kSlice, {.events = 50}));
  EXPECT_TRUE(share.floods(kNow + 2 * kSlice, {.events = 50}));
}

TEST(FairShare, RunsWithPausesBetweenThemDoNot) {
  FairShare share;
  for (std::int64_t now = kNow; now < kNow + 1000 * kSlice; now += 10 * kSlice) {
    share.begin(now, {.events = static_cast<std::uint64_t>(now)});
    EXPECT_FALSE(share.floods(now + kSlice / 2, {.events = static_cast<std::uint64_t>(now) + 50}));
    share.end(now + kSlice / 2);
  }
}

TEST(FairShare, AfterARestASliceBeginsAnew) {
  FairShare share;
  share.begin(kNow, {});
  ASSERT_TRUE(share.floods(kNow + kSlice, {.events = 50}));
  share.rest(kNow + kSlice);
  const std::int64_t until = share.rests_until_ns();
  EXPECT_GT(until, kNow + kSlice);
  share.begin(until, {.events = 60});
  EXPECT_FALSE(share.floods(until + kSlice - 1, {.events = 100}));
  EXPECT_TRUE(share.floods(until + kSlice, {.events = 100}));
}

}  // namespace
}  // namespace uffdkit
