#include "image/format.h"

#include <gtest/gtest.h>
#include <xxhash.h>
#include <zstd.h>

#include <cstring>
#include <functional>

#include "image/identity.h"

namespace uffdkit::image {
namespace {

using Bytes = std::vector<std::byte>;

constexpr std::uint64_t kPages = 100;

// Frames for a whole memory of 100 pages, of which pages 16 to 79 are zero.
struct Sample {
  Record record{.raw_bytes = kPages * kPageBytes,
                .frame_bytes = 64 * 1024,
                .identity = {std::byte{1}, std::byte{2}},
                .parent_name = {},
                .runs = {{16, PageKind::stored}, {64, PageKind::zero}, {20, PageKind::stored}},
                .regions = {}};
  std::vector<FrameEntry> frames = {{.compressed_bytes = 1000, .bytes = 65536, .checksum = 1},
                                    {.compressed_bytes = 20, .bytes = 64 * 4096, .checksum = 2},
                                    {.compressed_bytes = 900, .bytes = 65536, .checksum = 3},
                                    {.compressed_bytes = 800, .bytes = 16384, .checksum = 4}};
  std::uint64_t data_bytes = 2720;
};

// A diff of it: 3 stored pages, in two frames.
Sample diff() {
  Sample sample;
  sample.record.is_diff = true;
  sample.record.parent = {std::byte{9}};
  sample.record.parent_name = "base.img";
  sample.record.runs = {{50, PageKind::parent}, {3, PageKind::stored}, {47, PageKind::zero}};
  sample.frames = {{.compressed_bytes = 100, .bytes = 4096, .checksum = 1},
                   {.compressed_bytes = 200, .bytes = 8192, .checksum = 2}};
  sample.data_bytes = 300;
  return sample;
}

Bytes record_of(const Sample& sample) {
  Result<Bytes> record = encode_record(sample.record, encode_seek_table(sample.frames), sample.data_bytes);
  EXPECT_TRUE(record);
  return *record;
}

Result<Contents> decode(const Sample& sample) {
  const Bytes table = encode_seek_table(sample.frames);
  const Bytes record = record_of(sample);
  return decode_contents(record, table, sample.data_bytes + record.size() + table.size());
}

// What decoding says of a sample that was changed, or "sound".
std::string complaint(Sample sample, const std::function<void(Sample&)>& change) {
  change(sample);
  const Result<Contents> contents = decode(sample);
  return contents ? "sound" : contents.error().message();
}

TEST(ImageFormat, ARecordAndItsFramesComeBackAsTheyWere) {
  for (Sample sample : {Sample(), diff()}) {
    sample.record.regions = {{.address = 0x7f00'0000'0000, .pages = 60, .protection = 3, .name = "[heap]"},
                             {.address = 0x8000'0000'0000, .pages = 40, .protection = 5, .name = ""}};
    const Result<Contents> contents = decode(sample);
    ASSERT_TRUE(contents) << contents.error().text();
    EXPECT_EQ(contents->record.raw_bytes, sample.record.raw_bytes);
    EXPECT_EQ(contents->record.frame_bytes, sample.record.frame_bytes);
    EXPECT_EQ(contents->record.identity, sample.record.identity);
    EXPECT_EQ(contents->record.is_diff, sample.record.is_diff);
    EXPECT_EQ(contents->record.parent, sample.record.parent);
    EXPECT_EQ(contents->record.parent_name, sample.record.parent_name);
    EXPECT_EQ(contents->record.runs, sample.record.runs);
    EXPECT_EQ(contents->record.regions, sample.record.regions);
    ASSERT_EQ(contents->frames.size(), sample.frames.size());
    EXPECT_EQ(
        std::memcmp(contents->frames.data(), sample.frames.data(), sample.frames.size() * sizeof(FrameEntry)),
        0);
  }
}

TEST(ImageFormat, AFileIsNeverAsLongAsWholePages) {
  for (std::uint64_t before = 0; before < 2 * kPageBytes; ++before) {
    Sample sample;
    sample.data_bytes = before;
    const std::uint64_t bytes = before + record_of(sample).size() + encode_seek_table(sample.frames).size();
    ASSERT_NE(bytes % kPageBytes, 0u) << before;
  }
}

TEST(ImageFormat, EveryChangedByteOfTheTablesIsNoticed) {
  const Sample sample = diff();
  const Bytes table = encode_seek_table(sample.frames);
  const Bytes record = record_of(sample);
  Bytes both = record;
  both.insert(both.end(), table.begin(), table.end());
  for (std::size_t at = 0; at < both.size(); ++at) {
    Bytes changed = both;
    changed[at] ^= std::byte{0x10};
    const auto first = std::span<const std::byte>(changed).first(record.size());
    const auto second = std::span<const std::byte>(changed).subspan(record.size());
    EXPECT_FALSE(decode_contents(first, second, sample.data_bytes + both.size())) << at;
  }
}

TEST(ImageFormat, TablesThatContradictEachOtherAreRefusedWithTheReason) {
  const auto contains = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos ? testing::AssertionSuccess()
                                                : testing::AssertionFailure() << text;
  };
  const Sample whole;
  EXPECT_EQ(complaint(whole, [](Sample&) {}), "sound");
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.data_bytes += 1; }), "the frames end at byte"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.frames.pop_back(); }), "where 409600 belong"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.frames[0].bytes = 0; }), "frame 0 has 0 bytes"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.frames[0].compressed_bytes = 0; }),
                       "frame 0 takes no bytes"));
  EXPECT_TRUE(
      contains(complaint(whole, [](Sample& s) { std::swap(s.frames[0], s.frames[1]); }), "is not all zero"));
  EXPECT_TRUE(
      contains(complaint(whole, [](Sample& s) { s.frames[0].compressed_bytes = 1u << 20; }), "frame 0"));
  EXPECT_TRUE(
      contains(complaint(whole, [](Sample& s) { s.record.frame_bytes = 65537; }), "frames of 65537 bytes"));
  EXPECT_TRUE(
      contains(complaint(whole, [](Sample& s) { s.record.frame_bytes = 8192; }), "frames of 8192 bytes"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.record.raw_bytes = 0; }), "a memory of 0 bytes"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.record.runs[1].kind = PageKind::parent; }),
                       "unknown kind"));
  EXPECT_TRUE(
      contains(complaint(whole, [](Sample& s) { s.record.runs[1].kind = PageKind::stored; }), "continues"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.record.runs[0].pages = 0; }), "run 0"));
  EXPECT_TRUE(
      contains(complaint(whole, [](Sample& s) { s.record.runs[2].pages = UINT64_MAX / 8; }), "run 2"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.record.runs.pop_back(); }),
                       "80 pages, and the memory 100"));
  EXPECT_TRUE(contains(complaint(whole, [](Sample& s) { s.record.parent_name = "x"; }), "names a parent"));
  EXPECT_TRUE(contains(
      complaint(
          whole,
          [](Sample& s) { s.record.regions = {{.address = 0, .pages = 99, .protection = 1, .name = ""}}; }),
      "regions have 99 pages"));
  EXPECT_TRUE(contains(
      complaint(
          whole,
          [](Sample& s) { s.record.regions = {{.address = 0, .pages = 100, .protection = 8, .name = ""}}; }),
      "none that a process can have"));
  for (const char* name : {"", ".", "..", "a/b", "/etc/passwd"})
    EXPECT_TRUE(contains(complaint(diff(), [&](Sample& s) { s.record.parent_name = name; }), "own folder"))
        << name;
  EXPECT_TRUE(
      contains(complaint(diff(), [](Sample& s) { s.frames[1].bytes = 128 * 1024; }), "where 8192 are left"));
}

