#include "manager/read_rings.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <map>
#include <memory>
#include <set>
#include <span>
#include <thread>
#include <utility>
#include <vector>

#include "support/child.h"

namespace uffdkit {
namespace {

constexpr std::uint64_t kPages = 500;
constexpr std::size_t kPage = 4096;

// Many containers refuse it, and so may the machine's administrator.
class ReadRingsTest : public testing::Test {
 protected:
  void SetUp() override {
    auto made = ReadRings::create();
    if (!made) GTEST_SKIP() << made.error().text();
    rings_ = std::move(*made);
    file_.reset(::memfd_create("pages", MFD_CLOEXEC));
    ASSERT_TRUE(file_);
    for (std::uint64_t page = 0; page < kPages; ++page) {
      const std::vector<std::byte> bytes(kPage, byte_of(page));
      ASSERT_EQ(::pwrite(file_.get(), bytes.data(), kPage, static_cast<off_t>(page * kPage)),
                static_cast<ssize_t>(kPage));
    }
  }
  static std::byte byte_of(std::uint64_t page) { return static_cast<std::byte>(page * 7 + 1); }
  FilePart part(std::uint64_t page) const { return {.file = file_.get(), .offset = page * kPage}; }

  std::shared_ptr<ReadRings> rings_;
  UniqueFd file_;
};

// Reads all pages of the file, as many at once as can be.
void read_all(BatchReader& reader, int file, std::vector<std::byte>& bytes) {
  std::size_t under_way = 0;
  std::size_t done = 0;
  const auto wait = [&] {
    for (const BatchReader::Done& each : reader.wait()) {
      EXPECT_EQ(each.result, static_cast<std::int64_t>(kPage)) << each.tag;
      --under_way;
      ++done;
    }
  };
  for (std::uint64_t page = 0; page < kPages; ++page) {
    if (under_way == reader.most()) wait();
    reader.begin({.file = file, .offset = page * kPage}, std::span(bytes).subspan(page * kPage, kPage), page);
    ++under_way;
  }
  while (under_way > 0) wait();
  EXPECT_EQ(done, kPages);
}

TEST_F(ReadRingsTest, AllBytesComeToTheirPlacesAlsoWhereMoreAreReadThanAtOnce) {
  const BorrowedReader reader(rings_.get());
  ASSERT_TRUE(reader);
  ASSERT_LT(reader->most(), kPages);
  std::vector<std::byte> bytes(kPages * kPage);
  read_all(*reader, file_.get(), bytes);
  for (std::uint64_t page = 0; page < kPages; ++page)
    for (std::size_t at = 0; at < kPage; at += 512) ASSERT_EQ(bytes[page * kPage + at], byte_of(page));
}

TEST_F(ReadRingsTest, EachReadIsToldWhatBecameOfIt) {
  const BorrowedReader reader(rings_.get());
  std::vector<std::byte> bytes(4 * kPage);
  reader->begin(part(kPages), std::span(bytes).first(kPage), 1);
  reader->begin({.file = -1, .offset = 0}, std::span(bytes).subspan(kPage, kPage), 2);
  reader->begin(part(kPages - 1), std::span(bytes).subspan(2 * kPage), 3);
  std::map<std::uint64_t, std::int64_t> results;
  while (results.size() < 3)
    for (const BatchReader::Done& done : reader->wait()) results[done.tag] = done.result;
  // Beyond the end; of nothing; up to the end.
  EXPECT_EQ(results[1], 0);
  EXPECT_EQ(results[2], -EBADF);
  EXPECT_EQ(results[3], static_cast<std::int64_t>(kPage));
}

TEST_F(ReadRingsTest, ThereAreSomeForOneAtATimeEach) {
  std::vector<BatchReader*> taken;
  while (BatchReader* reader = rings_->take()) taken.push_back(reader);
  EXPECT_EQ(taken.size(), ReadRings::kRings);
  rings_->give_back(*taken.front());
  EXPECT_EQ(rings_->take(), taken.front());
  for (BatchReader* reader : taken) rings_->give_back(*reader);
}

// From now on this process's rings are told that there is no memory for what they are to begin.
bool have_no_memory_for_rings() {
  const scmp_filter_ctx filter = ::seccomp_init(SCMP_ACT_ALLOW);
  const bool refused = filter != nullptr &&
                       ::seccomp_rule_add(filter, SCMP_ACT_ERRNO(ENOMEM), SCMP_SYS(io_uring_enter), 0) == 0 &&
                       ::seccomp_load(filter) == 0;
  ::seccomp_release(filter);
  return refused;
}

TEST_F(ReadRingsTest, OneThatTheKernelHasNoMemoryForTellsThatOfEachReadAndIsUsedNoMore) {
  // Rings are their maker's alone, and a filter stays for good.
  test::Child process([&](const test::Channel&) {
    const std::shared_ptr<ReadRings> rings = ReadRings::create().value();
    if (!have_no_memory_for_rings()) return 1;
    for (unsigned left = ReadRings::kRings; left > 0; --left) {
      if (!rings->has_any()) return 2;
      const BorrowedReader reader(rings.get());
      if (!reader) return 3;
      std::vector<std::byte> bytes(3 * kPage);
      for (std::uint64_t tag = 0; tag < 3; ++tag)
        reader->begin(part(tag), std::span(bytes).subspan(tag * kPage, kPage), tag);
      std::set<std::uint64_t> failed;
      while (failed.size() < 3)
        for (const BatchReader::Done& done : reader->wait())
          if (done.result != -ENOMEM || !failed.insert(done.tag).second) return 4;
    }
    return rings->has_any() || rings->take() != nullptr ? 5 : 0;
  });
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(ReadRingsTest, ThreadsThatTakeThemInTurnsReadTheirOwnBytes) {
  std::vector<std::jthread> threads;
  for (int thread = 0; thread < 8; ++thread)
    threads.emplace_back([&] {
      std::vector<std::byte> bytes(kPages * kPage);
      for (int turn = 0; turn < 10;) {
        const BorrowedReader reader(rings_.get());
        if (!reader) {
          std::this_thread::yield();
          continue;
        }
        std::ranges::fill(bytes, std::byte{0});
        read_all(*reader, file_.get(), bytes);
        for (std::uint64_t page = 0; page < kPages; ++page)
          EXPECT_EQ(bytes[(page + 1) * kPage - 1], byte_of(page));
        ++turn;
      }
    });
}

}  // namespace
}  // namespace uffdkit
