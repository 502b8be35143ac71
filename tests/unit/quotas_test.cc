#include "manager/quotas.h"

#include <gtest/gtest.h>

#include <cerrno>
#include <limits>

namespace uffdkit {
namespace {

constexpr uid_t kUser = 501;
constexpr uid_t kOther = 502;
constexpr std::int64_t kSecond = 1'000'000'000;

TEST(Quotas, WithoutLimitsNothingIsRefused) {
  Quotas quotas({});
  const std::uint64_t most = std::numeric_limits<std::uint64_t>::max();
  EXPECT_FALSE(quotas.limits_usage());
  EXPECT_TRUE(quotas.check(kUser, {most, most, most}, {most, most, most}));
  for (int i = 0; i < 1000; ++i) EXPECT_TRUE(quotas.take_request(kUser, 0));
  EXPECT_TRUE(quotas.refused().empty());
}

TEST(Quotas, AUserMayHaveAsMuchAsTheLimitAndNoMore) {
  Quotas quotas({.sessions = 2, .regions = 10, .memory_bytes = 1000});
  EXPECT_TRUE(quotas.check(kUser, {1, 9, 900}, {1, 1, 100}));
  for (const auto& [more, what] :
       {std::pair(Usage{2, 1, 1}, "2 sessions"), std::pair(Usage{1, 2, 1}, "10 regions"),
        std::pair(Usage{1, 1, 101}, "1000 bytes")}) {
    const auto refused = quotas.check(kUser, {1, 9, 900}, more);
    ASSERT_FALSE(refused);
    EXPECT_EQ(refused.error().os_error(), ENOSPC);
    EXPECT_NE(refused.error().text().find(what), std::string::npos) << refused.error().text();
  }
  EXPECT_EQ(quotas.refused().at(kUser), 3u);
}

TEST(Quotas, WhoHasTooMuchAlreadyMayStillHaveWhatIsNotLimited) {
  Quotas quotas({.sessions = 1});
  EXPECT_TRUE(quotas.check(kUser, {5, 0, 0}, {0, 3, 3}));
  EXPECT_FALSE(quotas.check(kUser, {5, 0, 0}, {1, 0, 0}));
}

TEST(Quotas, SumsThatAreNoNumbersAreTooMuch) {
  Quotas quotas({.memory_bytes = 1000});
  EXPECT_FALSE(quotas.check(kUser, {0, 0, 500}, {0, 0, std::numeric_limits<std::uint64_t>::max()}));
}

TEST(Quotas, WhatIsOnItsWayCounts) {
  Quotas quotas({.regions = 10});
  quotas.reserve(kUser, {0, 6, 0});
  EXPECT_FALSE(quotas.check(kUser, {0, 4, 0}, {0, 1, 0}));
  EXPECT_TRUE(quotas.check(kOther, {0, 4, 0}, {0, 1, 0}));
  quotas.release(kUser, {0, 6, 0});
  EXPECT_TRUE(quotas.check(kUser, {0, 4, 0}, {0, 6, 0}));
}

TEST(Quotas, RequestsComeBackWithTime) {
  Quotas quotas({.requests_per_second = 4});
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(quotas.take_request(kUser, 100));
  const auto refused = quotas.take_request(kUser, 100);
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().os_error(), ENOSPC);
  EXPECT_TRUE(quotas.take_request(kOther, 100)) << "another user's";
  EXPECT_TRUE(quotas.take_request(kUser, 100 + kSecond / 4));
  EXPECT_FALSE(quotas.take_request(kUser, 100 + kSecond / 4));
  // Not more than of one second, however long nothing came.
  for (int i = 0; i < 4; ++i) EXPECT_TRUE(quotas.take_request(kUser, 100 * kSecond));
  EXPECT_FALSE(quotas.take_request(kUser, 100 * kSecond));
  EXPECT_EQ(quotas.refused().at(kUser), 3u);
}

TEST(Quotas, LimitsThatAreHigherThanAClockIsFineLimitNothing) {
  Quotas quotas({.requests_per_second = 5'000'000'000});
  for (int i = 0; i < 1000; ++i) EXPECT_TRUE(quotas.take_request(kUser, 0));
}

}  // namespace
}  // namespace uffdkit
