#include "engine/target_watch.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace uffdkit {
namespace {

constexpr std::int64_t kSecond = TargetWatch::kFirstPauseNs;

class TargetWatchTest : public testing::Test {
 protected:
  // Goes to the next time at which somebody is due, and says who is.
  std::vector<std::uint64_t> next() {
    if (watch_.next_ns() == 0) return {};
    now_ = watch_.next_ns();
    return watch_.take_due(now_, 1000);
  }
  // Looks at whoever is due, none of whom has had a fault, until this time; the longest pause of all.
  std::int64_t longest_pause(std::int64_t until_ns) {
    std::int64_t longest = 0;
    while (now_ < until_ns) {
      const std::int64_t before = now_;
      for (const std::uint64_t session : next()) watch_.is_there(session, 0, now_);
      longest = std::max(longest, now_ - before);
    }
    return longest;
  }

  TargetWatch watch_;
  std::int64_t now_ = 12'345'678'901;
};

TEST_F(TargetWatchTest, ASessionIsLookedAtAfterASecondAndThenLessAndLessOften) {
  watch_.add(7, true, now_);
  std::int64_t pause = 0;
  for (int looks = 0; looks < 8; ++looks) {
    const std::int64_t before = now_;
    ASSERT_EQ(next(), std::vector<std::uint64_t>{7});
    EXPECT_GT(now_ - before, pause);
    pause = now_ - before;
    if (looks == 0) {
      EXPECT_LE(pause, kSecond * 5 / 4);
    }
    watch_.is_there(7, 0, now_);
  }
  EXPECT_GE(pause, 128 * kSecond);
}

TEST_F(TargetWatchTest, OneWhoseClientHasFaultsIsLookedAtEachSecond) {
  watch_.add(7, true, now_);
  for (std::uint64_t faults = 1; faults < 10; ++faults) {
    const std::int64_t before = now_;
    ASSERT_EQ(next(), std::vector<std::uint64_t>{7});
    EXPECT_LE(now_ - before, kSecond * 5 / 4);
    watch_.is_there(7, faults, now_);
  }
}

TEST_F(TargetWatchTest, WhereNobodyTellsOfAnExitPausesStayShorter) {
  watch_.add(7, false, now_);
  EXPECT_LE(longest_pause(now_ + 100'000 * kSecond), TargetWatch::kMostPauseNs * 5 / 4);
}

TEST_F(TargetWatchTest, WhereItIsToldPausesHaveAnEndToo) {
  watch_.add(7, true, now_);
  const std::int64_t longest = longest_pause(now_ + 100'000 * kSecond);
  EXPECT_GT(longest, TargetWatch::kMostPauseNs * 5 / 4);
  EXPECT_LE(longest, TargetWatch::kMostPauseOfToldNs * 5 / 4);
}

TEST_F(TargetWatchTest, AfterTheExitOfItsProcessItIsLookedAtSoonAndOftenAgain) {
  watch_.add(7, true, now_);
  longest_pause(now_ + 10'000 * kSecond);
  watch_.exit_was_told(7, now_);
  EXPECT_LE(watch_.next_ns() - now_, kSecond * 5 / 4);
  EXPECT_LE(longest_pause(now_ + 100'000 * kSecond), TargetWatch::kMostPauseNs * 5 / 4);
}

TEST_F(TargetWatchTest, ThoseWhoAreDueAtAboutTheSameTimeAreDueTogether) {
  for (std::uint64_t session = 1; session <= 1000; ++session) watch_.add(session, false, now_ += 7'000'000);
  int times = 0;
  const std::int64_t until = now_ + 1000 * kSecond;
  for (; now_ < until; ++times)
    for (const std::uint64_t session : next()) watch_.is_there(session, 0, now_);
  EXPECT_LT(times, 200);
}

TEST_F(TargetWatchTest, NoMoreAreTakenThanAreAskedForAndTheOthersAreDueStill) {
  for (std::uint64_t session = 1; session <= 10; ++session) watch_.add(session, true, now_);
  now_ = watch_.next_ns();
  EXPECT_EQ(watch_.take_due(now_, 4).size(), 4u);
  EXPECT_LE(watch_.next_ns(), now_);
  EXPECT_EQ(watch_.take_due(now_, 100).size(), 6u);
  EXPECT_EQ(watch_.next_ns(), 0);
}

TEST_F(TargetWatchTest, OneThatIsRemovedIsNotLookedAtAlsoNotIfItWasTaken) {
  watch_.add(7, true, now_);
  watch_.add(8, true, now_);
  watch_.remove(8);
  EXPECT_EQ(next(), std::vector<std::uint64_t>{7});
  watch_.remove(7);
  watch_.is_there(7, 0, now_);
  watch_.exit_was_told(7, now_);
  EXPECT_EQ(watch_.next_ns(), 0);
}

}  // namespace
}  // namespace uffdkit
