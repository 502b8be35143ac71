#include "manager/watchdog.h"

#include <gtest/gtest.h>

namespace uffdkit {
namespace {

constexpr std::int64_t kSecond = 1'000'000'000;

SessionStatus idle(SessionId id) {
  SessionStatus session;
  session.id = id;
  session.image = "guest.mem";
  return session;
}

// A session whose oldest fault came at this time, as it is now.
SessionStatus waiting(SessionId id, std::int64_t since_ns, std::int64_t now_ns,
                      PendingWhy why = PendingWhy::reading) {
  SessionStatus session = idle(id);
  session.read_retries = 2;
  session.pending = 1;
  session.oldest_page = 0x7f0000003000;
  session.oldest_offset = 12288;
  session.oldest_why = why;
  session.oldest_pending_ns = now_ns - since_ns;
  return session;
}

class WatchdogTest : public testing::Test {
 protected:
  std::vector<std::string> look(std::vector<SessionStatus> sessions, std::int64_t now_ns) {
    return watchdog_.look(sessions, now_ns);
  }
  Watchdog watchdog_{10 * kSecond};
};

TEST_F(WatchdogTest, SaysNothingUpToTheLimit) {
  EXPECT_TRUE(look({waiting(1, 0, 10 * kSecond)}, 10 * kSecond).empty());
  EXPECT_TRUE(look({idle(2)}, 10 * kSecond).empty());
  EXPECT_EQ(watchdog_.late_faults(), 0u);
}

TEST_F(WatchdogTest, SaysWhichPageWaitsForWhatAndAgainWhenTwiceTheTimeHasPassed) {
  const auto lines = look({waiting(1, 0, 11 * kSecond)}, 11 * kSecond);
  ASSERT_EQ(lines.size(), 1u);
  for (const char* part : {"session 1", "0x7f0000003000", "offset 12288 of guest.mem", "11.0 s",
                           "its read from the image has not come back", "2 reads were tried again"})
    EXPECT_NE(lines[0].find(part), std::string::npos) << lines[0];
  EXPECT_TRUE(look({waiting(1, 0, 12 * kSecond)}, 12 * kSecond).empty());
  EXPECT_TRUE(look({waiting(1, 0, 21 * kSecond)}, 21 * kSecond).empty());
  EXPECT_EQ(look({waiting(1, 0, 23 * kSecond)}, 23 * kSecond).size(), 1u);
  EXPECT_EQ(watchdog_.late_faults(), 1u);
}

TEST_F(WatchdogTest, SaysWhenItIsOver) {
  look({waiting(1, 0, 11 * kSecond)}, 11 * kSecond);
  const auto lines = look({idle(1)}, 12 * kSecond);
  ASSERT_EQ(lines.size(), 1u);
  EXPECT_NE(lines[0].find("longest was 12.0 s"), std::string::npos) << lines[0];
  EXPECT_TRUE(look({idle(1)}, 13 * kSecond).empty());
}

TEST_F(WatchdogTest, SaysOfEachSessionAndOfEachFaultOfItsOwn) {
  EXPECT_EQ(look({waiting(1, 0, 11 * kSecond), waiting(2, 0, 11 * kSecond)}, 11 * kSecond).size(), 2u);
  EXPECT_EQ(look({waiting(1, 1 * kSecond, 12 * kSecond), waiting(2, 0, 12 * kSecond)}, 12 * kSecond).size(),
            1u);
  EXPECT_EQ(watchdog_.late_faults(), 3u);
}

TEST_F(WatchdogTest, OfAClientThatIsStoppedNothingIsLate) {
  EXPECT_TRUE(look({waiting(1, 0, 99 * kSecond, PendingWhy::paused)}, 99 * kSecond).empty());
}

TEST_F(WatchdogTest, EveryReasonHasAWordAndAText) {
  for (const PendingWhy why : {PendingWhy::serving, PendingWhy::reading, PendingWhy::full,
                               PendingWhy::changing, PendingWhy::no_memory, PendingWhy::paused}) {
    EXPECT_NE(to_string(why), "?");
    EXPECT_NE(describe(why), "?");
  }
}

}  // namespace
}  // namespace uffdkit
