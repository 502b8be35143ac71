#include "engine/shared_image.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <set>
#include <thread>
#include <vector>

#include "support/idle_work.h"
#include "support/transparent_pages.h"

namespace uffdkit {
namespace {

constexpr std::uint64_t kPages = 1024;

std::byte byte_of(std::uint64_t page) {
  return static_cast<std::byte>(1 + page % 251);
}

// Pages that all differ, a hole, pages that cannot be read, and reads that wait until the test lets them go.
class ScriptedStore : public Store {
 public:
  ByteCount size() const noexcept override { return ByteCount(kPages * 4096); }
  std::string name() const override { return "scripted"; }
  Extent extent_at(StoreOffset from) const noexcept override {
    const std::uint64_t page = from.value / 4096;
    const bool zero = page >= hole_first && page < hole_end;
    const std::uint64_t end = zero ? hole_end : page < hole_first ? hole_first : kPages;
    return {.zero = zero, .end = StoreOffset(end * 4096)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    std::unique_lock lock(mutex_);
    if (slow && wait == Wait::no) return ReadStatus::would_block;
    changed_.wait(lock, [&] { return !held_ || wait == Wait::no; });
    ++reads;
    for (std::size_t i = 0; i < to.size() / 4096; ++i) {
      const std::uint64_t page = from.value / 4096 + i;
      if (bad.contains(page)) return Failure(Error(fmt::format("page {} is bad", page), EIO));
      const bool zero = page >= hole_first && page < hole_end;
      std::ranges::fill(to.subspan(i * 4096, 4096), zero ? std::byte{0} : byte_of(page));
    }
    return ReadStatus::done;
  }
  void hold(bool held) {
    const std::lock_guard lock(mutex_);
    held_ = held;
    changed_.notify_all();
  }

  std::uint64_t hole_first = kPages;
  std::uint64_t hole_end = kPages;
  std::set<std::uint64_t> bad;
  bool slow = false;
  int reads = 0;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool held_ = false;
};

// Who waits for fetches.
class Sink : public FetchSink {
 public:
  void fetched(std::unique_ptr<Fetch> fetch) override {
    const std::lock_guard lock(mutex_);
    got_.push_back(std::move(fetch));
    changed_.notify_all();
  }
  std::unique_ptr<Fetch> next() {
    std::unique_lock lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::seconds(30), [&] { return !got_.empty(); })) return nullptr;
    std::unique_ptr<Fetch> fetch = std::move(got_.front());
    got_.erase(got_.begin());
    return fetch;
  }
  std::size_t waiting() {
    const std::lock_guard lock(mutex_);
    return got_.size();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::unique_ptr<Fetch>> got_;
};

class SharedImageTest : public testing::Test {
 protected:
  void SetUp() override {
    auto lane = StoreLane::create(store_);
    ASSERT_TRUE(lane);
    auto image = SharedImage::create(std::move(*lane));
    ASSERT_TRUE(image) << image.error().text();
    image_ = std::move(*image);
    auto file = image_->open_for_client();
    ASSERT_TRUE(file);
    file_ = std::move(*file);
  }
  SharedImage::Fill fill(std::uint64_t first, std::uint64_t count) {
    return image_->fill({PageIndex(first), PageCount(count)}, scratch_).fill;
  }
  static std::unique_ptr<Fetch> fetch_of(std::uint64_t id, std::uint64_t first, std::uint64_t count) {
    auto fetch = std::make_unique<Fetch>();
    fetch->id = id;
    fetch->granules = PageCount(count);
    fetch->from = StoreOffset(first * 4096);
    return fetch;
  }
  std::uint64_t filled() const { return image_->filled_pages(); }
  // The page's only byte value, as a client reads it.
  std::byte page(std::uint64_t number) const {
    std::array<std::byte, 4096> bytes;
    EXPECT_EQ(::pread(file_.get(), bytes.data(), 4096, static_cast<off_t>(number * 4096)), 4096);
    EXPECT_TRUE(std::ranges::all_of(bytes, [&](std::byte b) { return b == bytes[0]; })) << number;
    return bytes[0];
  }
  bool in_file(std::uint64_t number) const {
    const auto at = static_cast<off_t>(number * 4096);
    return ::lseek(file_.get(), at, SEEK_DATA) == at;
  }

