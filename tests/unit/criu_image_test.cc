#include "manager/criu_image.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

#include "support/criu_checkpoint.h"
#include "support/temp_dir.h"

namespace uffdkit {
namespace {

using criu::PagemapRun;
using criu::Vma;
using test::CriuEntry;
using test::TempDir;

constexpr std::uint64_t kPage = 4096;

AddressRange pages(std::uint64_t first, std::uint64_t count) {
  return {Address(first * kPage), ByteCount(count * kPage)};
}
Vma vma(std::uint64_t first, std::uint64_t count, std::uint32_t flags = 0x22) {
  return {.memory = pages(first, count), .flags = flags, .status = 0x201};
}
PagemapRun run(std::uint64_t first, std::uint64_t count, bool lazy = true) {
  return {.memory = pages(first, count),
          .offset = StoreOffset(0),
          .in_parent = false,
          .lazy = lazy,
          .present = true};
}
CriuEntry entry(std::uint64_t page, std::uint64_t count, std::uint32_t flags) {
  return {.address = Address(page * kPage), .pages = PageCount(count), .flags = flags};
}

TEST(LazyRuns, AreCutAtTheBordersOfMappingsThatCanBeLazy) {
  const std::vector<Vma> vmas = {vma(10, 10), vma(20, 10), vma(30, 10, 0x2022), vma(50, 10)};
  const std::vector<PagemapRun> pagemap = {run(5, 40), run(52, 2, false), run(55, 2)};
  const auto runs = lazy_runs(pagemap, vmas);
  ASSERT_EQ(runs.size(), 3u);
  EXPECT_EQ(runs[0].memory, pages(10, 10));
  EXPECT_EQ(runs[0].offset, StoreOffset(5 * kPage));
  EXPECT_EQ(runs[1].memory, pages(20, 10));
  EXPECT_EQ(runs[1].offset, StoreOffset(15 * kPage));
  EXPECT_EQ(runs[2].memory, pages(55, 2));
}

TEST(TaskRegions, AreOneForEachMappingUnlessNothingIsLazyForLong) {
  const std::vector<Vma> vmas = {vma(10, 10), vma(20, 10), vma(1000, 100'000)};
  const std::vector<PagemapRun> runs = {run(11, 2), run(15, 1), run(25, 1), run(2000, 5), run(90'000, 5)};
  EXPECT_EQ(plan_task_regions(runs, vmas, 100),
            (std::vector{pages(11, 5), pages(25, 1), pages(2000, 5), pages(90'000, 5)}));
}

TEST(TaskRegions, BeyondTheLimitTheNearestBecomeOne) {
  std::vector<Vma> vmas;
  std::vector<PagemapRun> runs;
  for (const std::uint64_t page : {10u, 20u, 100u, 110u, 500u}) {
    vmas.push_back(vma(page, 5));
    runs.push_back(run(page, 5));
  }
  EXPECT_EQ(plan_task_regions(runs, vmas, 4).size(), 4u);
  EXPECT_EQ(plan_task_regions(runs, vmas, 3), (std::vector{pages(10, 15), pages(100, 15), pages(500, 5)}));
  EXPECT_EQ(plan_task_regions(runs, vmas, 1), (std::vector{pages(10, 495)}));
}

// A checkpoint of one task, 5, with one mapping of 100 pages from page 1000 on.
void write_checkpoint(const std::string& directory, const std::vector<CriuEntry>& entries,
                      std::size_t pages_in_file, char first) {
  std::filesystem::create_directories(directory);
  test::write_file(directory + "/inventory.img", test::criu_inventory());
  test::write_file(directory + "/pstree.img", test::criu_pstree({5}));
  test::write_file(directory + "/mm-5.img", test::criu_mm({{.memory = pages(1000, 100)}}));
  test::write_file(directory + "/pagemap-5.img", test::criu_pagemap(8, entries));
  std::string bytes;
  for (std::size_t i = 0; i < pages_in_file; ++i)
    bytes += std::string(kPage, static_cast<char>(static_cast<std::size_t>(first) + i));
  test::write_file(directory + "/pages-8.img", bytes);
}

// What the pages from `first` to `last` (exclusive) of the mapping read as.
std::string read_pages(const TaskMemory& memory, std::uint64_t first, std::uint64_t last) {
  std::string text;
  for (std::uint64_t page = first; page < last; ++page)
    for (const TaskRegion& region : memory.regions) {
      const Address address((1000 + page) * kPage);
      if (!region.memory.contains(address)) continue;
      std::vector<std::byte> bytes(kPage);
      const auto read = memory.store->read(region.offset + (address - region.memory.start), bytes, Wait::yes);
      text += read && bytes[0] == bytes[kPage - 1] ? static_cast<char>(bytes[0]) : '?';
    }
  return text;
}

TEST(CriuImage, ATaskReadsWhatItsCheckpointHas) {
  const TempDir directory;
  write_checkpoint(directory / "one", {entry(1002, 2, 6), entry(1004, 1, 4), entry(1006, 2, 6)}, 5, 'a');
  Result<CriuImage> image = CriuImage::open(directory / "one");
  ASSERT_TRUE(image) << image.error().text();
  const Result<TaskMemory> memory = image->task(5);
  ASSERT_TRUE(memory) << memory.error().text();
  ASSERT_EQ(memory->regions.size(), 1u);
  EXPECT_EQ(memory->regions[0].memory, pages(1002, 6));
  EXPECT_EQ(memory->lazy, ByteCount(4 * kPage));
  // What the restorer puts into place is not asked for, so it is as good as never there.
  EXPECT_EQ(read_pages(*memory, 2, 8), std::string("ab\0\0de", 6));
}

TEST(CriuImage, RunsAndOffsetsBeyondFourGibibytesAreRead) {
  const TempDir directory;
  const std::string path = directory / "one";
  // A run of 2 GiB and a page, one of more than 4 GiB, and one behind both.
  constexpr std::uint64_t kFirst = (2u << 18) + 1;
  constexpr std::uint64_t kSecond = (1u << 20) + 3;
  write_checkpoint(
      path, {entry(1000, kFirst, 6), entry(1000 + kFirst + 5, kSecond, 6), entry(4'000'000, 2, 6)}, 0, 'a');
  test::write_file(path + "/mm-5.img", test::criu_mm({{.memory = pages(1000, 5'000'000)}}));
  const std::uint64_t marked[] = {
      0, kFirst - 1, kFirst, kFirst + (1u << 19), kFirst + kSecond - 1, kFirst + kSecond};
  {
    const UniqueFd file(::open((path + "/pages-8.img").c_str(), O_WRONLY | O_CLOEXEC));
    ASSERT_TRUE(file);
    ASSERT_EQ(::ftruncate(file.get(), static_cast<off_t>((kFirst + kSecond + 2) * kPage)), 0);
    char mark = 'a';
    for (const std::uint64_t page : marked) {
      const std::string bytes(kPage, mark++);
      ASSERT_EQ(::pwrite(file.get(), bytes.data(), bytes.size(), static_cast<off_t>(page * kPage)),
                static_cast<ssize_t>(kPage));
    }
  }
  Result<CriuImage> image = CriuImage::open(path);
  ASSERT_TRUE(image) << image.error().text();
  const Result<TaskMemory> memory = image->task(5);
  ASSERT_TRUE(memory) << memory.error().text();
  EXPECT_EQ(memory->lazy, ByteCount((kFirst + kSecond + 2) * kPage));
  // read_pages() counts from page 1000.
  const auto page_at = [&](std::uint64_t page) { return read_pages(*memory, page, page + 1); };
  EXPECT_EQ(page_at(0), "a");
  EXPECT_EQ(page_at(kFirst - 1), "b");
  EXPECT_EQ(page_at(kFirst + 5), "c");
  EXPECT_EQ(page_at(kFirst + 5 + (1u << 19)), "d");
  EXPECT_EQ(page_at(kFirst + 5 + kSecond - 1), "e");
  EXPECT_EQ(page_at(4'000'000 - 1000), "f");
  EXPECT_EQ(page_at(4'000'001 - 1000), std::string(1, '\0'));
}

TEST(CriuImage, DamagedCheckpointsGiveMemoryThatCanBeReadOrAnError) {
  const TempDir directory;
  const std::string path = directory / "one";
  write_checkpoint(path, {entry(1002, 2, 6), entry(1004, 1, 4), entry(1006, 2, 6)}, 5, 'a');
  std::vector<std::pair<std::string, std::string>> files;
  for (const char* name : {"/inventory.img", "/pstree.img", "/mm-5.img", "/pagemap-5.img"}) {
    std::ifstream file(path + name, std::ios::binary);
    files.emplace_back(path + name, std::string(std::istreambuf_iterator<char>(file), {}));
  }
  const std::uint32_t seed = 20261125;
  SCOPED_TRACE(seed);
  std::mt19937 random(seed);
  int refused = 0;
  int served = 0;
  for (int round = 0; round < 2000; ++round) {
    const auto& [name, good] = files[random() % files.size()];
    std::string bytes = good;
    for (std::size_t changes = 1 + random() % 3; changes > 0; --changes)
      bytes[random() % bytes.size()] = static_cast<char>(random());
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    test::write_file(name, bytes);
    Result<CriuImage> image = CriuImage::open(path);
    const Result<TaskMemory> memory = image ? image->task(5) : Result<TaskMemory>(Failure(image.error()));
    test::write_file(name, good);
    if (!memory) {
      EXPECT_FALSE(memory.error().message().empty());
      ++refused;
      continue;
    }
    ++served;
    ASSERT_LE(memory->regions.size(), kTaskRegionsMax);
    for (const TaskRegion& region : memory->regions) {
      ASSERT_LE(region.offset.value + region.memory.length.value, memory->store->size().value);
      std::vector<std::byte> page(kPage);
      const StoreOffset last = region.offset + (region.memory.length - ByteCount(kPage));
      ASSERT_TRUE(memory->store->read(last, page, Wait::yes));
    }
  }
  EXPECT_GT(refused, 100);
  EXPECT_GT(served, 100);
}

TEST(CriuImage, PagesOfEarlierCheckpointsAreFoundThere) {
  const TempDir directory;
  // In the first: three runs; the second has one of its own and builds on the first; the third on both.
  write_checkpoint(directory / "one", {entry(1000, 2, 4), entry(1002, 2, 4), entry(1010, 5, 4)}, 9, 'a');
  write_checkpoint(directory / "two", {entry(1000, 3, 1), entry(1003, 1, 4), entry(1010, 5, 1)}, 1, 'p');
  write_checkpoint(directory / "three", {entry(1000, 4, 3), entry(1005, 1, 6), entry(1011, 3, 3)}, 1, 'x');
  std::filesystem::create_directory_symlink("../one", directory / "two/parent");
  std::filesystem::create_directory_symlink("../two", directory / "three/parent");
  Result<CriuImage> image = CriuImage::open(directory / "three");
  ASSERT_TRUE(image) << image.error().text();
  const Result<TaskMemory> memory = image->task(5);
  ASSERT_TRUE(memory) << memory.error().text();
  EXPECT_EQ(read_pages(*memory, 0, 14), std::string("abcp\0x\0\0\0\0\0fgh", 14));
}

TEST(CriuImage, WhatCannotBeServedIsRefusedAndSaysWhy) {
  const TempDir directory;
  const auto refusal = [&](const std::string& name, std::int32_t pid) -> std::string {
    Result<CriuImage> image = CriuImage::open(directory / name);
    if (!image) return image.error().text();
    const Result<TaskMemory> memory = image->task(pid);
    return memory ? "nothing" : memory.error().text();
  };
  const auto expect = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  write_checkpoint(directory / "short", {entry(1000, 2, 6)}, 1, 'a');
  expect(refusal("short", 5), "pages-8.img has 4096 bytes");
  expect(refusal("short", 6), "no task 6");
  write_checkpoint(directory / "remote", {entry(1000, 2, 2)}, 1, 'a');
  expect(refusal("remote", 5), "page server");
  write_checkpoint(directory / "orphan", {entry(1000, 2, 3)}, 1, 'a');
  expect(refusal("orphan", 5), "no link \"parent\"");
  write_checkpoint(directory / "gap", {entry(1000, 3, 3)}, 1, 'a');
  write_checkpoint(directory / "whole", {entry(1000, 2, 6)}, 2, 'a');
  std::filesystem::create_directory_symlink("../whole", directory / "gap/parent");
  expect(refusal("gap", 5), "builds on them");
  write_checkpoint(directory / "loop", {entry(1000, 3, 3)}, 1, 'a');
  std::filesystem::create_directory_symlink(".", directory / "loop/parent");
  expect(refusal("loop", 5), "on itself");
  expect(refusal("none", 5), "No such file");
}

}  // namespace
}  // namespace uffdkit
