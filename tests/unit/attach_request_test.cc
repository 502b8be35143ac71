#include "wire/attach_request.h"

#include <gtest/gtest.h>

#include <limits>

namespace uffdkit {
namespace {

constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;
constexpr std::uint64_t kLargest = std::numeric_limits<std::uint64_t>::max();

RequestedRegion region(std::uint64_t start, std::uint64_t length, std::uint64_t offset,
                       PageSize page_size = kPage4K) {
  return {
      .memory = {Address(start), ByteCount(length)}, .offset = StoreOffset(offset), .page_size = page_size};
}

TEST(AttachRequest, RegionsThatFitAreAccepted) {
  const std::vector<RequestedRegion> regions = {
      region(0x7f0000200000, 0x200000, 0x200000, kPage2M),  // in any order
      region(0x7f0000000000, 0x200000, 0),                  // adjacent to the one before
      region(kAddressEnd.value - 4096, 4096, kGiB - 4096),  // up to both ends
      region(0x1000, 0x1000, 0),                            // the same part of the image twice
  };
  const auto valid = validate(regions, ByteCount(kGiB));
  EXPECT_TRUE(valid) << valid.error().text();
}

TEST(AttachRequest, HugePagesMayBeginAtAnyFourKibibytesOfTheImage) {
  const std::vector<RequestedRegion> regions = {region(0x200000, 0x200000, 0x1000, kPage2M)};
  EXPECT_TRUE(validate(regions, ByteCount(kGiB)));
}

struct BadRegions {
  const char* name;
  std::vector<RequestedRegion> regions;
  std::vector<std::string> said;  // what the error must mention
};

class BadRegionsTest : public testing::TestWithParam<BadRegions> {};

TEST_P(BadRegionsTest, IsRefusedWithTheNumbers) {
  const auto valid = validate(GetParam().regions, ByteCount(kGiB));
  ASSERT_FALSE(valid);
  for (const std::string& part : GetParam().said)
    EXPECT_NE(valid.error().message().find(part), std::string::npos) << valid.error().message();
}

INSTANTIATE_TEST_SUITE_P(
    AttachRequest, BadRegionsTest,
    testing::Values(
        BadRegions{"None", {}, {"no region"}},
        BadRegions{"TooMany", std::vector(kRegionsMax + 1, region(0, 4096, 0)), {"1001", "1000"}},
        BadRegions{"SizeZero", {region(0x1000, 0, 0)}, {"region 0", "size is 0"}},
        BadRegions{"SizeUnaligned", {region(0x1000, 0x1001, 0)}, {"region 0", "size 0x1001"}},
        BadRegions{"SizeUnalignedToHugePages",
                   {region(0x200000, 0x201000, 0, kPage2M)},
                   {"size 0x201000", "page size 0x200000"}},
        BadRegions{"AddressUnaligned", {region(0x1001, 0x1000, 0)}, {"address 0x1001"}},
        BadRegions{"AddressUnalignedToHugePages",
                   {region(0x1000, 0x200000, 0, kPage2M)},
                   {"address 0x1000", "page size 0x200000"}},
        BadRegions{
            "AddressBeyondUserMemory", {region(kAddressEnd.value, 0x1000, 0)}, {"address 0x800000000000"}},
        BadRegions{"EndBeyondUserMemory",
                   {region(kAddressEnd.value - 0x1000, 0x2000, 0)},
                   {"address 0x7ffffffff000", "size 0x2000"}},
        BadRegions{"AddressOverflow", {region(kLargest - 0xfff, 0x1000, 0)}, {"address 0xfffffffffffff000"}},
        BadRegions{"SizeOverflow", {region(0x1000, kLargest - 0xfff, 0)}, {"size 0xfffffffffffff000"}},
        BadRegions{"OffsetUnaligned", {region(0x1000, 0x1000, 0x800)}, {"offset 0x800"}},
        BadRegions{"BeyondTheImage",
                   {region(0x1000, 0x1000, 0), region(0x2000, 0x2000, kGiB - 0x1000)},
                   {"region 1", "offset 0x3ffff000", "size 0x2000", "0x40000000"}},
        BadRegions{
            "OffsetOverflow", {region(0x1000, 0x1000, kLargest - 0xfff)}, {"offset 0xfffffffffffff000"}},
        BadRegions{"PageSizeNotServed",
                   {region(0, kGiB, 0, PageSize::from_bytes(kGiB))},
                   {"page size 1073741824", "4096", "2097152"}},
        BadRegions{"Overlap",
                   {region(0x5000, 0x2000, 0), region(0x1000, 0x1000, 0), region(0x4000, 0x2000, 0)},
                   {"region 0", "region 2", "[0x5000, 0x7000)", "[0x4000, 0x6000)"}},
        BadRegions{"Twice", {region(0x1000, 0x1000, 0), region(0x1000, 0x1000, 0)}, {"overlaps"}}),
    [](const auto& test) { return test.param.name; });

TEST(AttachRequest, ARangeNeedNotLieInAnyImageButInUserMemory) {
  const std::vector<AddressRange> good = {{Address(0x1000), ByteCount(0x1000)}};
  EXPECT_TRUE(validate(good));
  const std::vector<AddressRange> unaligned = {{Address(0x1000), ByteCount(0x800)}};
  EXPECT_FALSE(validate(unaligned));
  const std::vector<AddressRange> beyond = {{kAddressEnd, ByteCount(0x1000)}};
  EXPECT_FALSE(validate(beyond));
  EXPECT_FALSE(validate(std::vector<AddressRange>()));
}

}  // namespace
}  // namespace uffdkit
