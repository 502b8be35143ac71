#include "image/working_set.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstring>
#include <functional>

namespace uffdkit::image {
namespace {

using Bytes = std::vector<std::byte>;

WorkingSet sample() {
  return {.identity = {std::byte{1}, std::byte{2}},
          .memory_pages = 1000,
          .recordings = 2,
          .pages = {500, 501, 502, 7, 999, 0, 8, 9},
          .runs = {{.brought = 8, .late = 1, .missed = 2, .left_out = 4, .left_out_used = 3}}};
}

// What decoding says of a file that was changed, and whose hash was made right again, or "sound".
std::string complaint(const std::function<void(Bytes&)>& change) {
  Bytes file = encode(sample()).value();
  change(file);
  if (file.size() >= 512) {
    Bytes hashed(file.begin(), file.begin() + 72);
    hashed.insert(hashed.end(), file.begin() + 512, file.end());
    const std::uint64_t hash = XXH64(hashed.data(), hashed.size(), 0);
    std::memcpy(file.data() + 72, &hash, sizeof hash);
  }
  const Result<WorkingSet> decoded = decode_working_set(file);
  return decoded ? "sound" : decoded.error().message();
}

void set_number(Bytes& file, std::size_t at, std::uint64_t value) {
  std::memcpy(file.data() + at, &value, sizeof value);
}

void set_list(Bytes& file, const std::vector<int>& list) {
  file.resize(512);
  for (const int byte : list) file.push_back(static_cast<std::byte>(byte));
  set_number(file, 8, file.size());
}

TEST(WorkingSet, IsDecodedAsItWasEncoded) {
  const WorkingSet set = sample();
  const Result<WorkingSet> decoded = decode_working_set(encode(set).value());
  ASSERT_TRUE(decoded) << decoded.error().message();
  EXPECT_EQ(decoded->identity, set.identity);
  EXPECT_EQ(decoded->memory_pages, set.memory_pages);
  EXPECT_EQ(decoded->recordings, set.recordings);
  EXPECT_EQ(decoded->pages, set.pages);
  EXPECT_EQ(decoded->runs, set.runs);
}

TEST(WorkingSet, PagesInARowTakeFewBytes) {
  WorkingSet set{.identity = {}, .memory_pages = 1u << 20, .recordings = 1, .pages = {}, .runs = {}};
  for (std::uint32_t page = 0; page < 1u << 20; ++page) set.pages.push_back(page);
  EXPECT_LT(encode(set).value().size(), 520u);
  EXPECT_EQ(decode_working_set(encode(set).value()).value().pages, set.pages);
}

TEST(WorkingSet, AnyByteThatWasChangedIsNoticed) {
  const Bytes file = encode(sample()).value();
  for (std::size_t at = 0; at < file.size(); ++at) {
    Bytes changed = file;
    changed[at] ^= std::byte{1};
    const Result<WorkingSet> decoded = decode_working_set(changed);
    const bool in_runs = at >= kRunsAt && at < kRunsAt + 176;
    const bool unused = (at >= 80 && at < kRunsAt) || (at >= kRunsAt + 176 && at < 512);
    EXPECT_EQ(decoded.has_value(), in_runs || unused) << at;
    // Damaged runs are forgotten, and nothing else.
    if (!in_runs) continue;
    EXPECT_TRUE(decoded->runs.empty() && decoded->pages == sample().pages) << at;
  }
}

TEST(WorkingSet, AFileThatWasCutShortOrMadeLongerIsRefused) {
  Bytes file = encode(sample()).value();
  for (std::size_t bytes = 0; bytes < file.size(); ++bytes)
    EXPECT_FALSE(decode_working_set(std::span(file).first(bytes))) << bytes;
  file.push_back(std::byte{0});
  EXPECT_FALSE(decode_working_set(file));
}

TEST(WorkingSet, WhatCannotBeIsRefusedThoughItsHashIsRight) {
  EXPECT_EQ(complaint([](Bytes&) {}), "sound");
  EXPECT_EQ(complaint([](Bytes& file) { set_number(file, 0, 1); }),
            "it is no working set, or one of another version");
  EXPECT_EQ(complaint([](Bytes& file) { set_number(file, 40, 7); }),
            "the list has more pages than the 7 that the file should have");
  EXPECT_EQ(complaint([](Bytes& file) { set_number(file, 40, 9); }),
            "the list has 8 pages, and should have 9");
  EXPECT_EQ(complaint([](Bytes& file) { set_number(file, 40, 1u << 25); }),
            "it has 33554432 pages of 1000, which no working set has");
  EXPECT_EQ(complaint([](Bytes& file) { set_number(file, 32, std::uint64_t{1} << 33); }),
            "it has 8 pages of 8589934592, which no working set has");
  EXPECT_EQ(complaint([](Bytes& file) { set_number(file, 32, 999); }),
            "page 4 of the list lies outside of the memory");
  EXPECT_EQ(complaint([](Bytes& file) { set_list(file, {2, 0, 1, 0}); }),
            "the list has 2 pages, and should have 8");
  EXPECT_EQ(complaint([](Bytes& file) { set_list(file, {2, 3, 7, 3}); }), "page 1 is in the list twice");
  EXPECT_EQ(complaint([](Bytes& file) { set_list(file, {1, 0}); }),
            "page 0 of the list lies outside of the memory");
  EXPECT_EQ(complaint([](Bytes& file) { set_list(file, {2, 0x80}); }),
            "the list of pages ends within a number");
  EXPECT_EQ(complaint([](Bytes& file) {
              set_list(file, {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 0});
            }),
            "page 0 of the list lies outside of any memory");
}

TEST(WorkingSet, AMergedPageHasTheSoonerOfItsPlaces) {
  WorkingSet set{.identity = {}, .memory_pages = 100, .recordings = 1, .pages = {1, 2, 3, 4}, .runs = {}};
  merge(set, {.identity = {}, .memory_pages = 100, .recordings = 1, .pages = {9, 4, 2, 8, 7, 1}, .runs = {}});
  EXPECT_EQ(set.pages, (std::vector<std::uint32_t>{1, 9, 2, 4, 3, 8, 7}));
  EXPECT_EQ(set.recordings, 2u);
}

TEST(WorkingSet, OnlyTheLastRunsAreKept) {
  std::vector<WorkingSetRun> runs;
  for (std::uint32_t i = 0; i < 20; ++i)
    add_run(runs, {.brought = i, .late = 0, .missed = 0, .left_out = 0, .left_out_used = 0});
  ASSERT_EQ(runs.size(), kWorkingSetRunsMax);
  EXPECT_EQ(runs.front().brought, 12u);
  EXPECT_EQ(runs.back().brought, 19u);
}

TEST(WorkingSet, HitsAndWasteAreWhatThePagesLeftOutSay) {
  const WorkingSetRun run{.brought = 100, .late = 5, .missed = 20, .left_out = 8, .left_out_used = 6};
  EXPECT_EQ(run.hits(), 75);
  EXPECT_EQ(run.waste(), 25);
  EXPECT_DOUBLE_EQ(run.coverage(), 86.0 / 106.0);
}

TEST(WorkingSet, ARawFilesIdentityFollowsFromItsLengthAndItsPages) {
  std::vector<std::byte> bytes(100 * 4096);
  const Identity first = identity_of(*make_memory_store(bytes)).value();
  EXPECT_EQ(identity_of(*make_memory_store(bytes)).value(), first);
  bytes.back() = std::byte{1};
  EXPECT_NE(identity_of(*make_memory_store(bytes)).value(), first);
  bytes.back() = std::byte{0};
  bytes.resize(101 * 4096);
  EXPECT_NE(identity_of(*make_memory_store(bytes)).value(), first);
  EXPECT_TRUE(identity_of(*make_memory_store(std::span(bytes).first(4096))));
}

}  // namespace
}  // namespace uffdkit::image
