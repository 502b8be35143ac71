// The engine's sessions on the model (tests/simulate): a sound engine passes, and one with a bug is found
// out.
#include <gtest/gtest.h>

#include "simulate/world.h"

namespace uffdkit::simulate {
namespace {

TEST(SimEngine, ServesEveryByteAndLeavesNoThreadAsleepUnder300Seeds) {
  std::size_t bytes_checked = 0;
  for (std::uint64_t seed = 1; seed <= 300; ++seed) {
    const Found found = run(seed);
    ASSERT_EQ(found.wrong, "") << "simulate --seed " << seed << " -v shows it";
    bytes_checked += found.bytes_checked;
  }
  EXPECT_GT(bytes_checked, 10'000u);
}

TEST(SimEngine, ASeedGivesTheSameRunAgain) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) EXPECT_EQ(run(seed).events, run(seed).events);
}

TEST(SimEngine, NoWakeAfterPresentIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::no_wake_after_present, 20), 0u);
}
TEST(SimEngine, AFaultServedBeforeAnOlderRemoveIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::fault_before_older_remove, 20), 0u);
}
TEST(SimEngine, AStaleFetchIsFoundWithin100Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::stale_fetch, 100), 0u);
}
TEST(SimEngine, AShortCopyTakenForAWholeOneIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::short_copy_taken_for_whole, 20), 0u);
}
TEST(SimEngine, ARefusedFaultThatIsForgottenIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(Bug::refused_fault_forgotten, 20), 0u);
}

}  // namespace
}  // namespace uffdkit::simulate