  std::shared_ptr<ScriptedStore> store_ = std::make_shared<ScriptedStore>();
  std::shared_ptr<SharedImage> image_;
  UniqueFd file_;
  std::vector<std::byte> scratch_ = std::vector<std::byte>(kPages * 4096);
};

TEST_F(SharedImageTest, PagesThatWereAskedForAreThereAndNoOthers) {
  EXPECT_EQ(fill(16, 8), SharedImage::Fill::done);
  EXPECT_EQ(filled(), 8u);
  for (std::uint64_t number = 0; number < kPages; ++number) {
    const bool asked = number >= 16 && number < 24;
    EXPECT_EQ(image_->has(PageIndex(number)), asked);
    EXPECT_EQ(in_file(number), asked);
    if (asked) {
      EXPECT_EQ(page(number), byte_of(number));
    }
  }
}

TEST_F(SharedImageTest, WhatIsThereIsNotReadAgain) {
  ASSERT_EQ(fill(10, 4), SharedImage::Fill::done);
  const int before = store_->reads;
  EXPECT_EQ(fill(10, 4), SharedImage::Fill::done);
  EXPECT_EQ(store_->reads, before);
  // Two gaps, each read once.
  EXPECT_EQ(fill(8, 8), SharedImage::Fill::done);
  EXPECT_EQ(store_->reads, before + 2);
  EXPECT_EQ(filled(), 8u);
}

TEST_F(SharedImageTest, AHoleOfTheImageIsPresentWithoutBeingRead) {
  store_->hole_first = 32;
  store_->hole_end = 64;
  EXPECT_EQ(fill(32, 32), SharedImage::Fill::done);
  EXPECT_EQ(store_->reads, 0);
  for (std::uint64_t number = 32; number < 64; ++number) {
    EXPECT_TRUE(in_file(number));
    EXPECT_EQ(page(number), std::byte{0});
  }
}

TEST_F(SharedImageTest, AHoleAndDataInOneRunAreBothRight) {
  store_->hole_first = 32;
  store_->hole_end = 40;
  EXPECT_EQ(fill(28, 16), SharedImage::Fill::done);
  EXPECT_EQ(page(31), byte_of(31));
  EXPECT_EQ(page(32), std::byte{0});
  EXPECT_EQ(page(40), byte_of(40));
}

TEST_F(SharedImageTest, AllWhoWaitForAWindowHearOfItsOneRead) {
  store_->slow = true;
  store_->hold(true);
  auto first = std::make_shared<Sink>();
  auto second = std::make_shared<Sink>();
  ASSERT_EQ(fill(0, 64), SharedImage::Fill::under_way);
  image_->fetch(fetch_of(1, 0, 64), first);
  ASSERT_EQ(fill(0, 64), SharedImage::Fill::under_way);
  image_->fetch(fetch_of(2, 0, 64), second);
  EXPECT_EQ(first->waiting() + second->waiting(), 0u);
  store_->hold(false);
  const auto one = first->next();
  const auto two = second->next();
  ASSERT_TRUE(one && two);
  EXPECT_EQ(one->id, 1u);
  EXPECT_EQ(two->id, 2u);
  EXPECT_EQ(store_->reads, 1);
  EXPECT_EQ(filled(), 64u);
  EXPECT_EQ(page(63), byte_of(63));
}

TEST_F(SharedImageTest, WindowsThatOverlapReadEachPageOnce) {
  store_->slow = true;
  store_->hold(true);
  auto sink = std::make_shared<Sink>();
  image_->fetch(fetch_of(1, 0, 32), sink);
  image_->fetch(fetch_of(2, 16, 32), sink);
  store_->hold(false);
  ASSERT_TRUE(sink->next());
  ASSERT_TRUE(sink->next());
  EXPECT_EQ(store_->reads, 2);
  EXPECT_EQ(filled(), 48u);
  for (std::uint64_t number = 0; number < 48; ++number) EXPECT_EQ(page(number), byte_of(number));
}

TEST_F(SharedImageTest, WhoAskedFirstMayGoAway) {
  store_->slow = true;
  store_->hold(true);
  auto first = std::make_shared<Sink>();
  auto second = std::make_shared<Sink>();
  image_->fetch(fetch_of(1, 0, 16), first);
  image_->fetch(fetch_of(2, 0, 16), second);
  first.reset();
  store_->hold(false);
  ASSERT_TRUE(second->next());
  EXPECT_EQ(filled(), 16u);
}

TEST_F(SharedImageTest, AFetchOfWhatIsThereComesBackAtOnce) {
  ASSERT_EQ(fill(0, 16), SharedImage::Fill::done);
  auto sink = std::make_shared<Sink>();
  image_->fetch(fetch_of(9, 0, 16), sink);
  EXPECT_EQ(sink->waiting(), 1u);
}

TEST_F(SharedImageTest, APageThatCannotBeReadFailsAloneForEveryoneAndIsTriedAgain) {
  store_->bad = {5};
  auto sink = std::make_shared<Sink>();
  ASSERT_EQ(fill(0, 16), SharedImage::Fill::under_way);
  image_->fetch(fetch_of(1, 4, 4), sink);
  const auto failed = sink->next();
  ASSERT_TRUE(failed);
  EXPECT_EQ(failed->failed.count(), 1u);
  EXPECT_TRUE(failed->failed[1]);
  ASSERT_TRUE(failed->error);
  EXPECT_EQ(filled(), 15u);
  EXPECT_FALSE(in_file(5));

  store_->bad.clear();
  EXPECT_EQ(fill(5, 1), SharedImage::Fill::done);
  EXPECT_EQ(page(5), byte_of(5));
}

TEST_F(SharedImageTest, AHoleIsThereThoughItsNeighboursCannotBeRead) {
  store_->hole_first = 6;
  store_->hole_end = 8;
  store_->bad = {4, 5, 6, 7};
  auto sink = std::make_shared<Sink>();
  image_->fetch(fetch_of(1, 4, 4), sink);
  const auto fetch = sink->next();
  ASSERT_TRUE(fetch);
  EXPECT_TRUE(fetch->failed[0] && fetch->failed[1]);
  EXPECT_FALSE(fetch->failed[2] || fetch->failed[3]);
  EXPECT_TRUE(image_->has(PageIndex(6)) && image_->has(PageIndex(7)));
  EXPECT_EQ(page(7), std::byte{0});
}

TEST_F(SharedImageTest, APageThatTheFileHasLostIsBroughtAgain) {
  ASSERT_EQ(fill(0, 16), SharedImage::Fill::done);
  const UniqueFd writable(::open(fmt::format("/proc/self/fd/{}", file_.get()).c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_TRUE(writable);
  ASSERT_EQ(::fallocate(writable.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 4096), 0);
  image_->look_again(PageIndex(0));
  EXPECT_TRUE(image_->has(PageIndex(0)));
  image_->look_again(PageIndex(1));
  EXPECT_FALSE(image_->has(PageIndex(1)));
  EXPECT_EQ(fill(0, 16), SharedImage::Fill::done);
  EXPECT_EQ(page(1), byte_of(1));
  EXPECT_EQ(filled(), 16u);
}

TEST_F(SharedImageTest, ZerosThatSomebodyElsePutThereDoNotCountAsThere) {
  const UniqueFd writable(::open(fmt::format("/proc/self/fd/{}", file_.get()).c_str(), O_RDWR | O_CLOEXEC));
  ASSERT_EQ(::fallocate(writable.get(), 0, 0, 4096), 0);
  EXPECT_FALSE(image_->has(PageIndex(0)));
  EXPECT_EQ(fill(0, 1), SharedImage::Fill::done);
  EXPECT_EQ(page(0), byte_of(0));
}

TEST_F(SharedImageTest, AClientCanNeitherWriteNorResizeIt) {
  EXPECT_EQ(::pwrite(file_.get(), "x", 1, 0), -1);
  EXPECT_EQ(errno, EBADF);
  struct stat status;
  ASSERT_EQ(::fstat(file_.get(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777u, 0600u);
  EXPECT_EQ(::fcntl(file_.get(), F_GET_SEALS), F_SEAL_SHRINK | F_SEAL_GROW);
}

TEST_F(SharedImageTest, WhenItIsCompleteNobodyCanWriteItAnyMore) {
  ASSERT_EQ(fill(0, kPages - 1), SharedImage::Fill::done);
  EXPECT_EQ(::fcntl(file_.get(), F_GET_SEALS) & F_SEAL_WRITE, 0);
  ASSERT_EQ(fill(kPages - 1, 1), SharedImage::Fill::done);
  EXPECT_NE(::fcntl(file_.get(), F_GET_SEALS) & F_SEAL_WRITE, 0);
}

TEST_F(SharedImageTest, AClientThatNeedsZerosIsServedByResolving) {
  EXPECT_EQ(image_->mode_for(true), SharingMode::resolve);
}

TEST_F(SharedImageTest, ManyThreadsThatFillAtOnceReadEachPageOnce) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([this] {
      std::vector<std::byte> scratch(16 * 4096);
      for (std::uint64_t first = 0; first < kPages; first += 16)
        while (image_->fill({PageIndex(first), PageCount(16)}, scratch).fill != SharedImage::Fill::done)
          std::this_thread::yield();
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(store_->reads, static_cast<int>(kPages / 16));
  EXPECT_EQ(filled(), kPages);
  for (std::uint64_t number = 0; number < kPages; ++number) EXPECT_EQ(page(number), byte_of(number));
}

TEST_F(SharedImageTest, WhatIsCompleteBecomesAHugePageAndTheRestDoesNot) {
  if (const std::string lacking = test::lacking_for_huge_file_pages(); !lacking.empty())
    GTEST_SKIP() << lacking;
  ASSERT_EQ(fill(512, 512), SharedImage::Fill::done);
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!test::is_one_huge_page(file_.get(), 512 * 4096)) {
    ASSERT_LT(std::chrono::steady_clock::now(), give_up);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  EXPECT_FALSE(in_file(0));
  for (std::uint64_t number = 512; number < kPages; ++number) EXPECT_EQ(page(number), byte_of(number));
}

TEST_F(SharedImageTest, NothingBecomesAHugePageForClientsThatHaveItResolved) {
  if (const std::string lacking = test::lacking_for_huge_file_pages(); !lacking.empty())
    GTEST_SKIP() << lacking;
  ASSERT_EQ(image_->mode_for(/*removed_reads_zero=*/true), SharingMode::resolve);
  ASSERT_EQ(fill(512, 512), SharedImage::Fill::done);
  // The lane has nothing else to do, and comes to this after what it was asked for before.
  const auto after = std::make_shared<test::CountedWork>();
  image_->lane()->when_idle(after);
  after->wait();
  EXPECT_FALSE(test::is_one_huge_page(file_.get(), 512 * 4096));
}

}  // namespace
}  // namespace uffdkit
