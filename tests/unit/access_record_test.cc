#include "engine/access_record.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace uffdkit {
namespace {

std::vector<std::uint32_t> pages_of(const AccessRecord& record) {
  return {record.pages().begin(), record.pages().end()};
}

TEST(AccessRecord, HasEachPageOnceInTheOrderOfFirstUse) {
  const auto record = AccessRecord::create(PageCount(100)).value();
  for (const std::uint64_t page : {7u, 99u, 7u, 0u, 64u, 99u, 63u}) record->wanted(PageIndex(page));
  EXPECT_EQ(pages_of(*record), (std::vector<std::uint32_t>{7, 99, 0, 64, 63}));
}

TEST(AccessRecord, LeavesOutWhatTheImageDoesNotHave) {
  const auto record = AccessRecord::create(PageCount(100)).value();
  record->wanted(PageIndex(100));
  record->wanted(PageIndex(~std::uint64_t{0}));
  EXPECT_TRUE(record->pages().empty());
}

TEST(AccessRecord, HoldsAllPagesOfAnImage) {
  const auto record = AccessRecord::create(PageCount(1000)).value();
  for (std::uint64_t page = 0; page < 1000; ++page) record->wanted(PageIndex(999 - page));
  EXPECT_EQ(record->pages().size(), 1000u);
  EXPECT_EQ(record->pages().back(), 0u);
}

TEST(AccessRecord, RefusesAnImageWhosePagesItCannotNumber) {
  EXPECT_FALSE(AccessRecord::create(PageCount(AccessRecord::kImagePagesMax + 1)));
}

}  // namespace
}  // namespace uffdkit
