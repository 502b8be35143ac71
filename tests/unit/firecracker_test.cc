#include "wire/firecracker.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <random>

#include "support/pieces.h"

namespace uffdkit {
namespace {

using test::end_of_stream;
using test::piece_of;
using test::WatchedFds;

// As version 1.12 sends it for a guest with a hole below 4 GiB.
constexpr std::string_view kTwoRegions =
    R"([{"base_host_virt_addr":140317741907968,"size":3221225472,"offset":0,"page_size":4096,"page_size_kib":4096},)"
    R"({"base_host_virt_addr":140313446940672,"size":1073741824,"offset":3221225472,"page_size":4096,"page_size_kib":4096}])";

const std::vector<RequestedRegion> kTwoRegionsDecoded = {
    {.memory = {Address(140317741907968), ByteCount(3221225472)},
     .offset = StoreOffset(0),
     .page_size = kPage4K},
    {.memory = {Address(140313446940672), ByteCount(1073741824)},
     .offset = StoreOffset(3221225472),
     .page_size = kPage4K}};

std::vector<UniqueFd> one_fd() {
  return WatchedFds().make(1);
}

Result<std::optional<FirecrackerHandshake>> decode(std::string_view text, int fds = 1) {
  return FirecrackerDecoder("image").feed(piece_of(text, WatchedFds().make(fds)));
}

TEST(Firecracker, OneMessageGivesTheRegionsAndTheDescriptor) {
  auto handshake = decode(kTwoRegions);
  ASSERT_TRUE(handshake) << handshake.error().text();
  ASSERT_TRUE(*handshake);
  EXPECT_EQ((*handshake)->request.image, "image");
  EXPECT_EQ((*handshake)->request.regions, kTwoRegionsDecoded);
  EXPECT_TRUE((*handshake)->uffd);
  EXPECT_EQ((*handshake)->fds_closed, 0u);
}

TEST(Firecracker, AMessageMayBeCutAnywhere) {
  for (std::size_t cut = 1; cut < kTwoRegions.size(); ++cut) {
    FirecrackerDecoder decoder("image");
    auto first = decoder.feed(piece_of(kTwoRegions.substr(0, cut), one_fd()));
    ASSERT_TRUE(first) << cut;
    ASSERT_FALSE(*first) << cut;
    auto second = decoder.feed(piece_of(kTwoRegions.substr(cut)));
    ASSERT_TRUE(second && *second) << cut;
    ASSERT_EQ((*second)->request.regions, kTwoRegionsDecoded) << cut;
  }
}

TEST(Firecracker, AMessageMayComeByteByByte) {
  FirecrackerDecoder decoder("image");
  for (std::size_t i = 0; i < kTwoRegions.size(); ++i) {
    auto got = decoder.feed(piece_of(kTwoRegions.substr(i, 1), i == 0 ? one_fd() : std::vector<UniqueFd>()));
    ASSERT_TRUE(got);
    ASSERT_EQ(got->has_value(), i + 1 == kTwoRegions.size());
  }
}

TEST(Firecracker, NothingWaitingChangesNothing) {
  FirecrackerDecoder decoder("image");
  EXPECT_TRUE(decoder.feed(piece_of("[", one_fd())));
  EXPECT_TRUE(decoder.feed(Piece{}));
  EXPECT_TRUE(decoder.feed(piece_of(kTwoRegions.substr(1))).value());
}

struct PageSizeKeys {
  const char* keys;
  PageSize page_size;
};

TEST(Firecracker, EitherPageSizeKeyIsInBytesAndNoneMeansFourKibibytes) {
  for (const auto& [keys, page_size] :
       {PageSizeKeys{"", kPage4K}, PageSizeKeys{R"(,"page_size":2097152)", kPage2M},
        PageSizeKeys{R"(,"page_size_kib":2097152)", kPage2M},
        PageSizeKeys{R"(,"page_size":4096,"page_size_kib":4096)", kPage4K}}) {
    const auto text = fmt::format(R"([{{"base_host_virt_addr":0,"size":2097152,"offset":0{}}}])", keys);
    auto handshake = decode(text);
    ASSERT_TRUE(handshake && *handshake) << keys;
    EXPECT_EQ((*handshake)->request.regions.at(0).page_size, page_size) << keys;
  }
}

TEST(Firecracker, UnknownKeysWhiteSpaceAndBracketsInStringsAreSkipped) {
  auto handshake = decode(
      " \n[ {\"note\":\"]}\\\"[\", \"list\":[1,{\"a\":[]}],\"is_guest_memfd\":true,"
      "\"base_host_virt_addr\" : 4096, \"size\":4096,\"offset\":0} ]\r\n\t ");
  ASSERT_TRUE(handshake && *handshake);
  EXPECT_EQ((*handshake)->request.regions.at(0).memory.start, Address(4096));
}

TEST(Firecracker, NumbersUpToTheLargestAreKept) {
  auto handshake = decode(
      R"([{"base_host_virt_addr":18446744073709551615,"size":18446744073709551614,"offset":9007199254740993}])");
  ASSERT_TRUE(handshake && *handshake);
  const RequestedRegion& region = (*handshake)->request.regions.at(0);
  EXPECT_EQ(region.memory.start, Address(18446744073709551615u));
  EXPECT_EQ(region.memory.length, ByteCount(18446744073709551614u));
  EXPECT_EQ(region.offset, StoreOffset(9007199254740993));
}

TEST(Firecracker, ExtraDescriptorsAreClosedAndCounted) {
  WatchedFds extra;
  std::vector<UniqueFd> fds = one_fd();
  const int uffd = fds[0].get();
  for (UniqueFd& fd : extra.make(2)) fds.push_back(std::move(fd));
  FirecrackerDecoder decoder("image");
  ASSERT_TRUE(decoder.feed(piece_of(kTwoRegions.substr(0, 1), std::move(fds))));
  auto handshake = decoder.feed(piece_of(kTwoRegions.substr(1), extra.make(1)));
  ASSERT_TRUE(handshake && *handshake);
  EXPECT_EQ((*handshake)->uffd.get(), uffd);
  EXPECT_EQ((*handshake)->fds_closed, 3u);
  EXPECT_TRUE(extra.all_closed());
}

TEST(Firecracker, TheLargestAllowedHandshakeFits) {
  std::string text = "[";
  for (std::size_t i = 0; i < kRegionsMax; ++i)
    text += fmt::format(
        R"({}{{"base_host_virt_addr":{},"size":{},"offset":{},"page_size":2097152,"page_size_kib":2097152,)"
        R"("gpa_start":{},"is_guest_memfd":false}})",
        i == 0 ? "" : ",", UINT64_MAX, UINT64_MAX, UINT64_MAX, UINT64_MAX);
  text += "]";
  auto handshake = decode(text);
  ASSERT_TRUE(handshake && *handshake) << text.size();
  EXPECT_EQ((*handshake)->request.regions.size(), kRegionsMax);
}

struct BadHandshake {
  const char* name;
  std::string text;
  std::vector<std::string> said;
};

class BadHandshakeTest : public testing::TestWithParam<BadHandshake> {};

TEST_P(BadHandshakeTest, IsRefusedWithTheReason) {
  WatchedFds watched;
  {
    FirecrackerDecoder decoder("image");
    auto handshake = decoder.feed(piece_of(GetParam().text, watched.make(1)));
    if (handshake && !*handshake) handshake = decoder.feed(end_of_stream());
    ASSERT_FALSE(handshake);
    for (const std::string& part : GetParam().said)
      EXPECT_NE(handshake.error().message().find(part), std::string::npos) << handshake.error().message();
  }
  EXPECT_TRUE(watched.all_closed());
}

std::string region_with(std::string_view keys) {
  return fmt::format(R"([{{"base_host_virt_addr":0,"size":4096,"offset":0}},{{{}}}])", keys);
}

INSTANTIATE_TEST_SUITE_P(
    Firecracker, BadHandshakeTest,
    testing::Values(
        BadHandshake{"Object", R"({"size":1})", {"JSON array"}},
        BadHandshake{"Text", "GET / HTTP/1.1\r\n", {"JSON array"}},
        BadHandshake{"NotJson", "[{]}", {"not valid JSON"}},
        BadHandshake{"NotUtf8", "[{\"\xff\":1}]", {"not valid JSON"}},
        BadHandshake{"EntryIsANumber", "[1]", {"region 0", "not an object"}},
        BadHandshake{
            "AddressMissing", region_with(R"("size":1,"offset":0)"), {"region 1", "base_host_virt_addr"}},
        BadHandshake{"SizeMissing",
                     region_with(R"("base_host_virt_addr":1,"offset":0)"),
                     {"region 1", "size is missing"}},
        BadHandshake{"OffsetMissing",
                     region_with(R"("base_host_virt_addr":1,"size":0)"),
                     {"region 1", "offset is missing"}},
        BadHandshake{"Negative",
                     region_with(R"("base_host_virt_addr":-4096,"size":1,"offset":0)"),
                     {"region 1", "base_host_virt_addr", "-4096"}},
        BadHandshake{"Float",
                     region_with(R"("base_host_virt_addr":1,"size":4096.0,"offset":0)"),
                     {"region 1", "size", "4096.0"}},
        BadHandshake{"Exponent",
                     region_with(R"("base_host_virt_addr":1,"size":4e3,"offset":0)"),
                     {"region 1", "size"}},
        BadHandshake{"BeyondSixtyFourBits",
                     region_with(R"("base_host_virt_addr":1,"size":1,"offset":18446744073709551616)"),
                     {"region 1", "offset", "2^64"}},
        BadHandshake{"String",
                     region_with(R"("base_host_virt_addr":"1","size":1,"offset":0)"),
                     {"region 1", "base_host_virt_addr", "\"1\""}},
        BadHandshake{"Null", region_with(R"("base_host_virt_addr":null,"size":1,"offset":0)"), {"null"}},
        BadHandshake{"PageSizeIsAString",
                     region_with(R"("base_host_virt_addr":1,"size":1,"offset":0,"page_size":"4K")"),
                     {"region 1", "page_size", "4K"}},
        BadHandshake{
            "PageSizesDiffer",
            region_with(R"("base_host_virt_addr":1,"size":1,"offset":0,"page_size":4096,"page_size_kib":4)"),
            {"region 1", "page_size is 4096", "page_size_kib is 4"}},
        BadHandshake{"PageSizeNotServed",
                     region_with(R"("base_host_virt_addr":1,"size":1,"offset":0,"page_size":1073741824)"),
                     {"region 1", "1073741824"}},
        BadHandshake{"PageSizeZero",
                     region_with(R"("base_host_virt_addr":1,"size":1,"offset":0,"page_size":0)"),
                     {"region 1", "page size 0"}},
        BadHandshake{"TrailingBytes", std::string(kTwoRegions) + " []", {"after the array"}},
        BadHandshake{"Nested", std::string(100, '['), {"deep"}},
        BadHandshake{"CutShort", std::string(kTwoRegions.substr(0, 50)), {"ended after 50 bytes"}},
        BadHandshake{"Empty", "", {"ended after 0 bytes"}},
        BadHandshake{
            "EndlessWhiteSpace", std::string(kHandshakeBytesMax + 1, ' '), {"longer than 256000 bytes"}},
        BadHandshake{"EndlessString", "[\"" + std::string(kHandshakeBytesMax, 'x'), {"longer than"}}),
    [](const auto& test) { return test.param.name; });

TEST(Firecracker, MoreRegionsThanTheLimitAreRefused) {
  std::string text = "[";
  for (std::size_t i = 0; i <= kRegionsMax; ++i) text += i == 0 ? "{}" : ",{}";
  auto handshake = decode(text + "]");
  ASSERT_FALSE(handshake);
  EXPECT_NE(handshake.error().message().find("1001"), std::string::npos) << handshake.error().message();
}

TEST(Firecracker, WithoutADescriptorItIsRefused) {
  const auto handshake = decode(kTwoRegions, 0);
  ASSERT_FALSE(handshake);
  EXPECT_NE(handshake.error().message().find("no descriptor"), std::string::npos);
}

TEST(Firecracker, LostDescriptorsAreRefused) {
  FirecrackerDecoder decoder("image");
  Piece piece = piece_of(kTwoRegions, one_fd());
  piece.fds_lost = true;
  EXPECT_FALSE(decoder.feed(std::move(piece)));
}

TEST(Firecracker, AfterTheHandshakeOnlyWhiteSpaceAndTheEndMayCome) {
  FirecrackerDecoder decoder("image");
  ASSERT_TRUE(decoder.feed(piece_of(kTwoRegions, one_fd())).value());
  EXPECT_TRUE(decoder.feed(piece_of("\n")));
  EXPECT_TRUE(decoder.feed(end_of_stream()));
  EXPECT_FALSE(decoder.feed(piece_of("x")));
}

TEST(Firecracker, GarbageIsRefusedOrWaitedForButNeverAccepted) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 2000; ++round) {
    // A good handshake with some bytes changed, in random pieces.
    std::string text(kTwoRegions);
    const auto changes = 1 + random() % 8;
    for (unsigned i = 0; i < changes; ++i) text[random() % text.size()] = static_cast<char>(random());
    FirecrackerDecoder decoder("image");
    std::string_view rest = text;
    bool first = true;
    while (!rest.empty()) {
      const std::size_t cut = 1 + random() % rest.size();
      auto got = decoder.feed(
          piece_of(rest.substr(0, cut), std::exchange(first, false) ? one_fd() : std::vector<UniqueFd>()));
      if (!got) {
        EXPECT_FALSE(got.error().message().empty());
        break;
      }
      // A changed digit is a good handshake too, but never one with fewer regions.
      if (*got) {
        EXPECT_EQ((*got)->request.regions.size(), 2u) << text;
      }
      rest.remove_prefix(cut);
    }
  }
}

}  // namespace
}  // namespace uffdkit
