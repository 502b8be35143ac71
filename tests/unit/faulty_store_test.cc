#include <gtest/gtest.h>
#include <uffdkit/faulty_store.h>

#include <algorithm>
#include <bit>
#include <fstream>
#include <vector>

#include "support/temp_dir.h"

namespace uffdkit {
namespace {

constexpr std::size_t kPages = 1000;

std::shared_ptr<Store> faulty(const std::string& fault) {
  static const std::vector<std::byte> bytes(kPages * 4096, std::byte{0x5a});
  return make_faulty_store(make_memory_store(bytes, "/images/a"), {parse_store_fault(fault).value()});
}

bool can_be_read(Store& store, std::size_t page) {
  std::vector<std::byte> buffer(4096);
  const auto read = store.read(StoreOffset(page * 4096), buffer, Wait::yes);
  return read && *read == ReadStatus::done;
}

std::vector<std::size_t> failing(Store& store) {
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < kPages; ++page)
    if (!can_be_read(store, page)) pages.push_back(page);
  return pages;
}

// Of one page, how many bits are not what they should be.
int wrong_bits(Store& store, std::size_t page) {
  std::vector<std::byte> buffer(4096);
  EXPECT_TRUE(store.read(StoreOffset(page * 4096), buffer, Wait::yes));
  int wrong = 0;
  for (const std::byte byte : buffer) wrong += std::popcount(static_cast<unsigned>(byte ^ std::byte{0x5a}));
  return wrong;
}

TEST(FaultyStore, ErrorsHitExactlyThePagesOfTheirRange) {
  const auto store = faulty("error,from=8K,to=16K");
  EXPECT_EQ(failing(*store), (std::vector<std::size_t>{2, 3}));
}

TEST(FaultyStore, AReadOfManyPagesFailsForOneOfThem) {
  const auto store = faulty("error,from=8K,to=12K");
  std::vector<std::byte> buffer(8 * 4096);
  const auto read = store->read(StoreOffset(0), buffer, Wait::yes);
  ASSERT_FALSE(read);
  EXPECT_EQ(read.error().os_error(), EIO);
  EXPECT_NE(read.error().message().find("/images/a at offset 8192"), std::string::npos);
}

TEST(FaultyStore, ARateHitsAboutThatShareOfTheReadsAndTheSameOnesUnderTheSameSeed) {
  const std::vector<std::size_t> first = failing(*faulty("error,rate=0.25,seed=7"));
  EXPECT_GT(first.size(), kPages / 5);
  EXPECT_LT(first.size(), kPages * 3 / 10);
  EXPECT_EQ(failing(*faulty("error,rate=0.25,seed=7")), first);
  EXPECT_NE(failing(*faulty("error,rate=0.25,seed=8")), first);
}

TEST(FaultyStore, APageThatIsHitTwiceCanBeReadTheThirdTime) {
  const auto store = faulty("short,times=2");
  EXPECT_FALSE(can_be_read(*store, 5));
  EXPECT_FALSE(can_be_read(*store, 5));
  EXPECT_TRUE(can_be_read(*store, 5));
  EXPECT_FALSE(can_be_read(*store, 6));
}

TEST(FaultyStore, CorruptionInvertsOneBitAndReportsNothing) {
  const auto store = faulty("corrupt,from=4K,to=8K");
  EXPECT_EQ(wrong_bits(*store, 0), 0);
  EXPECT_EQ(wrong_bits(*store, 1), 1);
}

TEST(FaultyStore, WhatIsConcernedNeverBlocksThoseWhoMayNotWait) {
  const auto store = faulty("stall,from=4K,to=8K");
  std::vector<std::byte> buffer(4096);
  EXPECT_EQ(store->read(StoreOffset(4096), buffer, Wait::no).value(), ReadStatus::would_block);
  EXPECT_EQ(store->read(StoreOffset(0), buffer, Wait::no).value(), ReadStatus::done);
}

TEST(FaultyStore, AFaultLastsAsLongAsItsFileExists) {
  const test::TempDir directory;
  const std::string path = directory / "failing";
  const auto store = faulty("error,while=" + path);
  EXPECT_TRUE(can_be_read(*store, 0));
  std::ofstream(path) << 'x';
  EXPECT_FALSE(can_be_read(*store, 0));
  std::remove(path.c_str());
  EXPECT_TRUE(can_be_read(*store, 0));
}

TEST(FaultyStore, LeavesTheStoresOfOtherImagesAsTheyAre) {
  const auto store = make_zero_store(ByteCount(4096));
  EXPECT_EQ(make_faulty_store(store, {parse_store_fault("error,image=other").value()}), store);
}

TEST(FaultyStore, ATextThatIsNoFaultIsRefusedWithWhatIsWrong) {
  const auto wrong = [](const char* text) { return parse_store_fault(text).error().message(); };
  EXPECT_NE(wrong("broken").find("begin with"), std::string::npos);
  EXPECT_NE(wrong("error,rate=2").find("rate"), std::string::npos);
  EXPECT_NE(wrong("error,rat=1").find("'rat'"), std::string::npos);
  EXPECT_NE(wrong("error,from").find("KEY=VALUE"), std::string::npos);
  EXPECT_NE(wrong("error,from=99999999999G").find("99999999999G"), std::string::npos);
  EXPECT_NE(wrong("error,from=8K,to=4K").find("from"), std::string::npos);
  EXPECT_NE(wrong("delay,ms=").find("ms"), std::string::npos);
}

}  // namespace
}  // namespace uffdkit
