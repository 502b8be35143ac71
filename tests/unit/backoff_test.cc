#include "client/backoff.h"

#include <gtest/gtest.h>

#include <vector>

namespace uffdkit::internal {
namespace {

using namespace std::chrono_literals;

TEST(Backoff, PausesDoubleUpToTheLimitAndStayThere) {
  Backoff pauses(100ms, 2000ms);
  std::vector<std::chrono::milliseconds> seen(7);
  for (auto& pause : seen) pause = pauses.next();
  EXPECT_EQ(seen,
            (std::vector<std::chrono::milliseconds>{100ms, 200ms, 400ms, 800ms, 1600ms, 2000ms, 2000ms}));
}

}  // namespace
}  // namespace uffdkit::internal
