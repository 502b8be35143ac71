// What is recognised as a stream, and how far it is brought ahead of.
#include "engine/streams.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <optional>
#include <random>
#include <set>

namespace uffdkit {
namespace {

constexpr std::int64_t kEnd = 1 << 18;  // pages of the region

// A client whose pages come when they are brought, without delay.
class Client {
 public:
  explicit Client(std::uint64_t around)
      : around_(static_cast<std::int64_t>(around)), streams_(PageCount(around)) {}

  void touch(std::int64_t page, RegionId region = 0) {
    if (!there_.insert({region, page}).second) return;
    ++faults;
    (void)streams_.wanted(region, PageIndex(static_cast<std::uint64_t>(page)));
    come_around(region, page, std::nullopt);
    for (auto ahead = streams_.next(); ahead; ahead = streams_.next())
      for (std::uint64_t i = 0; i < ahead->count; ++i)
        brought += come_around(ahead->region, ahead->first + static_cast<std::int64_t>(i) * ahead->step,
                               ahead->mark);
  }

  int faults = 0;
  int brought = 0;  // pages, before they were asked for

 private:
  int come_around(RegionId region, std::int64_t page, std::optional<std::int64_t> mark) {
    if (page < 0 || page >= kEnd) return 0;
    int come = 0;
    const std::int64_t window = page / around_ * around_;
    for (std::int64_t at = window; at < window + around_; ++at)
      if (at != mark && there_.insert({region, at}).second) ++come;
    return come;
  }

  const std::int64_t around_;
  Streams streams_;
  std::set<std::pair<RegionId, std::int64_t>> there_;
};

class StreamsTest : public testing::TestWithParam<std::uint64_t> {};
INSTANTIATE_TEST_SUITE_P(Around, StreamsTest, testing::Values(1, 16, 64),
                         [](const auto& param) { return std::to_string(param.param); });

TEST_P(StreamsTest, OneThatGoesForwardsFaultsSeldom) {
  Client client(GetParam());
  for (std::int64_t page = 5; page < 20'000; ++page) client.touch(page);
  EXPECT_LT(client.faults, 100);
}

TEST_P(StreamsTest, OneThatGoesBackwardsFaultsSeldom) {
  Client client(GetParam());
  for (std::int64_t page = 20'000; page > 5; --page) client.touch(page);
  EXPECT_LT(client.faults, 100);
}

TEST_P(StreamsTest, OneOfEqualStepsFaultsSeldom) {
  Client client(GetParam());
  for (std::int64_t page = 7; page < 100'000; page += 100) client.touch(page);
  EXPECT_LT(client.faults, 150);
}

TEST_P(StreamsTest, ThreeStreamsAtOnceAreToldApart) {
  Client client(GetParam());
  for (std::int64_t i = 0; i < 10'000; ++i) {
    client.touch(i);
    client.touch(50'000 - i);
    client.touch(i, 1);
  }
  EXPECT_LT(client.faults, 300);
}

TEST_P(StreamsTest, TwoThatBeginCloseToEachOtherAreToldApart) {
  Client client(GetParam());
  for (std::int64_t i = 0; i < 10'000; ++i) {
    client.touch(i);
    client.touch(11'000 + i);
  }
  EXPECT_LT(client.faults, 200);
}

TEST_P(StreamsTest, PagesAtRandomBringNothing) {
  Client client(GetParam());
  std::mt19937_64 random(1);
  for (int i = 0; i < 2000; ++i) client.touch(static_cast<std::int64_t>(random() % kEnd));
  EXPECT_LT(client.brought, 200);
}

TEST_P(StreamsTest, OneThatEndsHasBroughtNoMoreThanTwiceWhatWasTouched) {
  for (const std::int64_t length : {200, 1000, 5000, 20'000}) {
    Client client(GetParam());
    for (std::int64_t page = 0; page < length; ++page) client.touch(page);
    EXPECT_LT(client.brought, 3 * length) << length;
  }
}

TEST_P(StreamsTest, ShortOnesAreTrustedLessAndLess) {
  Client client(GetParam());
  std::mt19937_64 random(1);
  int before = 0;
  for (int i = 0; i < 400; ++i) {
    if (i == 200) before = client.brought;
    const auto at = static_cast<std::int64_t>(random() % (kEnd - 1000));
    const auto step = static_cast<std::int64_t>(GetParam());
    for (std::int64_t page = 0; page < 3 * step; page += step) client.touch(at / step * step + page);
  }
  EXPECT_LE(client.brought - before, before);
  EXPECT_LT(client.brought, 2000);
}

TEST(Streams, TheMarkLiesInTheMiddleOfWhatIsBrought) {
  Streams streams(PageCount(16));
  for (const std::uint64_t page : {0u, 16u, 32u}) (void)streams.wanted(0, PageIndex(page));
  const std::optional<Streams::Ahead> first = streams.next();
  ASSERT_TRUE(first);
  EXPECT_EQ(first->first, 48);
  EXPECT_EQ(first->step, 16);
  EXPECT_EQ(first->count, 4u);
  EXPECT_EQ(first->mark, 80);
  EXPECT_FALSE(streams.next());
  EXPECT_TRUE(streams.wanted(0, PageIndex(80)));
  const std::optional<Streams::Ahead> second = streams.next();
  ASSERT_TRUE(second);
  EXPECT_EQ(second->first, 112);
  EXPECT_EQ(second->count, 8u);
}

TEST(Streams, AFaultBeforeTheMarkBringsNothingMore) {
  Streams streams(PageCount(1));
  for (const std::uint64_t page : {0u, 1u, 2u}) (void)streams.wanted(0, PageIndex(page));
  ASSERT_TRUE(streams.next());
  EXPECT_TRUE(streams.wanted(0, PageIndex(3)));
  EXPECT_TRUE(streams.wanted(0, PageIndex(4)));
  EXPECT_FALSE(streams.next());
}

TEST(Streams, AClientThatIsFasterThanItsPagesIsBroughtWhatLiesAhead) {
  Streams streams(PageCount(1));
  for (std::uint64_t page = 0; page < 1000; ++page) {
    (void)streams.wanted(0, PageIndex(page));
    if (const auto ahead = streams.next()) {
      EXPECT_GT(ahead->first, static_cast<std::int64_t>(page));
      EXPECT_LE(ahead->count, Streams::kMaxPages);
    }
  }
}

}  // namespace
}  // namespace uffdkit
