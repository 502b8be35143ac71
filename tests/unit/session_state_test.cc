#include "engine/session_state.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "support/cut_stores.h"

namespace uffdkit {
namespace {

// Where docs/session-state.md says that things are.
constexpr std::uint64_t kVersionAt = 8;
constexpr std::uint64_t kRegionCountAt = 12;
constexpr std::uint64_t kTablesEndAt = 16;
constexpr std::uint64_t kProgressAt = 24;
constexpr std::uint64_t kSegmentCountsAt = 32;
constexpr std::uint64_t kImageBytesAt = 40;
constexpr std::uint64_t kImageAt = 44;
constexpr std::uint64_t kRegionsAt = 2'560;
constexpr std::uint64_t kInboxAt = 512;
constexpr std::uint64_t kLayoutsAt = 65'536;
constexpr std::uint64_t kLayoutBytes = 33'554'432;
constexpr std::uint64_t kTablesAt = 67'174'400;

constexpr Address kBase{0x7f00'0000'0000};

AddressRange pages(std::uint64_t first, std::uint64_t count) {
  return {kBase + kPage4K.bytes(PageCount(first)), kPage4K.bytes(PageCount(count))};
}

template <class T>
void poke(int fd, std::uint64_t at, T value) {
  ASSERT_EQ(::pwrite(fd, &value, sizeof value, static_cast<off_t>(at)), static_cast<ssize_t>(sizeof value));
}

template <class T>
T peek(int fd, std::uint64_t at) {
  T value{};
  EXPECT_EQ(::pread(fd, &value, sizeof value, static_cast<off_t>(at)), static_cast<ssize_t>(sizeof value));
  return value;
}

std::uint64_t file_bytes(int fd) {
  struct stat status;
  EXPECT_EQ(::fstat(fd, &status), 0);
  return static_cast<std::uint64_t>(status.st_size);
}

// The file as it is now, sealed like the original: what would be found if its writer were cut off here.
UniqueFd copy_of(int fd) {
  UniqueFd copy(::memfd_create("copy", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(copy.get(), static_cast<off_t>(file_bytes(fd))), 0);
  std::vector<char> buffer(1 << 16);
  for (off_t at = 0; (at = ::lseek(fd, at, SEEK_DATA)) >= 0;) {
    const ssize_t bytes = ::pread(fd, buffer.data(), buffer.size(), at);
    EXPECT_EQ(::pwrite(copy.get(), buffer.data(), static_cast<std::size_t>(bytes), at), bytes);
    at += bytes;
  }
  EXPECT_EQ(::fcntl(copy.get(), F_ADD_SEALS, F_SEAL_SHRINK), 0);
  return copy;
}

// What the file takes.
std::uint64_t memory_bytes(int fd) {
  struct stat status;
  EXPECT_EQ(::fstat(fd, &status), 0);
  return static_cast<std::uint64_t>(status.st_blocks) * 512;
}

// All that a state holds, as text.
std::string text_of(SessionState& state) {
  std::string text = state.image() + "\n";
  for (const RegionRecord& region : state.regions())
    text += region.live ? fmt::format("region {} {} {}\n", region.length.value, region.offset.value,
                                      region.page_size.shift())
                        : "none\n";
  for (const Segment& segment : state.layout().segments()) {
    text += fmt::format("{:#x}+{:#x} {} {}{}:", segment.memory.start.value, segment.memory.length.value,
                        segment.region, segment.first.value, segment.left_behind ? " left" : "");
    for (std::uint64_t i = 0; segment.region != kZeroRegion && i < segment.granules().count.value; ++i)
      text +=
          fmt::format("{}", static_cast<int>(state.table(segment.region).get(segment.first + PageCount(i))));
    text += "\n";
  }
  return text;
}

class SessionStateTest : public testing::Test {
 protected:
  SessionStateTest() : state_(SessionState::create("guest.mem").value()) {}

  RegionId add(AddressRange memory, std::uint64_t offset = 0, PageSize page_size = kPage4K) {
    return state_.add_region(memory, StoreOffset(offset), page_size).value();
  }
  // The error of opening a copy with a change made to it.
  std::string refusal(const std::function<void(int fd)>& change) {
    UniqueFd copy = copy_of(state_.fd());
    change(copy.get());
    const Result<SessionState> opened = SessionState::open(std::move(copy));
    return opened ? "" : opened.error().message();
  }

  SessionState state_;
};

TEST_F(SessionStateTest, AnEmptySessionIsTakenUp) {
  SessionState opened = SessionState::open(copy_of(state_.fd())).value();
  EXPECT_EQ(opened.image(), "guest.mem");
  EXPECT_TRUE(opened.regions().empty());
  EXPECT_TRUE(opened.layout().segments().empty());
}

TEST_F(SessionStateTest, WhatIsTakenUpAfterAnyChangeIsWhatWasThere) {
  const std::vector<std::function<void()>> changes = {
      [&] { add(pages(0, 16)); },
      [&] { add(pages(100, 32), 8192); },
      [&] { state_.table(0).set({PageIndex(3), PageCount(5)}, PageState::removed); },
      [&] { state_.table(1).set(PageIndex(31), PageState::poisoned); },
      [&] { ASSERT_TRUE(state_.erase(pages(4, 2))); },
      [&] { ASSERT_TRUE(state_.move(pages(104, 8), pages(300, 8).start)); },
      [&] { ASSERT_TRUE(state_.settle(pages(105, 1).start, /*is_file=*/true)); },
      [&] { ASSERT_TRUE(state_.map_again(pages(302, 1).start, pages(400, 1).start)); },
      [&] { ASSERT_TRUE(state_.move(pages(300, 4), pages(600, 1).start)); },
      [&] { ASSERT_TRUE(state_.settle(pages(300, 1).start, /*is_file=*/false)); },
      [&] { ASSERT_TRUE(state_.erase(pages(302, 300))); },
      [&] { ASSERT_TRUE(state_.erase(pages(104, 8))); },
      [&] { ASSERT_TRUE(state_.erase(pages(0, 50))); },
      [&] { add(pages(500, 8), 4096); },
      [&] { state_.table(0).set(PageIndex(7), PageState::installed); },
      [&] { add(pages(1024, 1024), 0, kPage2M); },
      [&] { ASSERT_TRUE(state_.erase(pages(0, 4096))); },
  };
  for (std::size_t i = 0; i < changes.size(); ++i) {
    changes[i]();
    Result<SessionState> opened = SessionState::open(copy_of(state_.fd()));
    ASSERT_TRUE(opened) << "change " << i << ": " << opened.error().message();
    EXPECT_EQ(text_of(*opened), text_of(state_)) << "change " << i;
  }
}

TEST_F(SessionStateTest, AHalfWrittenSpareLayoutIsNotLookedAt) {
  add(pages(0, 16));
  ASSERT_TRUE(state_.erase(pages(4, 2)));
  const std::string before = text_of(state_);
  const std::uint32_t spare = 1 - peek<std::uint32_t>(state_.fd(), kProgressAt);
  UniqueFd copy = copy_of(state_.fd());
  for (std::uint64_t at = 0; at < 96; at += 8)
    poke(copy.get(), kLayoutsAt + spare * kLayoutBytes + at, ~std::uint64_t{0});
  poke(copy.get(), kSegmentCountsAt + spare * 4, ~std::uint32_t{0});
  SessionState opened = SessionState::open(std::move(copy)).value();
  EXPECT_EQ(text_of(opened), before);
}

TEST_F(SessionStateTest, ARegionThatWasFilledInButNotCountedIsNotThere) {
  add(pages(0, 16));
  const std::string before = text_of(state_);
  UniqueFd copy = copy_of(state_.fd());
  poke(copy.get(), kRegionsAt + 32, std::uint64_t{12345});
  poke(copy.get(), kRegionsAt + 32 + 28, std::uint32_t{1});
  SessionState opened = SessionState::open(std::move(copy)).value();
  EXPECT_EQ(text_of(opened), before);
}

TEST_F(SessionStateTest, ARegionWhoseLayoutWasNotPublishedIsDroppedByTheNextChange) {
  add(pages(0, 16));
  add(pages(100, 16));
  UniqueFd copy = copy_of(state_.fd());
  // The list before the last one has the first region only.
  poke(copy.get(), kProgressAt, 1 - peek<std::uint32_t>(copy.get(), kProgressAt));
  SessionState opened = SessionState::open(std::move(copy)).value();
  EXPECT_TRUE(opened.regions()[1].live);
  ASSERT_TRUE(opened.erase(pages(8, 1)));
  EXPECT_FALSE(opened.regions()[1].live);
  EXPECT_TRUE(opened.regions()[0].live);
}

TEST_F(SessionStateTest, AFileThatWasExtendedBeforeItsWriterWasCutOffGrowsFurther) {
  add(pages(0, 16));
  UniqueFd copy = copy_of(state_.fd());
  ASSERT_EQ(::ftruncate(copy.get(), static_cast<off_t>(file_bytes(copy.get()) + (1u << 20))), 0);
  SessionState opened = SessionState::open(std::move(copy)).value();
  EXPECT_TRUE(opened.add_region(pages(100, 1), StoreOffset(0), kPage4K));
}

TEST_F(SessionStateTest, PagesThatTheFormerOwnerWasFetchingAreAbsent) {
  add(pages(0, 40'000));
  state_.table(0).set({PageIndex(20 * 512), PageCount(1024)}, PageState::fetching);
  const auto states = {PageState::fetching, PageState::installed, PageState::removed, PageState::fetching,
                       PageState::poisoned};
  for (const std::uint64_t first : {0u, 9'001u, 39'990u}) {
    PageIndex granule(first);
    for (const PageState state : states) {
      state_.table(0).set(granule, state);
      granule = granule + PageCount(1);
    }
  }
  SessionState opened = SessionState::open(copy_of(state_.fd())).value();
  EXPECT_EQ(opened.table(0).get(PageIndex(20 * 512)), PageState::absent);
  EXPECT_EQ(opened.table(0).get(PageIndex(22 * 512 - 1)), PageState::absent);
  for (const std::uint64_t first : {0u, 9'001u, 39'990u}) {
    PageIndex granule(first);
    for (const PageState state : states) {
      EXPECT_EQ(opened.table(0).get(granule), state == PageState::fetching ? PageState::absent : state);
      granule = granule + PageCount(1);
    }
  }
}

TEST_F(SessionStateTest, TakingUpAHugeSparseRegionCostsNoMemory) {
  add(pages(0, 1u << 28));  // 1 TiB
  state_.table(0).set(PageIndex(5), PageState::installed);
  state_.table(0).set(PageIndex(1u << 27), PageState::fetching);
  add(pages(1ull << 28, 1u << 28));  // nobody has touched this one
  UniqueFd copy = copy_of(state_.fd());
  const std::uint64_t before = memory_bytes(copy.get());
  SessionState opened = SessionState::open(std::move(copy)).value();
  EXPECT_EQ(memory_bytes(opened.fd()), before);
  EXPECT_EQ(opened.table(0).get(PageIndex(5)), PageState::installed);
  EXPECT_EQ(opened.table(0).get(PageIndex(1u << 27)), PageState::absent);
}

TEST_F(SessionStateTest, TouchesStrewnOverATerabyteTakeAKibibyteEachAtMost) {
  constexpr std::uint64_t kGranules = 1u << 28;
  constexpr std::uint64_t kTouches = 4000;
  add(pages(0, kGranules));
  const std::uint64_t before = memory_bytes(state_.fd());
  for (std::uint64_t i = 0; i < kTouches; ++i)
    state_.table(0).set(PageIndex(i * (kGranules / kTouches)), PageState::installed);
  EXPECT_LE(memory_bytes(state_.fd()) - before, kTouches * 1024);
}

TEST_F(SessionStateTest, ATerabyteThatIsRemovedTakesTwoMebibytes) {
  constexpr std::uint64_t kGranules = 1u << 28;
  add(pages(0, kGranules));
  const std::uint64_t before = memory_bytes(state_.fd());
  state_.table(0).set({PageIndex(0), PageCount(kGranules)}, PageState::removed);
  EXPECT_LE(memory_bytes(state_.fd()) - before, (2u << 20) + 8192);
  SessionState opened = SessionState::open(copy_of(state_.fd())).value();
  EXPECT_EQ(opened.table(0).end_of_run(PageIndex(0), PageIndex(kGranules), PageState::removed),
            PageIndex(kGranules));
}

TEST_F(SessionStateTest, HugePagesTakeNoBlocks) {
  constexpr std::uint64_t kGranules = 1u << 28;
  add(pages(0, kGranules), 0, kPage2M);
  const std::uint64_t before = memory_bytes(state_.fd());
  for (std::uint64_t first = 0; first < kGranules; first += 512)
    state_.table(0).set({PageIndex(first), PageCount(512)}, PageState::installed);
  EXPECT_LE(memory_bytes(state_.fd()) - before, (2u << 20) + 8192);
}

TEST_F(SessionStateTest, ASmallRegionOfWhichOnePageWasTouchedHasOnePageOfStates) {
  add(pages(0, 65'536));  // 256 MiB
  const std::uint64_t before = memory_bytes(state_.fd());
  state_.table(0).set(PageIndex(40'000), PageState::installed);
  EXPECT_EQ(memory_bytes(state_.fd()) - before, 4096u);
}

TEST_F(SessionStateTest, TakenUpBeforeTheDirectoryHadABlockItHasIt) {
  add(pages(0, 4096));
  state_.table(0).set({PageIndex(512), PageCount(512)}, PageState::removed);
  state_.table(0).set(PageIndex(600), PageState::zeroed);
  const std::string before = text_of(state_);
  UniqueFd copy = copy_of(state_.fd());
  EXPECT_EQ(peek<std::uint32_t>(copy.get(), kTablesAt + 64 + 4), 1u);
  poke(copy.get(), kTablesAt + 64 + 4, std::uint32_t{0x8000'0003});
  SessionState opened = SessionState::open(std::move(copy)).value();
  EXPECT_EQ(text_of(opened), before);
  EXPECT_EQ(peek<std::uint32_t>(opened.fd(), kTablesAt + 64 + 4), 1u);
}

TEST_F(SessionStateTest, ADroppedRegionFreesItsTableAndItsNumberIsUsedAgain) {
  add(pages(0, 1u << 22));
  for (std::uint64_t i = 0; i < 1u << 22; i += 512) state_.table(0).set(PageIndex(i), PageState::installed);
  const std::uint64_t full = memory_bytes(state_.fd());
  ASSERT_TRUE(state_.erase(pages(0, 1u << 22)));
  EXPECT_LE(memory_bytes(state_.fd()) + (2u << 20), full);
  EXPECT_EQ(add(pages(50, 8)), 0u);
  EXPECT_EQ(state_.table(0).get(PageIndex(3)), PageState::absent);
  SessionState opened = SessionState::open(copy_of(state_.fd())).value();
  EXPECT_EQ(text_of(opened), text_of(state_));
}

TEST_F(SessionStateTest, ADescriptorForReadingIsEnoughToTakeItUp) {
  add(pages(0, 16));
  UniqueFd reading(::open(fmt::format("/proc/self/fd/{}", state_.fd()).c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(reading);
  SessionState opened = SessionState::open(std::move(reading)).value();
  EXPECT_TRUE(opened.erase(pages(3, 1)));
}

TEST_F(SessionStateTest, WhatAPeerWritesIntoItLaterIsNotReadBack) {
  add(pages(0, 16));
  SessionState opened = SessionState::open(copy_of(state_.fd())).value();
  poke(opened.fd(), kProgressAt, std::uint32_t{7});
  poke(opened.fd(), kRegionCountAt, ~std::uint32_t{0});
  poke(opened.fd(), kTablesEndAt, ~std::uint64_t{0});
  poke(opened.fd(), kRegionsAt + 16, ~std::uint64_t{0});
  EXPECT_TRUE(opened.add_region(pages(100, 8), StoreOffset(0), kPage4K));
  EXPECT_TRUE(opened.erase(pages(0, 16)));
  EXPECT_EQ(peek<std::uint32_t>(opened.fd(), kProgressAt), 1u);
}

TEST_F(SessionStateTest, ACloneHoldsTheSameAndGoesItsOwnWay) {
  add(pages(0, 16));
  add(pages(100, 1u << 20), 4096);
  state_.table(1).set(PageIndex(77), PageState::removed);
  ASSERT_TRUE(state_.erase(pages(3, 2)));
  SessionState clone = state_.clone().value();
  EXPECT_EQ(text_of(clone), text_of(state_));
  clone.table(1).set(PageIndex(78), PageState::poisoned);
  ASSERT_TRUE(clone.erase(pages(0, 16)));
  EXPECT_EQ(state_.table(1).get(PageIndex(78)), PageState::absent);
  EXPECT_TRUE(state_.regions()[0].live);
}

TEST_F(SessionStateTest, AFileWhoseRegionsAPeerHasChangedIsNotCloned) {
  add(pages(0, 16));
  add(pages(100, 16));
  ASSERT_TRUE(state_.erase(pages(100, 16)));
  poke(state_.fd(), kRegionCountAt, std::uint32_t{1});
  EXPECT_FALSE(state_.clone());
  poke(state_.fd(), kRegionCountAt, std::uint32_t{2});
  EXPECT_TRUE(state_.clone());
  poke(state_.fd(), kRegionsAt + 32 + 28, std::uint32_t{1});  // a region that was dropped lives again
  EXPECT_FALSE(state_.clone());
}

TEST_F(SessionStateTest, ItCannotBeShrunkUnderItsUser) {
  EXPECT_LT(::ftruncate(state_.fd(), 4096), 0);
}

TEST_F(SessionStateTest, MoreRegionsThanAllowedAreRefused) {
  for (std::uint64_t i = 0; i < kSessionRegionsMax; ++i) add(pages(2 * i, 1));
  EXPECT_FALSE(state_.add_region(pages(9000, 1), StoreOffset(0), kPage4K));
  ASSERT_TRUE(state_.erase(pages(10, 1)));
  EXPECT_TRUE(state_.add_region(pages(9000, 1), StoreOffset(0), kPage4K));
}

TEST_F(SessionStateTest, ARegionThatIsTooLargeForItsPageStatesIsRefused) {
  const AddressRange large{kBase, ByteCount((std::uint64_t{1} << 51) + 4096)};
  EXPECT_FALSE(state_.add_region(large, StoreOffset(0), kPage4K));
}

TEST_F(SessionStateTest, ANameThatIsTooLongIsRefused) {
  EXPECT_TRUE(SessionState::create(std::string(255, 'x')));
  EXPECT_FALSE(SessionState::create(std::string(256, 'x')));
}

TEST_F(SessionStateTest, OtherFilesAreRefused) {
  const auto open = [](int fd) { return SessionState::open(UniqueFd(fd)); };
  EXPECT_FALSE(open(::open("/dev/null", O_RDWR | O_CLOEXEC)));
  EXPECT_FALSE(open(::memfd_create("unsealed", MFD_CLOEXEC)));
  const int tiny = ::memfd_create("tiny", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  ASSERT_EQ(::fcntl(tiny, F_ADD_SEALS, F_SEAL_SHRINK), 0);
  EXPECT_FALSE(open(tiny));
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  EXPECT_FALSE(open(ends[0]));
  ::close(ends[1]);
}

TEST_F(SessionStateTest, TheImageOfAFileIsToldAndNothingElseIsTouched) {
  const UniqueFd file = copy_of(SessionState::create("an image").value().fd());
  const std::uint64_t before = memory_bytes(file.get());
  EXPECT_EQ(SessionState::image_of(file.get()).value(), "an image");
  EXPECT_EQ(memory_bytes(file.get()), before);
  poke<std::uint32_t>(file.get(), kImageBytesAt, 256);
  EXPECT_FALSE(SessionState::image_of(file.get()));
}

// One that nobody writes to would be read for ever.
TEST_F(SessionStateTest, TheImageOfAnotherKindOfFileIsNotAskedFor) {
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const UniqueFd reader(ends[0]);
  const UniqueFd writer(ends[1]);
  EXPECT_FALSE(SessionState::image_of(reader.get()));
  const UniqueFd unsealed(::memfd_create("unsealed", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_FALSE(SessionState::image_of(unsealed.get()));
}

TEST_F(SessionStateTest, DamageOfEveryFieldIsRefusedAndNamed) {
  add(pages(0, 16), 4096);
  add(pages(1024, 1024), 0, kPage2M);
  state_.table(0).set(PageIndex(3), PageState::installed);
  const std::uint64_t layout = kLayoutsAt + peek<std::uint32_t>(state_.fd(), kProgressAt) * kLayoutBytes;
  const std::uint64_t counts = kSegmentCountsAt + peek<std::uint32_t>(state_.fd(), kProgressAt) * 4;
  EXPECT_EQ(refusal([](int) {}), "");

  const auto refuses = [&](const std::string& word, std::uint64_t at, auto value) {
    const std::string message = refusal([&](int fd) { poke(fd, at, value); });
    EXPECT_NE(message.find(word), std::string::npos)
        << "at " << at << " value " << value << ": \"" << message << "\"";
  };
  refuses("not one", 0, std::uint64_t{1});
  refuses("version", kVersionAt, std::uint32_t{1});
  refuses("version", kVersionAt, std::uint32_t{0});
  refuses("regions", kRegionCountAt, std::uint32_t{1025});
  refuses("tables", kTablesEndAt, std::uint64_t{kTablesAt + 1});
  refuses("messages", kProgressAt, std::uint64_t{65 << 1});
  refuses("segments", counts, std::uint32_t{(1u << 20) + 1});
  refuses("segment 2", counts, std::uint32_t{3});
  refuses("name", kImageBytesAt, std::uint32_t{256});
  const std::uint64_t big = ~std::uint64_t{0};
  for (const std::uint64_t length :
       {std::uint64_t{0}, std::uint64_t{4097}, big, big << 12, std::uint64_t{1} << 50})
    refuses("region 0", kRegionsAt, length);
  for (const std::uint64_t offset : {std::uint64_t{1}, big, big << 12})
    refuses("region 0", kRegionsAt + 8, offset);
  for (const std::uint64_t table :
       {std::uint64_t{0}, std::uint64_t{kTablesAt + 1}, big, big << 12, std::uint64_t{1} << 62})
    refuses("region 0", kRegionsAt + 16, table);
  for (const std::uint32_t shift : {0u, 11u, 22u, 30u, 64u, ~0u}) refuses("region 0", kRegionsAt + 24, shift);
  refuses("region 0", kRegionsAt + 28, std::uint32_t{2});
  refuses("page states of region 0", kTablesAt, std::uint64_t{2});
  refuses("page states of region 0", kTablesAt, std::uint64_t{1} << 32 | 1);
  refuses("page states of region 0", kTablesAt + 64, std::uint32_t{2});
  refuses("page states of region 1", kTablesAt + 4096 + 64, std::uint32_t{1});
  refuses("page states of region 1", kTablesAt + 4096 + 64 + 4, std::uint32_t{0x8000'0006});
  for (const std::uint64_t start : {std::uint64_t{1}, big, big << 12}) refuses("segment 0", layout, start);
  refuses("segment 1", layout, pages(1025, 1).start.value);       // the first one lies behind the second
  refuses("segment 1", layout + 32, pages(1025, 1).start.value);  // a huge page that is not aligned
  refuses("segment 1", layout + 32, kBase.value);                 // overlaps the first
  for (const std::uint64_t length :
       {std::uint64_t{0}, std::uint64_t{1}, big, big << 12, std::uint64_t{17 * 4096}})
    refuses("segment 0", layout + 8, length);
  for (const std::uint64_t first : {std::uint64_t{1}, big}) refuses("segment 0", layout + 16, first);
  refuses("segment 1", layout + 32 + 8, std::uint64_t{4096});  // part of a huge page
  refuses("segment 1", layout + 32 + 16, std::uint64_t{1});
  refuses("segment 0", layout + 24, std::uint32_t{2});
  for (const std::uint32_t shift : {0u, 11u, 21u, 30u, ~0u}) refuses("segment 0", layout + 28, shift);
}

TEST_F(SessionStateTest, AMessageIsAppliedInTheSameStoreThatSwitchesTheLayout) {
  add(pages(0, 16));
  state_.empty_inbox()[0].event = abi::kEventRemap;
  // Whatever else there is to write of it, the successor finds the move made and the message applied.
  state_.applying(0);
  ASSERT_TRUE(state_.move(pages(0, 16), pages(100, 1).start));
  const SessionState taken_up = SessionState::open(copy_of(state_.fd())).value();
  EXPECT_EQ(taken_up.unapplied(), 1u);
  EXPECT_NE(taken_up.layout().find(pages(100, 1).start), nullptr);
}

TEST_F(SessionStateTest, MessagesThatWereReadAreFoundByASuccessorUntilTheyAreApplied) {
  const std::span<abi::Msg> slots = state_.empty_inbox();
  for (std::size_t i = 0; i < 3; ++i) slots[i].event = abi::kEventRemove;
  state_.applying(0);
  state_.applied();
  const SessionState taken_up = SessionState::open(copy_of(state_.fd())).value();
  EXPECT_EQ(taken_up.unapplied(), 1u);
  EXPECT_EQ(taken_up.inbox()[2].event, abi::kEventRemove);
  EXPECT_EQ(taken_up.inbox()[3].event, 0);
}

TEST_F(SessionStateTest, ACloneHasNoMessages) {
  state_.empty_inbox()[0].event = abi::kEventFork;
  state_.applying(0);
  state_.applied();
  const SessionState clone = state_.clone().value();
  EXPECT_EQ(clone.inbox()[0].event, 0);
  EXPECT_EQ(clone.unapplied(), 0u);
}

// What would be found by whoever takes the session up.
std::string layout_text_of(SessionState& state) {
  const std::string text = text_of(state);
  return text.substr(std::min(text.find("0x"), text.size()));
}

TEST_F(SessionStateTest, CutOffAtAnyStoreItHasTheLayoutOfBeforeOrAfterTheChange) {
  if (const std::string lacking = test::stores_cannot_be_cut(); !lacking.empty()) GTEST_SKIP() << lacking;
  const std::vector<std::function<void()>> changes = {
      [&] { add(pages(0, 16)); },
      [&] { add(pages(100, 32), 8192); },
      [&] { (void)state_.erase(pages(4, 2)); },
      [&] { (void)state_.move(pages(104, 8), pages(300, 8).start); },
      [&] { (void)state_.erase(pages(0, 50)); },
      [&] { add(pages(500, 8), 4096); },
      [&] { add(pages(1024, 1024), 0, kPage2M); },
      [&] { (void)state_.erase(pages(0, 4096)); },
  };
  for (std::size_t i = 0; i < changes.size(); ++i) {
    const std::string before = layout_text_of(state_);
    std::vector<UniqueFd> cuts;
    test::after_each_store(test::mapping_of(state_.fd()), changes[i],
                           [&] { cuts.push_back(copy_of(state_.fd())); });
    const std::string after = layout_text_of(state_);
    EXPECT_GT(cuts.size(), 1u);
    bool changed = false;
    for (UniqueFd& cut : cuts) {
      Result<SessionState> opened = SessionState::open(std::move(cut));
      ASSERT_TRUE(opened) << "change " << i << ": " << opened.error().message();
      const std::string found = layout_text_of(*opened);
      changed = changed || found != before;
      EXPECT_EQ(found, changed ? after : before) << "change " << i;
    }
    EXPECT_TRUE(changed) << "change " << i;
  }
}

TEST_F(SessionStateTest, CutOffAtAnyStoreEachMessageIsAppliedOnceByItOrItsSuccessor) {
  if (const std::string lacking = test::stores_cannot_be_cut(); !lacking.empty()) GTEST_SKIP() << lacking;
  add(pages(0, 16));
  // There and back and there again: what is applied twice, or not at all, is found elsewhere.
  const std::array<AddressRange, 4> places = {pages(0, 16), pages(100, 16), pages(0, 16), pages(200, 16)};
  const auto apply_from = [&](SessionState& state, std::size_t first) {
    const std::span<const abi::Msg> inbox = state.inbox();
    for (std::size_t i = first; i < inbox.size() && inbox[i].event != 0; ++i) {
      state.applying(i);
      (void)state.move(places[i], places[i + 1].start);
      state.applied();
    }
    (void)state.empty_inbox();
  };
  const std::span<abi::Msg> slots = state_.empty_inbox();
  for (std::size_t i = 0; i + 1 < places.size(); ++i) slots[i].event = abi::kEventRemap;
  std::vector<UniqueFd> cuts;
  test::after_each_store(
      test::mapping_of(state_.fd()), [&] { apply_from(state_, 0); },
      [&] { cuts.push_back(copy_of(state_.fd())); });
  const std::string after = layout_text_of(state_);
  EXPECT_GT(cuts.size(), places.size());
  for (UniqueFd& cut : cuts) {
    SessionState successor = SessionState::open(std::move(cut)).value();
    apply_from(successor, successor.unapplied());
    EXPECT_EQ(layout_text_of(successor), after);
  }
}

TEST_F(SessionStateTest, EveryByteIsWhereItsDocumentSays) {
  add(pages(0, 16), 4096);
  add(pages(1024, 512), 8192, kPage2M);
  ASSERT_TRUE(state_.erase(pages(4, 12)));
  state_.table(0).set(PageIndex(0), PageState::removed);
  state_.table(0).set(PageIndex(1), PageState::poisoned);
  state_.table(1).set({PageIndex(0), PageCount(512)}, PageState::installed);
  const int fd = state_.fd();
  EXPECT_EQ(peek<std::uint64_t>(fd, 0), 0x5353455344464655u);  // "UFFDSESS"
  EXPECT_EQ(peek<std::uint32_t>(fd, kVersionAt), 4u);
  EXPECT_EQ(peek<std::uint32_t>(fd, kRegionCountAt), 2u);
  EXPECT_EQ(peek<std::uint64_t>(fd, kTablesEndAt), kTablesAt + 2 * 4096);
  EXPECT_EQ(peek<std::uint64_t>(fd, kTablesEndAt), file_bytes(fd));
  EXPECT_EQ(peek<std::uint32_t>(fd, kProgressAt), 1u);  // three layouts were written
  EXPECT_EQ(peek<std::uint32_t>(fd, kSegmentCountsAt + 4), 2u);
  EXPECT_EQ(peek<std::uint32_t>(fd, kImageBytesAt), 9u);
  EXPECT_EQ(peek<std::uint64_t>(fd, kImageAt), 0x656d2e7473657567u);  // "guest.me"
  for (std::uint64_t at = kImageAt + 260; at < kInboxAt; at += 8) EXPECT_EQ(peek<std::uint64_t>(fd, at), 0u);

  const std::uint64_t second = kRegionsAt + 32;
  EXPECT_EQ(peek<std::uint64_t>(fd, second), 512u * 4096);
  EXPECT_EQ(peek<std::uint64_t>(fd, second + 8), 8192u);
  EXPECT_EQ(peek<std::uint64_t>(fd, second + 16), kTablesAt + 4096);
  EXPECT_EQ(peek<std::uint32_t>(fd, second + 24), 21u);
  EXPECT_EQ(peek<std::uint32_t>(fd, second + 28), 1u);

  const std::uint64_t layout = kLayoutsAt + kLayoutBytes;
  EXPECT_EQ(peek<std::uint64_t>(fd, layout), kBase.value);
  EXPECT_EQ(peek<std::uint64_t>(fd, layout + 8), 4u * 4096);
  EXPECT_EQ(peek<std::uint64_t>(fd, layout + 16), 0u);
  EXPECT_EQ(peek<std::uint32_t>(fd, layout + 24), 0u);
  EXPECT_EQ(peek<std::uint32_t>(fd, layout + 28), 12u);
  EXPECT_EQ(peek<std::uint64_t>(fd, layout + 32), pages(1024, 1).start.value);
  EXPECT_EQ(peek<std::uint32_t>(fd, layout + 32 + 24), 1u);

  for (abi::Msg& slot : state_.empty_inbox()) slot.event = abi::kEventRemove;
  state_.applying(62);
  state_.applied();
  EXPECT_EQ(peek<std::uint64_t>(fd, kProgressAt), 63u << 1 | 1u);
  EXPECT_EQ(peek<std::uint8_t>(fd, kInboxAt + 63 * 32), abi::kEventRemove);
  (void)state_.empty_inbox();
  EXPECT_EQ(peek<std::uint64_t>(fd, kProgressAt), 1u);
  EXPECT_EQ(peek<std::uint8_t>(fd, kInboxAt + 63 * 32), 0);

  EXPECT_EQ(peek<std::uint64_t>(fd, kTablesAt), 1u);          // block 1, stretch 0
  EXPECT_EQ(peek<std::uint32_t>(fd, kTablesAt + 64), 1u);     // which has block 1
  EXPECT_EQ(peek<std::uint8_t>(fd, kTablesAt + 128), 0x53u);  // page 0: removed (3), page 1: poisoned (5)
  EXPECT_EQ(peek<std::uint64_t>(fd, kTablesAt + 4096), 0u);   // no block
  EXPECT_EQ(peek<std::uint32_t>(fd, kTablesAt + 4096 + 64), 0x8000'0002u);  // all installed

  ASSERT_TRUE(state_.move(pages(0, 4), pages(600, 1).start));
  EXPECT_EQ(peek<std::uint32_t>(fd, kProgressAt), 0u);
  EXPECT_EQ(peek<std::uint32_t>(fd, kLayoutsAt + 24), 0u);  // what was left behind
  EXPECT_EQ(peek<std::uint16_t>(fd, kLayoutsAt + 30), 1u);
}

}  // namespace
}  // namespace uffdkit