TEST(ImageFormat, TablesOfAnotherFileAreRefused) {
  Sample other;
  other.frames[0].checksum = 77;
  const Bytes record = record_of(Sample());
  const Bytes table = encode_seek_table(other.frames);
  const auto contents = decode_contents(record, table, 2720 + record.size() + table.size());
  ASSERT_FALSE(contents);
  EXPECT_NE(contents.error().message().find("not the one that the record was made for"), std::string::npos);
}

TEST(ImageFormat, AFooterThatClaimsMoreThanTheFileHasIsRefused) {
  Bytes table = encode_seek_table(Sample().frames);
  std::array<std::byte, kSeekFooterBytes> footer;
  const auto read_footer = [&] {
    std::memcpy(footer.data(), table.data() + table.size() - footer.size(), footer.size());
  };
  read_footer();
  EXPECT_EQ(*decode_footer(footer, 1 << 20), table.size());
  EXPECT_FALSE(decode_footer(footer, table.size() - 1));
  footer[4] = std::byte{0};
  EXPECT_FALSE(decode_footer(footer, 1 << 20));
  read_footer();
  footer[8] ^= std::byte{1};
  EXPECT_FALSE(decode_footer(footer, 1 << 20));
}

TEST(ImageFormat, ARecordThatIsShorterThanOneOrLongerThanTheFileIsRefused) {
  const Bytes record = record_of(Sample());
  std::array<std::byte, 8> tail;
  std::memcpy(tail.data(), record.data() + record.size() - tail.size(), tail.size());
  EXPECT_EQ(*decode_record_length(tail, 1 << 20), record.size());
  EXPECT_FALSE(decode_record_length(tail, record.size() - 1));
  std::memset(tail.data(), 0, 4);
  EXPECT_FALSE(decode_record_length(tail, 1 << 20));
  EXPECT_FALSE(decode_record_length(std::array<std::byte, 8>{}, 1 << 20));
}

