#include "tool/progress_bar.h"

#include <gtest/gtest.h>

namespace uffdkit::tool {
namespace {

constexpr std::uint64_t kGiB = 1u << 30;
constexpr std::size_t kWide = 120;

TEST(ProgressBar, ShowsHowFarItIsHowFastItGoesAndHowLongItTakesStill) {
  EXPECT_EQ(progress_line("create", kGiB, 4 * kGiB, 2, kWide),
            "create [#######                       ]  25 %, 1.0 GiB of 4.0 GiB, 512.0 MiB/s, 6 s left");
  EXPECT_EQ(progress_line("create", 4 * kGiB, 4 * kGiB, 8, kWide),
            "create [##############################] 100 %, 4.0 GiB of 4.0 GiB, 512.0 MiB/s");
}

TEST(ProgressBar, ShowsNoEndWhereNoneIsKnown) {
  EXPECT_EQ(progress_line("convert", 3 << 20, 0, 2, kWide), "convert 3.0 MiB, 1.5 MiB/s");
}

TEST(ProgressBar, NeedsNoTimeToHavePassed) {
  EXPECT_EQ(progress_line("verify", 0, kGiB, 0, kWide),
            "verify [                              ]   0 %, 0 bytes of 1.0 GiB, 0 bytes/s");
}

TEST(ProgressBar, FitsIntoTheTerminal) {
  EXPECT_EQ(progress_line("create", kGiB, 4 * kGiB, 2, 80),
            "create [#####                ]  25 %, 1.0 GiB of 4.0 GiB, 512.0 MiB/s, 6 s left");
  EXPECT_EQ(progress_line("create", kGiB, 4 * kGiB, 2, 60),
            "create  25 %, 1.0 GiB of 4.0 GiB, 512.0 MiB/s, 6 s left");
  for (std::size_t columns = 0; columns < 100; ++columns) {
    const std::size_t length_max = columns == 0 ? 0 : columns - 1;
    EXPECT_LE(progress_line("create", kGiB, 4 * kGiB, 2, columns).size(), length_max);
    EXPECT_LE(progress_line("convert", kGiB, 0, 2, columns).size(), length_max);
  }
}

}  // namespace
}  // namespace uffdkit::tool
