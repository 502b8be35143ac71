#include "image/frame_cache.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace uffdkit::image {
namespace {

// Frames whose bytes are their number; `before` runs in each decoding.
class Numbers final : public FrameSource {
 public:
  explicit Numbers(FrameCache& cache) : cache_(cache) {}
  ~Numbers() override { cache_.forget(*this); }

  Result<ReadStatus> decode_frame(std::size_t frame, std::span<std::byte> to, Wait wait) noexcept override {
    ++decoded;
    if (wait == Wait::no && is_cold) return ReadStatus::would_block;
    if (before) before();
    if (is_broken) return Failure(Error("broken", EIO));
    std::ranges::fill(to, static_cast<std::byte>(frame));
    return ReadStatus::done;
  }

  std::atomic<int> decoded = 0;
  std::atomic<bool> is_cold = false;
  std::atomic<bool> is_broken = false;
  std::function<void()> before;

 private:
  FrameCache& cache_;
};

constexpr std::size_t kFrame = 64 * 1024;

bool holds(const Result<FrameCache::FrameRef>& found, std::size_t frame) {
  if (!found || *found == nullptr) return false;
  const auto bytes = FrameCache::bytes_of(**found);
  return bytes.size() == kFrame && bytes.front() == static_cast<std::byte>(frame) &&
         bytes.back() == static_cast<std::byte>(frame);
}

// Holds back who calls pass() until it is opened.
class Gate {
 public:
  void pass() {
    std::unique_lock lock(mutex_);
    ++waiting_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_; });
  }
  void await_one() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ > 0; });
  }
  void open() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
  bool open_ = false;
};

TEST(FrameCache, AFrameIsDecompressedOnceAndThenKept) {
  FrameCache cache{ByteCount(1 << 20)};
  Numbers source(cache);
  for (int i = 0; i < 3; ++i) EXPECT_TRUE(holds(cache.get(source, 7, kFrame, Wait::yes), 7));
  EXPECT_EQ(source.decoded, 1);
  EXPECT_EQ(cache.statistics().hits, 2u);
  EXPECT_EQ(cache.statistics().decoded, 1u);
}

TEST(FrameCache, AFrameInFlightIsDecompressedOnceHoweverManyWantIt) {
  FrameCache cache{ByteCount(1 << 20)};
  Numbers source(cache);
  Gate gate;
  source.before = [&] { gate.pass(); };
  std::atomic<int> good = 0;
  std::vector<std::jthread> readers;
  readers.emplace_back([&] { good += holds(cache.get(source, 3, kFrame, Wait::yes), 3); });
  gate.await_one();
  for (int i = 0; i < 7; ++i)
    readers.emplace_back([&] { good += holds(cache.get(source, 3, kFrame, Wait::yes), 3); });
  // Who may not wait is told so, and holds nobody up.
  const auto now = cache.get(source, 3, kFrame, Wait::no);
  EXPECT_TRUE(now && *now == nullptr);
  gate.open();
  readers.clear();
  EXPECT_EQ(good, 8);
  EXPECT_EQ(source.decoded, 1);
}

TEST(FrameCache, WhoMayNotWaitLeavesTheFrameToWhoMay) {
  FrameCache cache{ByteCount(1 << 20)};
  Numbers source(cache);
  source.is_cold = true;
  const auto cold = cache.get(source, 1, kFrame, Wait::no);
  ASSERT_TRUE(cold);
  EXPECT_EQ(*cold, nullptr);
  EXPECT_TRUE(holds(cache.get(source, 1, kFrame, Wait::yes), 1));
  EXPECT_TRUE(holds(cache.get(source, 1, kFrame, Wait::no), 1));
}

TEST(FrameCache, AnErrorIsNotKept) {
  FrameCache cache{ByteCount(1 << 20)};
  Numbers source(cache);
  source.is_broken = true;
  const auto broken = cache.get(source, 1, kFrame, Wait::yes);
  ASSERT_FALSE(broken);
  EXPECT_EQ(broken.error().message(), "broken");
  source.is_broken = false;
  EXPECT_TRUE(holds(cache.get(source, 1, kFrame, Wait::yes), 1));
  EXPECT_EQ(cache.statistics().failed, 1u);
  EXPECT_EQ(cache.statistics().bytes, kFrame);
}

TEST(FrameCache, ItKeepsNoMoreThanItsBoundAndLetsTheOldestGo) {
  FrameCache cache{ByteCount(4 * kFrame)};
  Numbers source(cache);
  for (std::size_t frame = 0; frame < 4; ++frame) (void)cache.get(source, frame, kFrame, Wait::yes);
  (void)cache.get(source, 0, kFrame, Wait::yes);
  (void)cache.get(source, 4, kFrame, Wait::yes);
  EXPECT_EQ(cache.statistics().bytes, 4 * kFrame);
  EXPECT_EQ(source.decoded, 5);
  (void)cache.get(source, 0, kFrame, Wait::yes);
  EXPECT_EQ(source.decoded, 5) << "the frame that was used last has gone";
  (void)cache.get(source, 1, kFrame, Wait::yes);
  EXPECT_EQ(source.decoded, 6) << "the frame that was not used for longest has stayed";
}

TEST(FrameCache, AFrameThatSomebodyHoldsOutlivesItsPlace) {
  FrameCache cache{ByteCount(kFrame)};
  Numbers source(cache);
  const auto held = cache.get(source, 9, kFrame, Wait::yes);
  for (std::size_t frame = 0; frame < 4; ++frame) (void)cache.get(source, frame, kFrame, Wait::yes);
  EXPECT_TRUE(holds(held, 9));
  EXPECT_EQ(cache.statistics().frames, 1u);
}

TEST(FrameCache, WithoutRoomForAFrameItServesStill) {
  FrameCache cache{ByteCount(0)};
  Numbers source(cache);
  for (std::size_t frame = 0; frame < 4; ++frame)
    EXPECT_TRUE(holds(cache.get(source, frame, kFrame, Wait::yes), frame));
  EXPECT_EQ(cache.statistics().bytes, 0u);
}

TEST(FrameCache, TwoSourcesDoNotMixAndOneThatEndsLeavesNothing) {
  FrameCache cache{ByteCount(64 << 20)};
  Numbers source(cache);
  {
    Numbers other(cache);
    EXPECT_TRUE(holds(cache.get(source, 1, kFrame, Wait::yes), 1));
    EXPECT_TRUE(holds(cache.get(other, 1, kFrame, Wait::yes), 1));
    EXPECT_EQ(other.decoded, 1);
  }
  EXPECT_EQ(cache.statistics().frames, 1u);
}

TEST(FrameCache, ManyThreadsThatReadAllOverGetTheRightFrames) {
  FrameCache cache{ByteCount(8 * kFrame)};
  Numbers source(cache);
  std::atomic<int> wrong = 0;
  {
    std::vector<std::jthread> readers;
    for (std::size_t thread = 0; thread < 4; ++thread)
      readers.emplace_back([&, thread] {
        for (std::size_t i = 0; i < 500; ++i) {
          const std::size_t frame = (i * (2 * thread + 1)) % 20;
          wrong += !holds(cache.get(source, frame, kFrame, Wait::yes), frame);
        }
      });
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(cache.statistics().bytes, 8 * kFrame);
}

}  // namespace
}  // namespace uffdkit::image