TEST(ImageFormat, MemoryIsNotTakenForAnImageByWhatAGuestHasWritten) {
  Bytes first(4);
  std::memcpy(first.data(), &kZstdMagic, 4);
  EXPECT_EQ(kind_of(first, 100 * kPageBytes + 1), Kind::compressed);
  EXPECT_EQ(kind_of(first, 100 * kPageBytes), Kind::ambiguous);
  std::memcpy(first.data(), &kRecordFrameMagic, 4);
  EXPECT_EQ(kind_of(first, 777), Kind::compressed);
  first[0] ^= std::byte{1};
  EXPECT_EQ(kind_of(first, 100 * kPageBytes), Kind::raw);
  EXPECT_EQ(kind_of(first, 100 * kPageBytes + 1), Kind::raw);
  EXPECT_EQ(kind_of({}, 0), Kind::raw);
}

TEST(ImageFormat, AFrameOfZerosIsOneThatZstdReads) {
  for (const std::uint32_t bytes : {1u, 4096u, 131072u, 131073u, 5u << 20}) {
    const Bytes frame = encode_zero_frame(bytes);
    EXPECT_EQ(frame.size(), 10 + 4 * ((bytes + 131071) / 131072));
    Bytes memory(bytes, std::byte{1});
    EXPECT_EQ(ZSTD_decompress(memory.data(), memory.size(), frame.data(), frame.size()), bytes);
    EXPECT_EQ(memory, Bytes(bytes));
    EXPECT_EQ(checksum_of_zeros(bytes), checksum_of(memory));
  }
}

TEST(ImageIdentity, ZeroBlocksNeedNotBeHashed) {
  const Bytes block(kIdentityBlockBytes);
  EXPECT_EQ(hash_zero_block(block.size()), hash_block(block));
  EXPECT_EQ(hash_zero_block(100), hash_block(std::span(block).first(100)));
}

TEST(ImageIdentity, OrderLengthAndContentsCount) {
  const Bytes zeros(kIdentityBlockBytes);
  Bytes other = zeros;
  other[5] = std::byte{1};
  const auto identity = [](std::initializer_list<BlockHash> hashes, std::uint64_t bytes) {
    IdentityHash hash;
    for (const BlockHash& block : hashes) hash.add(block);
    return hash.finish(bytes);
  };
  const BlockHash a = hash_block(zeros);
  const BlockHash b = hash_block(other);
  EXPECT_EQ(identity({a, b}, 131072), identity({a, b}, 131072));
  EXPECT_NE(identity({a, b}, 131072), identity({b, a}, 131072));
  EXPECT_NE(identity({a, b}, 131072), identity({a, b}, 131071));
  EXPECT_NE(identity({a, b}, 131072), identity({a, a}, 131072));
}

}  // namespace
}  // namespace uffdkit::image
