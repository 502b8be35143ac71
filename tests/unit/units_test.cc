#include <gtest/gtest.h>
#include <uffdkit/units.h>

namespace uffdkit {
namespace {

TEST(PageSize, ConvertsBetweenPagesAndBytes) {
  EXPECT_EQ(kPage4K.bytes(PageCount(3)), ByteCount(12288));
  EXPECT_EQ(kPage2M.pages(ByteCount(5u << 20)), PageCount(2));
}

TEST(PageSize, TakesOnlyPowersOfTwoFromFourKibibytesUp) {
  EXPECT_TRUE(PageSize::is_valid(4096));
  EXPECT_TRUE(PageSize::is_valid(1u << 30));
  EXPECT_FALSE(PageSize::is_valid(0));
  EXPECT_FALSE(PageSize::is_valid(2048));
  EXPECT_FALSE(PageSize::is_valid(12288));
}

TEST(AddressRange, OverlapsOnlyWhatSharesAByte) {
  const AddressRange range{Address(0x2000), ByteCount(0x1000)};
  EXPECT_TRUE(range.overlaps({Address(0x2fff), ByteCount(1)}));
  EXPECT_FALSE(range.overlaps({Address(0x3000), ByteCount(1)}));
  EXPECT_FALSE(range.overlaps({Address(0x1000), ByteCount(0x1000)}));
}

}  // namespace
}  // namespace uffdkit
