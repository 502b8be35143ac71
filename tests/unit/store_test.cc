#include <uffdkit/store.h>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

#include "engine/fetch.h"
#include "support/access_time.h"
#include "support/temp_dir.h"

namespace uffdkit {
namespace {

constexpr std::size_t kPage = 4096;

std::vector<std::byte> read(Store& store, std::uint64_t from, std::size_t bytes) {
  std::vector<std::byte> buffer(bytes, std::byte{0xee});
  const auto read = store.read(StoreOffset(from), buffer, Wait::yes);
  EXPECT_TRUE(read && *read == ReadStatus::done) << (read ? "" : read.error().message());
  return buffer;
}

bool all(std::span<const std::byte> bytes, int value) {
  for (const std::byte byte : bytes)
    if (byte != static_cast<std::byte>(value)) return false;
  return true;
}

TEST(ZeroStore, IsAllZeroAndWholePages) {
  const auto store = make_zero_store(ByteCount(kPage + 1));
  EXPECT_EQ(store->size(), ByteCount(2 * kPage));
  EXPECT_TRUE(store->extent_at(StoreOffset(kPage)).zero);
  EXPECT_EQ(store->extent_at(StoreOffset(kPage)).end, StoreOffset(2 * kPage));
  EXPECT_TRUE(all(read(*store, 0, 2 * kPage), 0));
}

TEST(MemoryStore, HoldsACopyPaddedWithZeros) {
  std::vector<std::byte> bytes(kPage + 10, std::byte{7});
  const auto store = make_memory_store(bytes);
  bytes.assign(bytes.size(), std::byte{9});
  EXPECT_EQ(store->size(), ByteCount(2 * kPage));
  EXPECT_TRUE(all(read(*store, 0, kPage + 10), 7));
  EXPECT_TRUE(all(read(*store, kPage + 4096 - 8, 8), 0));
  EXPECT_FALSE(store->extent_at(StoreOffset(0)).zero);
}

class FileStoreTest : public testing::Test {
 protected:
  FileStoreTest() : path_(dir_ / "image") {
    fd_.reset(::open(path_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
  }

  void write(std::uint64_t at, std::size_t bytes, int value) {
    const std::vector<char> data(bytes, static_cast<char>(value));
    ASSERT_EQ(::pwrite(fd_.get(), data.data(), bytes, static_cast<off_t>(at)), static_cast<ssize_t>(bytes));
  }
  std::shared_ptr<Store> open() { return open_file_store(path_).value(); }

  test::TempDir dir_;
  const std::string path_;
  UniqueFd fd_;
};

TEST_F(FileStoreTest, OfMoreHolesThanAreLookedForAtOnceTheOthersAreFoundLater) {
  constexpr std::uint64_t kHoles = 3000;
  for (std::uint64_t i = 0; i < kHoles; ++i) write(2 * i * kPage, kPage, 1);
  ASSERT_EQ(::ftruncate(fd_.get(), static_cast<off_t>(2 * kHoles * kPage)), 0);
  const auto store = open();
  const auto is_hole = [&](std::uint64_t i) {
    return store->extent_at(StoreOffset((2 * i + 1) * kPage)).zero;
  };
  if (!is_hole(0)) GTEST_SKIP() << "needs a file system that tells where holes are";
  const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(30);
  while (!is_hole(kHoles - 1) && std::chrono::steady_clock::now() < give_up) std::this_thread::yield();
  for (std::uint64_t i = 0; i < kHoles; ++i) EXPECT_TRUE(is_hole(i)) << i;
  EXPECT_FALSE(store->extent_at(StoreOffset(2 * (kHoles - 1) * kPage)).zero);
}

TEST_F(FileStoreTest, HolesAreKnownWithoutBeingRead) {
  constexpr std::uint64_t kHole = 1u << 20;
  write(0, kPage, 1);
  write(kHole, kPage, 2);
  ASSERT_EQ(::ftruncate(fd_.get(), 2 * kHole), 0);
  const auto store = open();
  if (store->extent_at(StoreOffset(kHole / 2)).end == StoreOffset(2 * kHole))
    GTEST_SKIP() << "needs a file system that tells where holes are";
  EXPECT_FALSE(store->extent_at(StoreOffset(0)).zero);
  EXPECT_TRUE(store->extent_at(StoreOffset(kHole / 2)).zero);
  EXPECT_EQ(store->extent_at(StoreOffset(kHole / 2)).end, StoreOffset(kHole));
  EXPECT_FALSE(store->extent_at(StoreOffset(kHole)).zero);
  EXPECT_TRUE(store->extent_at(StoreOffset(2 * kHole - kPage)).zero);
  EXPECT_EQ(store->extent_at(StoreOffset(2 * kHole - kPage)).end, StoreOffset(2 * kHole));
  std::uint64_t data = 0;
  for (std::uint64_t at = 0; at < 2 * kHole;) {
    const Extent extent = store->extent_at(StoreOffset(at));
    ASSERT_GT(extent.end.value, at);
    ASSERT_EQ(extent.end.value % kPage, 0u);
    if (!extent.zero) data += extent.end.value - at;
    at = extent.end.value;
  }
  EXPECT_LT(data, kHole);
  EXPECT_TRUE(all(read(*store, kHole, kPage), 2));
  EXPECT_TRUE(all(read(*store, kHole / 2, kPage), 0));
}

TEST_F(FileStoreTest, TheLastPageIsPaddedWithZeros) {
  write(0, kPage + 100, 5);
  const auto store = open();
  EXPECT_EQ(store->size(), ByteCount(2 * kPage));
  const auto bytes = read(*store, 0, 2 * kPage);
  EXPECT_TRUE(all(std::span(bytes).first(kPage + 100), 5));
  EXPECT_TRUE(all(std::span(bytes).subspan(kPage + 100), 0));
}

TEST_F(FileStoreTest, WhatIsReadWithoutWaitingIsRightOrNotGiven) {
  write(0, 4 * kPage + 1, 5);
  const auto store = open();
  for (int i = 0; i < 2; ++i) {
    std::vector<std::byte> buffer(5 * kPage);
    const auto status = store->read(StoreOffset(0), buffer, Wait::no);
    ASSERT_TRUE(status);
    if (*status == ReadStatus::done) {
      EXPECT_TRUE(all(std::span(buffer).first(4 * kPage + 1), 5));
      EXPECT_TRUE(all(std::span(buffer).subspan(4 * kPage + 1), 0));
    }
    (void)read(*store, 0, kPage);
  }
}

TEST_F(FileStoreTest, AFileThatIsCutShortGivesAnErrorAndNeverZeros) {
  write(0, 4 * kPage, 5);
  const auto store = open();
  ASSERT_EQ(::ftruncate(fd_.get(), 2 * kPage + 50), 0);
  EXPECT_TRUE(all(read(*store, 0, 2 * kPage), 5));
  for (const Wait wait : {Wait::no, Wait::yes}) {
    std::vector<std::byte> buffer(kPage);
    for (const std::uint64_t page : {2u, 3u}) {
      const auto status = store->read(StoreOffset(page * kPage), buffer, wait);
      EXPECT_TRUE(!status || *status == ReadStatus::would_block) << page;
      if (wait == Wait::yes) {
        ASSERT_FALSE(status);
        EXPECT_NE(status.error().message().find("ends here"), std::string::npos);
      }
    }
  }
}

TEST_F(FileStoreTest, OpeningADescriptorLeavesItsPositionAlone) {
  write(0, 4 * kPage, 5);
  ASSERT_EQ(::ftruncate(fd_.get(), 64 * kPage), 0);
  ASSERT_EQ(::lseek(fd_.get(), 123, SEEK_SET), 123);
  const auto store = open_file_store(fd_.get(), "by number").value();
  EXPECT_EQ(::lseek(fd_.get(), 0, SEEK_CUR), 123);
  EXPECT_EQ(store->name(), "by number");
  fd_.reset();
  EXPECT_TRUE(all(read(*store, 0, kPage), 5));
}

TEST_F(FileStoreTest, ReadingIsNotNoted) {
  write(0, kPage, 5);
  const auto store = open();
  if (!test::set_accessed_long_ago(path_)) GTEST_SKIP() << "the file system notes no reads";
  read(*store, 0, kPage);
  EXPECT_EQ(test::accessed_at(path_), 1);
}

TEST_F(FileStoreTest, ReadingByADescriptorOfTheCallersIsNotedAsBefore) {
  write(0, kPage, 5);
  const int flags = ::fcntl(fd_.get(), F_GETFL);
  const auto store = open_file_store(fd_.get(), "by number").value();
  EXPECT_EQ(::fcntl(fd_.get(), F_GETFL), flags);
}

TEST_F(FileStoreTest, WhatIsNoMemoryImageIsRefusedAtOnce) {
  const std::string fifo = dir_ / "fifo";
  ASSERT_EQ(::mkfifo(fifo.c_str(), 0600), 0);
  EXPECT_FALSE(open_file_store(fifo));
  EXPECT_FALSE(open_file_store(dir_.path()));
  EXPECT_FALSE(open_file_store(std::string("/dev/null")));
  EXPECT_EQ(open_file_store(dir_ / "none").error().os_error(), ENOENT);
  EXPECT_FALSE(open_file_store(path_));  // empty
  EXPECT_FALSE(open_file_store(-1, "none"));
  write(0, kPage, 1);
  const UniqueFd writing(::open(path_.c_str(), O_WRONLY | O_CLOEXEC));
  EXPECT_FALSE(open_file_store(writing.get(), "for writing only"));
}

// ---- fetches ----------------------------------------------------------------------------------------------

// Fails whole reads that hold a bad page; counts what it is asked.
class PartlyBadStore final : public Store {
 public:
  std::vector<std::uint64_t> bad;
  bool blocks_although_it_may = false;
  int reads = 0;
  ByteCount size() const noexcept override { return ByteCount(64 * kPage); }
  std::string name() const override { return "partly bad"; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(64 * kPage)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    EXPECT_EQ(wait, Wait::yes);
    ++reads;
    if (blocks_although_it_may) return ReadStatus::would_block;
    for (const std::uint64_t page : bad)
      if (page * kPage >= from.value && page * kPage < from.value + to.size())
        return Failure(Error("page " + std::to_string(page), EIO));
    for (std::size_t at = 0; at < to.size(); ++at) to[at] = static_cast<std::byte>((from.value + at) / kPage);
    return ReadStatus::done;
  }
};

Fetch fetch_of(std::shared_ptr<Store> store, std::uint64_t page, std::uint64_t count) {
  Fetch fetch{};
  fetch.granules = PageCount(count);
  fetch.from = StoreOffset(page * kPage);
  fetch.store = std::move(store);
  fetch.buffer = std::make_unique<std::byte[]>(count * kPage);
  return fetch;
}

TEST(ReadFetch, IsOneReadWhereAllIsWell) {
  const auto store = std::make_shared<PartlyBadStore>();
  Fetch fetch = fetch_of(store, 8, 16);
  read_fetch(fetch);
  EXPECT_EQ(store->reads, 1);
  EXPECT_TRUE(fetch.failed.none());
  EXPECT_FALSE(fetch.error);
}

TEST(ReadFetch, OneBadPageDoesNotCondemnItsNeighbours) {
  const auto store = std::make_shared<PartlyBadStore>();
  store->bad = {10, 12};
  Fetch fetch = fetch_of(store, 8, 16);
  read_fetch(fetch);
  EXPECT_EQ(fetch.failed.count(), 2u);
  EXPECT_TRUE(fetch.failed[2] && fetch.failed[4]);
  EXPECT_EQ(fetch.error->message(), "page 10");
  for (const std::size_t page : {0u, 1u, 3u, 15u})
    EXPECT_TRUE(all({fetch.buffer.get() + page * kPage, kPage}, static_cast<int>(8 + page)));
}

TEST(ReadFetch, AStoreThatGivesNothingThoughItMayWaitFails) {
  const auto store = std::make_shared<PartlyBadStore>();
  store->blocks_although_it_may = true;
  Fetch fetch = fetch_of(store, 0, 4);
  read_fetch(fetch);
  EXPECT_EQ(fetch.failed.count(), 4u);
  EXPECT_TRUE(fetch.error);
}

}  // namespace
}  // namespace uffdkit
