#include "store/piecewise_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>

namespace uffdkit {
namespace {

constexpr std::uint64_t kPage = 4096;

// Pages full of `first`, `first` + 1, ...
std::shared_ptr<Store> counted_pages(std::size_t pages, unsigned char first) {
  std::vector<std::byte> bytes(pages * kPage);
  for (std::size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = static_cast<std::byte>(first + static_cast<unsigned char>(i / kPage));
  return make_memory_store(bytes);
}

// Answers that it would block, and fails when it may.
class FailingStore final : public Store {
 public:
  ByteCount size() const noexcept override { return ByteCount(kPage); }
  std::string name() const override { return "failing"; }
  Extent extent_at(StoreOffset) const noexcept override { return {.zero = false, .end = StoreOffset(kPage)}; }
  Result<ReadStatus> read(StoreOffset, std::span<std::byte>, Wait wait) noexcept override {
    if (wait == Wait::no) return ReadStatus::would_block;
    return Failure(Error("broken"));
  }
};

// Page 0 zero; 1 and 2 are pages 1 and 0 of a; 3 zero; 4 is page 1 of b; 5 zero.
std::shared_ptr<Store> example() {
  const auto a = counted_pages(2, 10);
  const auto b = counted_pages(3, 20);
  return make_piecewise_store(
      "example", ByteCount(6 * kPage),
      {{.at = StoreOffset(kPage), .length = ByteCount(kPage), .source = a, .from = StoreOffset(kPage)},
       {.at = StoreOffset(2 * kPage), .length = ByteCount(kPage), .source = a, .from = StoreOffset(0)},
       {.at = StoreOffset(4 * kPage), .length = ByteCount(kPage), .source = b, .from = StoreOffset(kPage)}});
}

constexpr std::array<unsigned char, 6> kExamplePages = {0, 11, 10, 0, 21, 0};

TEST(PiecewiseStore, ReadsAnyRunOfPagesAcrossItsPieces) {
  const auto store = example();
  for (std::size_t first = 0; first < 6; ++first)
    for (std::size_t count = 1; first + count <= 6; ++count) {
      std::vector<std::byte> bytes(count * kPage, std::byte{0xff});
      const auto read = store->read(StoreOffset(first * kPage), bytes, Wait::yes);
      ASSERT_TRUE(read && *read == ReadStatus::done);
      for (std::size_t i = 0; i < bytes.size(); ++i)
        ASSERT_EQ(std::to_integer<unsigned char>(bytes[i]), kExamplePages[first + i / kPage])
            << first << " " << i;
    }
}

TEST(PiecewiseStore, KnowsWhatLiesBetweenItsPiecesAsZero) {
  const auto store = example();
  const auto extent = [&](std::uint64_t page) { return store->extent_at(StoreOffset(page * kPage)); };
  EXPECT_TRUE(extent(0).zero);
  EXPECT_EQ(extent(0).end, StoreOffset(kPage));
  EXPECT_FALSE(extent(1).zero);
  EXPECT_LE(extent(1).end, StoreOffset(3 * kPage));
  EXPECT_TRUE(extent(3).zero);
  EXPECT_EQ(extent(3).end, StoreOffset(4 * kPage));
  EXPECT_FALSE(extent(4).zero);
  EXPECT_EQ(extent(4).end, StoreOffset(5 * kPage));
  EXPECT_TRUE(extent(5).zero);
  EXPECT_EQ(extent(5).end, StoreOffset(6 * kPage));
}

TEST(PiecewiseStore, KnowsTheHolesOfItsSources) {
  const auto store = make_piecewise_store("holes", ByteCount(4 * kPage),
                                          {{.at = StoreOffset(kPage),
                                            .length = ByteCount(2 * kPage),
                                            .source = make_zero_store(ByteCount(100 * kPage)),
                                            .from = StoreOffset(5 * kPage)}});
  const Extent extent = store->extent_at(StoreOffset(kPage));
  EXPECT_TRUE(extent.zero);
  EXPECT_EQ(extent.end, StoreOffset(3 * kPage));
}

TEST(PiecewiseStore, HandsOnWhatASourceAnswers) {
  const auto store = make_piecewise_store("failing", ByteCount(3 * kPage),
                                          {{.at = StoreOffset(kPage),
                                            .length = ByteCount(kPage),
                                            .source = std::make_shared<FailingStore>(),
                                            .from = StoreOffset(0)}});
  std::vector<std::byte> bytes(3 * kPage);
  const auto unready = store->read(StoreOffset(0), bytes, Wait::no);
  EXPECT_TRUE(unready && *unready == ReadStatus::would_block);
  EXPECT_FALSE(store->read(StoreOffset(0), bytes, Wait::yes));
  EXPECT_TRUE(store->read(StoreOffset(2 * kPage), std::span(bytes).first(kPage), Wait::no));
}

}  // namespace
}  // namespace uffdkit
