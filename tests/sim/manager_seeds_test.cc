// The manager with all of its threads on the model, under seeds (tests/simulate/manager_world.h): a sound one
// passes, and one with a bug is found out.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>

#include "simulate/manager_world.h"

namespace uffdkit::simulate {
namespace {

TEST(SimManagerSeeds, EveryByteIsRightAndNothingIsLeftUnder40Seeds) {
  std::size_t bytes_checked = 0;
  // What must have happened, and how often it did.
  std::map<std::string, std::size_t> happened;
  for (const char* what :
       {"connects", "is served", "breaks its connection", "is to be completed", "is its own", "is killed",
        "has a child", "mremap", "madvise", "munmap", "adds", "drops", "a stranger", "is compressed",
        "asks: drain", "asks: status", "asks: listen", "the manager has ended"})
    happened[what] = 0;
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    const Found found = run_manager(seed);
    ASSERT_EQ(found.wrong, "") << "simulate --manager --seed " << seed << " -v shows it";
    bytes_checked += found.bytes_checked;
    for (auto& [what, times] : happened)
      times += static_cast<std::size_t>(std::ranges::count_if(
          found.events, [&](const std::string& event) { return event.contains(what); }));
  }
  EXPECT_GT(bytes_checked, 10'000u);
  for (const auto& [what, times] : happened) EXPECT_GE(times, 1u) << what;
}

TEST(SimManagerSeeds, ASeedGivesTheSameRunAgain) {
  for (std::uint64_t seed = 1; seed <= 10; ++seed) {
    const Found first = run_manager(seed);
    const Found again = run_manager(seed);
    EXPECT_EQ(first.events, again.events);
    EXPECT_EQ(first.trace, again.trace) << seed;
  }
}

TEST(SimManagerSeeds, AndAnotherSeedGivesAnother) {
  EXPECT_NE(run_manager(1).trace, run_manager(2).trace);
}

TEST(SimManagerSeeds, ALostNotificationIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(ManagerBug::lost_notification, 20), 0u);
}
TEST(SimManagerSeeds, ALostTimeIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(ManagerBug::lost_time, 20), 0u);
}
TEST(SimManagerSeeds, ALostEventIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(ManagerBug::lost_event, 20), 0u);
}
TEST(SimManagerSeeds, ASuccessorThatWakesNobodyIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(ManagerBug::no_wake_at_succession, 20), 0u);
}
TEST(SimManagerSeeds, ALeakedDescriptorIsFoundWithin20Seeds) {
  EXPECT_NE(first_seed_that_finds(ManagerBug::leaked_descriptor, 20), 0u);
}

}  // namespace
}  // namespace uffdkit::simulate
