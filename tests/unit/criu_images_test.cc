#include "wire/criu_images.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <random>

#include "support/criu_checkpoint.h"
#include "support/mapping.h"
#include "support/temp_dir.h"

namespace uffdkit::criu {
namespace {

using test::CriuEntry;
using test::CriuVma;
using test::ProtoWriter;

constexpr std::uint64_t kPage = 4096;

UniqueFd file_of(const std::string& bytes) {
  UniqueFd file(memfd_create("image", MFD_CLOEXEC));
  EXPECT_EQ(write(file.get(), bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  return file;
}

Result<ImageFile> image_of(const std::string& bytes, ImageKind kind) {
  return ImageFile::open(file_of(bytes), "it.img", kind);
}

Result<Pagemap> pagemap_of(const std::string& bytes) {
  Result<ImageFile> file = image_of(bytes, ImageKind::pagemap);
  if (!file) return Failure(file.error());
  return read_pagemap(*file);
}

Result<std::vector<Vma>> vmas_of(const std::string& bytes) {
  Result<ImageFile> file = image_of(bytes, ImageKind::mm);
  if (!file) return Failure(file.error());
  return read_vmas(*file);
}

Result<std::vector<std::int32_t>> pstree_of(const std::string& bytes) {
  Result<ImageFile> file = image_of(bytes, ImageKind::pstree);
  if (!file) return Failure(file.error());
  return read_pstree(*file);
}

Result<void> inventory_of(const std::string& bytes) {
  Result<ImageFile> file = image_of(bytes, ImageKind::inventory);
  if (!file) return Failure(file.error());
  return check_inventory(*file);
}

CriuEntry entry(std::uint64_t page, std::uint64_t pages, std::uint32_t flags) {
  return {.address = Address(page * kPage), .pages = PageCount(pages), .flags = flags};
}

// A page map of one record besides its head.
std::string pagemap_with(const ProtoWriter& record) {
  return test::criu_image({test::kCriuCommonMagic, test::kCriuPagemap},
                          {ProtoWriter().number(1, 3).text(), record.text()});
}

template <class T>
void expect_error(const Result<T>& result, const std::string& part) {
  ASSERT_FALSE(result) << part;
  EXPECT_NE(result.error().message().find(part), std::string::npos) << result.error().message();
}

TEST(CriuImages, APagemapSaysWhereEachRunOfPagesIs) {
  const auto pagemap =
      pagemap_of(test::criu_pagemap(77, {entry(16, 256, 6), entry(272, 44, 6), entry(400, 2, 4),
                                         entry(402, 3, 3), entry(500, 1, 2), entry(600, 1, 6)}));
  ASSERT_TRUE(pagemap) << pagemap.error().text();
  EXPECT_EQ(pagemap->pages_id, 77u);
  ASSERT_EQ(pagemap->runs.size(), 5u);  // the first two are one
  EXPECT_EQ(pagemap->runs[0].memory, (AddressRange{Address(16 * kPage), ByteCount(300 * kPage)}));
  EXPECT_TRUE(pagemap->runs[0].lazy && pagemap->runs[0].present && !pagemap->runs[0].in_parent);
  EXPECT_EQ(pagemap->runs[1].offset, StoreOffset(300 * kPage));
  EXPECT_FALSE(pagemap->runs[1].lazy);
  EXPECT_TRUE(pagemap->runs[2].in_parent && pagemap->runs[2].lazy && !pagemap->runs[2].present);
  EXPECT_TRUE(pagemap->runs[3].lazy && !pagemap->runs[3].present);
  // Pages that are elsewhere take no room in the file.
  EXPECT_EQ(pagemap->runs[4].offset, StoreOffset(302 * kPage));
}

TEST(CriuImages, APagemapOfAnOldVersionHasNoFlags) {
  const auto pagemap =
      pagemap_of(test::criu_old_pagemap(1, {entry(16, 2, 4), entry(18, 3, 1), entry(30, 1, 4)}));
  ASSERT_TRUE(pagemap) << pagemap.error().text();
  ASSERT_EQ(pagemap->runs.size(), 3u);
  EXPECT_TRUE(pagemap->runs[0].present && !pagemap->runs[0].in_parent && !pagemap->runs[0].lazy);
  EXPECT_TRUE(!pagemap->runs[1].present && pagemap->runs[1].in_parent);
  EXPECT_EQ(pagemap->runs[2].offset, StoreOffset(2 * kPage));
}

TEST(CriuImages, HugePagemapsTakeMemoryForTheirRunsOnly) {
  std::vector<CriuEntry> entries;
  for (std::uint64_t i = 0; i < 100'000; ++i) entries.push_back(entry(i * 256, 256, 6));
  const auto pagemap = pagemap_of(test::criu_pagemap(1, entries));
  ASSERT_TRUE(pagemap);
  ASSERT_EQ(pagemap->runs.size(), 1u);
  EXPECT_EQ(pagemap->runs[0].memory.length, ByteCount(100'000ull * 256 * kPage));
}

TEST(CriuImages, PagemapsThatCannotBeAreRefused) {
  expect_error(pagemap_of(pagemap_with(ProtoWriter().number(1, 4097).number(5, 1).number(4, 6))),
               "whole pages");
  expect_error(pagemap_of(pagemap_with(ProtoWriter().number(1, 4096).number(5, ~0ull).number(4, 6))),
               "more than there are");
  expect_error(pagemap_of(pagemap_with(ProtoWriter().number(1, ~4095ull).number(5, 1).number(4, 6))),
               "beyond all");
  expect_error(pagemap_of(pagemap_with(ProtoWriter().bytes(1, "12345678"))), "field 1 holds bytes");
  expect_error(pagemap_of(test::criu_pagemap(1, {entry(16, 4, 6), entry(19, 1, 6)})), "overlap");
  expect_error(pagemap_of(test::criu_pagemap(1, {entry(16, 4, 6), entry(3, 1, 6)})), "out of order");
  expect_error(pagemap_of(test::criu_image({test::kCriuCommonMagic, test::kCriuPagemap}, {})), "no record");
  expect_error(pagemap_of(test::criu_pstree({1})), "byte 4: the magic number is 0x50273030");
}

TEST(CriuImages, AnErrorNamesTheFileAndThePlace) {
  // 8 bytes of magic numbers, a head of 4 + 2; the second record starts at 18.
  std::string bytes = pagemap_with(ProtoWriter().number(4, 6));
  bytes.back() = '\x80';
  const auto pagemap = pagemap_of(bytes);
  ASSERT_FALSE(pagemap);
  EXPECT_EQ(pagemap.error().message(),
            "it.img at byte 18: field at byte 1: the message ends within a number");
}

TEST(CriuImages, MappingsAreReadInTheirOrder) {
  const auto vmas = vmas_of(test::criu_mm(
      {{.memory = {Address(0x10000), ByteCount(0x3000)}},
       {.memory = {Address(0x20000), ByteCount(0x1000)}, .flags = 0x1},
       {.memory = {Address(0x30000), ByteCount(0x1000)}, .flags = 0x2022},
       {.memory = {Address(0x40000), ByteCount(0x1000)}, .flags = 0x40022},
       {.memory = {Address(0x7fff00000000), ByteCount(0x2000)}, .flags = 0x22, .status = 0x9}}));
  ASSERT_TRUE(vmas) << vmas.error().text();
  ASSERT_EQ(vmas->size(), 5u);
  EXPECT_EQ((*vmas)[0].memory, (AddressRange{Address(0x10000), ByteCount(0x3000)}));
  EXPECT_TRUE((*vmas)[0].can_be_lazy());
  for (std::size_t i = 1; i < 5; ++i) EXPECT_FALSE((*vmas)[i].can_be_lazy()) << i;
}

TEST(CriuImages, TheVsyscallPageIsLeftOut) {
  const auto vmas = vmas_of(test::criu_mm(
      {{.memory = {Address(0x10000), ByteCount(0x1000)}},
       {.memory = {Address(0xffffffffff600000), ByteCount(0x1000)}, .flags = 0x22, .status = 0x5}}));
  ASSERT_TRUE(vmas) << vmas.error().text();
  EXPECT_EQ(vmas->size(), 1u);
}

TEST(CriuImages, MappingsThatCannotBeAreRefused) {
  expect_error(vmas_of(test::criu_mm({{.memory = {Address(0x10000), ByteCount(0)}}})),
               "from 0x10000 to 0x10000");
  expect_error(vmas_of(test::criu_mm({{.memory = {Address(0x10001), ByteCount(4096)}}})), "whole pages");
  expect_error(vmas_of(test::criu_mm({{.memory = {Address(0x20000), ByteCount(0x2000)}},
                                      {.memory = {Address(0x21000), ByteCount(0x2000)}}})),
               "overlaps");
  expect_error(vmas_of(test::criu_image({test::kCriuCommonMagic, test::kCriuMm},
                                        {ProtoWriter().number(14, 1).text()})),
               "field 14 holds a number");
}

TEST(CriuImages, TasksAreTheRecordsOfTheTree) {
  const auto tasks = pstree_of(test::criu_pstree({1, 55, 2'000'000}));
  ASSERT_TRUE(tasks) << tasks.error().text();
  EXPECT_EQ(*tasks, (std::vector<std::int32_t>{1, 55, 2'000'000}));
  expect_error(pstree_of(test::criu_pstree({0})), "without a process number");
}

TEST(CriuImages, InventoriesOfUnknownVersionsAreRefused) {
  EXPECT_TRUE(inventory_of(test::criu_inventory()));
  for (const std::uint64_t version : {0u, 3u})
    expect_error(
        inventory_of(test::criu_image({test::kCriuInventory}, {ProtoWriter().number(1, version).text()})),
        "not known");
}

TEST(CriuImages, ARecordThatClaimsToBeHugeTakesNoMemory) {
  std::string bytes = test::criu_image({test::kCriuCommonMagic, test::kCriuMm}, {});
  expect_error(vmas_of(bytes + "\xff\xff\xff\x7f"), "a record of 2147483647 bytes");
  expect_error(vmas_of(bytes + std::string("\0\0\0\x03", 4)), "the file ends 50331648 bytes early");
}

// Every read gives a value or an error, and runs in no sanitizer's way.
struct Reader {
  std::string good;
  std::function<bool(const std::string&)> reads;
};

std::vector<Reader> readers() {
  return {{test::criu_inventory(), [](const std::string& b) { return inventory_of(b).has_value(); }},
          {test::criu_pstree({1, 2, 3}), [](const std::string& b) { return pstree_of(b).has_value(); }},
          {test::criu_pagemap(9, {entry(1, 2, 6), entry(5, 1, 3), entry(70000, 300, 4)}),
           [](const std::string& b) { return pagemap_of(b).has_value(); }},
          {test::criu_mm({{.memory = {Address(0x10000), ByteCount(0x3000)}},
                          {.memory = {Address(0x7f0000000000), ByteCount(0x3000)}}}),
           [](const std::string& b) { return vmas_of(b).has_value(); }}};
}

TEST(CriuImages, AFileThatIsCutShortWithinARecordIsAnError) {
  for (const Reader& reader : readers()) {
    ASSERT_TRUE(reader.reads(reader.good));
    EXPECT_FALSE(reader.reads(reader.good.substr(0, reader.good.size() - 1)));
    for (std::size_t bytes = 0; bytes < reader.good.size(); ++bytes)
      (void)reader.reads(reader.good.substr(0, bytes));
    for (std::size_t bytes = 0; bytes < 8; ++bytes) EXPECT_FALSE(reader.reads(reader.good.substr(0, bytes)));
  }
}

TEST(CriuImages, DamagedAndRandomFilesGiveAnAnswer) {
  const std::uint32_t seed = 20260823;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  int refused = 0;
  for (const Reader& reader : readers())
    for (int round = 0; round < 3000; ++round) {
      std::string bytes = reader.good;
      for (std::size_t flips = 1 + random() % 4; flips > 0; --flips)
        bytes[random() % bytes.size()] = static_cast<char>(random());
      if (round % 3 == 0)
        for (std::size_t i = 8; i < bytes.size(); ++i) bytes[i] = static_cast<char>(random());
      refused += reader.reads(bytes) ? 0 : 1;
    }
  EXPECT_GT(refused, 1000);
}

TEST(ProtoReader, ReadsEveryKindOfField) {
  const std::string text = ProtoWriter().number(1, 300).bytes(2, "ab").number(536870911, ~0ull).text() +
                           std::string("\x1d\x04\x03\x02\x01", 5) +
                           std::string("\x21\x08\x07\x06\x05\x04\x03\x02\x01", 9);
  ProtoReader reader(std::as_bytes(std::span(text)));
  const auto next = [&] { return reader.next().value().value(); };
  EXPECT_EQ(next().value, 300u);
  const ProtoField bytes = next();
  EXPECT_TRUE(bytes.is_bytes);
  EXPECT_EQ(bytes.bytes.size(), 2u);
  EXPECT_EQ(bytes.at, 3u);
  EXPECT_EQ(next().value, ~0ull);
  EXPECT_EQ(next().value, 0x01020304u);
  EXPECT_EQ(next().value, 0x0102030405060708u);
  EXPECT_EQ(reader.next().value(), std::nullopt);
}

TEST(ProtoReader, RefusesWhatIsNoMessage) {
  for (const std::string& text : {std::string("\x00\x00", 2), std::string("\x0b"), std::string("\x08"),
                                  std::string("\x0a\x05"
                                              "ab"),
                                  std::string("\x08") + std::string(10, '\xff'), std::string("\x0d\x01\x02"),
                                  std::string("\x0e\x01")}) {
    ProtoReader reader(std::as_bytes(std::span(text)));
    EXPECT_FALSE(reader.next()) << testing::PrintToString(text);
  }
}

}  // namespace
}  // namespace uffdkit::criu
