#include "store/recovering_store.h"

#include <gtest/gtest.h>

#include <array>
#include <vector>

namespace uffdkit {
namespace {

constexpr std::size_t kPage = 4096;

// A store of four pages, of which there are as many as the test says.
class RecoveringStoreTest : public testing::Test {
 protected:
  static std::shared_ptr<Store> pages(std::size_t count) {
    return make_memory_store(std::vector<std::byte>(count * kPage, std::byte{7}));
  }
  std::shared_ptr<Store> store(std::shared_ptr<Store> rest) {
    return make_recovering_store("image", ByteCount(4 * kPage), std::move(rest),
                                 [this]() -> Result<std::shared_ptr<Store>> {
                                   ++opened_;
                                   if (!there_) return Failure(Error("it is gone", ENOENT));
                                   return there_;
                                 });
  }
  Result<ReadStatus> read(Store& store, std::size_t page, Wait wait = Wait::yes) {
    return store.read(StoreOffset(page * kPage), buffer_, wait);
  }

  std::shared_ptr<Store> there_;
  int opened_ = 0;
  std::array<std::byte, kPage> buffer_{};
};

TEST_F(RecoveringStoreTest, GivesWhatIsLeftAndFailsForTheRest) {
  const auto recovering = store(pages(2));
  EXPECT_EQ(recovering->size(), ByteCount(4 * kPage));
  EXPECT_EQ(read(*recovering, 1).value(), ReadStatus::done);
  EXPECT_EQ(buffer_[0], std::byte{7});
  const auto lost = read(*recovering, 2);
  ASSERT_FALSE(lost);
  EXPECT_EQ(lost.error().message(), "read image at offset 8192: it is gone");
}

TEST_F(RecoveringStoreTest, WhatIsNotThereIsNotZero) {
  const auto recovering = store(make_zero_store(ByteCount(2 * kPage)));
  EXPECT_TRUE(recovering->extent_at(StoreOffset(kPage)).zero);
  EXPECT_FALSE(recovering->extent_at(StoreOffset(2 * kPage)).zero);
  EXPECT_FALSE(store(nullptr)->extent_at(StoreOffset(0)).zero);
}

TEST_F(RecoveringStoreTest, OnlyAReadThatMayBlockOpensItAgain) {
  const auto recovering = store(nullptr);
  EXPECT_EQ(read(*recovering, 0, Wait::no).value(), ReadStatus::would_block);
  EXPECT_EQ(opened_, 0);
  there_ = pages(4);
  EXPECT_EQ(read(*recovering, 3).value(), ReadStatus::done);
  EXPECT_EQ(read(*recovering, 3, Wait::no).value(), ReadStatus::done);
  EXPECT_EQ(opened_, 1);
}

TEST_F(RecoveringStoreTest, OneThatIsTooShortStillFailsBehindItsEnd) {
  const auto recovering = store(nullptr);
  there_ = pages(1);
  EXPECT_FALSE(read(*recovering, 1));
  EXPECT_EQ(read(*recovering, 0).value(), ReadStatus::done);
}

TEST_F(RecoveringStoreTest, ManyReadsAtOnceOpenItOnce) {
  const auto recovering = store(nullptr);
  for (std::size_t page = 0; page < 4; ++page) EXPECT_FALSE(read(*recovering, page));
  EXPECT_LE(opened_, 2);  // a machine that is slow may come to the next time
}

}  // namespace
}  // namespace uffdkit
