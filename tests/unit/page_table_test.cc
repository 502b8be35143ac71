#include "engine/page_table.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "support/cut_stores.h"

namespace uffdkit {
namespace {

constexpr std::array kStates = {PageState::absent,  PageState::fetching, PageState::installed,
                                PageState::removed, PageState::zeroed,   PageState::poisoned};

class PageTableTest : public testing::Test {
 protected:
  static constexpr PageCount kGranules{37};
  std::vector<std::byte> cells_ = std::vector<std::byte>(page_table_bytes(kGranules).value);
  PageTable table_{cells_, kGranules};
};

TEST_F(PageTableTest, AnUntouchedGranuleIsAbsent) {
  for (std::uint64_t i = 0; i < kGranules.value; ++i) EXPECT_EQ(table_.get(PageIndex(i)), PageState::absent);
}

TEST_F(PageTableTest, SettingAGranuleLeavesItsNeighboursAlone) {
  for (const PageState state : kStates) {
    table_.set({PageIndex(0), kGranules}, PageState::removed);
    table_.set(PageIndex(4), state);
    table_.set(PageIndex(9), state);
    for (std::uint64_t i = 0; i < kGranules.value; ++i)
      EXPECT_EQ(table_.get(PageIndex(i)), i == 4 || i == 9 ? state : PageState::removed) << i;
  }
}

TEST_F(PageTableTest, SettingARangeSetsExactlyThatRange) {
  for (std::uint64_t first = 0; first <= 9; ++first) {
    for (std::uint64_t count = 0; first + count <= kGranules.value; ++count) {
      table_.set({PageIndex(0), kGranules}, PageState::installed);
      table_.set({PageIndex(first), PageCount(count)}, PageState::poisoned);
      for (std::uint64_t i = 0; i < kGranules.value; ++i)
        ASSERT_EQ(table_.get(PageIndex(i)),
                  i >= first && i < first + count ? PageState::poisoned : PageState::installed)
            << first << " " << count << " " << i;
    }
  }
}

TEST_F(PageTableTest, ARunEndsAtAnotherStateOrAtTheLimit) {
  table_.set({PageIndex(10), PageCount(7)}, PageState::removed);
  EXPECT_EQ(table_.end_of_run(PageIndex(10), PageIndex(30), PageState::removed), PageIndex(17));
  EXPECT_EQ(table_.end_of_run(PageIndex(10), PageIndex(12), PageState::removed), PageIndex(12));
  EXPECT_EQ(table_.end_of_run(PageIndex(9), PageIndex(30), PageState::removed), PageIndex(9));
  EXPECT_EQ(table_.start_of_run(PageIndex(17), PageIndex(0), PageState::removed), PageIndex(10));
  EXPECT_EQ(table_.start_of_run(PageIndex(17), PageIndex(12), PageState::removed), PageIndex(12));
  EXPECT_EQ(table_.start_of_run(PageIndex(18), PageIndex(0), PageState::removed), PageIndex(18));
}

TEST_F(PageTableTest, AChangeIsAskedOnceForEachRunAndMadeInTheRangeOnly) {
  table_.set({PageIndex(4), PageCount(9)}, PageState::fetching);
  table_.set({PageIndex(20), PageCount(kGranules.value - 20)}, PageState::fetching);
  std::vector<PageState> asked;
  table_.change({PageIndex(2), PageCount(20)}, [&](PageState state) {
    asked.push_back(state);
    return state == PageState::fetching ? PageState::installed : state;
  });
  EXPECT_EQ(asked,
            (std::vector{PageState::absent, PageState::fetching, PageState::absent, PageState::fetching}));
  for (std::uint64_t i = 0; i < kGranules.value; ++i)
    EXPECT_EQ(table_.get(PageIndex(i)), (i >= 4 && i < 13) || i == 20 || i == 21 ? PageState::installed
                                        : i >= 22                                ? PageState::fetching
                                                                                 : PageState::absent)
        << i;
}

// ---- two levels -------------------------------------------------------------------------------------------

// Where docs/session-state.md says that things are.
constexpr std::uint64_t kDirectoryAt = 64;
constexpr std::uint64_t kStretch = 512;
constexpr std::uint64_t kBlockBytes = 256;
constexpr std::uint32_t kUniform = 0x8000'0000;
constexpr std::uint32_t kAllRemoved = kUniform | 3;

// Three stretches and a part of one.
class TwoLevels : public testing::Test {
 protected:
  static constexpr PageCount kGranules{3 * kStretch + 100};
  static constexpr std::uint64_t kBlocksAt = 128;

  template <class T>
  T peek(std::uint64_t at) const {
    T value;
    std::memcpy(&value, memory_.data() + at, sizeof value);
    return value;
  }
  template <class T>
  void poke(std::uint64_t at, T value) {
    std::memcpy(memory_.data() + at, &value, sizeof value);
  }
  std::uint32_t entry(std::uint64_t stretch) const { return peek<std::uint32_t>(kDirectoryAt + 4 * stretch); }
  void poke_entry(std::uint64_t stretch, std::uint32_t entry) { poke(kDirectoryAt + 4 * stretch, entry); }
  std::uint64_t last() const { return peek<std::uint64_t>(0); }
  std::uint32_t blocks() const { return static_cast<std::uint32_t>(last()); }
  static PageRange stretch(std::uint64_t number) {
    const std::uint64_t first = number * kStretch;
    return {PageIndex(first), PageCount(std::min(kStretch, kGranules.value - first))};
  }
  std::optional<PageTable> taken_up() {
    const std::span<std::byte> all(memory_);
    return PageTable::take_up(memory_, kGranules, std::span(&all, 1));
  }

  std::vector<std::byte> memory_ = std::vector<std::byte>(page_table_bytes(kGranules).value);
  PageTable table_{memory_, kGranules};
};

TEST_F(TwoLevels, AWholeStretchIsSetInTheDirectory) {
  table_.set(stretch(1), PageState::removed);
  EXPECT_EQ(entry(0), 0u);
  EXPECT_EQ(entry(1), kAllRemoved);
  EXPECT_EQ(entry(2), 0u);
  EXPECT_EQ(blocks(), 0u);
  EXPECT_EQ(table_.get(PageIndex(kStretch - 1)), PageState::absent);
  EXPECT_EQ(table_.get(PageIndex(kStretch)), PageState::removed);
  EXPECT_EQ(table_.get(PageIndex(2 * kStretch - 1)), PageState::removed);
  EXPECT_EQ(table_.get(PageIndex(2 * kStretch)), PageState::absent);
}

TEST_F(TwoLevels, TheLastStretchIsWholeWhereTheTableEnds) {
  table_.set({PageIndex(0), kGranules}, PageState::removed);
  EXPECT_EQ(entry(3), kAllRemoved);
  EXPECT_EQ(blocks(), 0u);
  table_.set({PageIndex(3 * kStretch), PageCount(99)}, PageState::zeroed);
  EXPECT_EQ(blocks(), 1u);
  EXPECT_EQ(table_.get(PageIndex(3 * kStretch + 98)), PageState::zeroed);
  EXPECT_EQ(table_.get(PageIndex(3 * kStretch + 99)), PageState::removed);
}

TEST_F(TwoLevels, BlocksAreGivenOutOneAfterAnother) {
  table_.set(PageIndex(2 * kStretch + 5), PageState::installed);
  EXPECT_EQ(last(), 2ull << 32 | 1);
  EXPECT_EQ(entry(2), 1u);
  EXPECT_EQ(peek<std::uint8_t>(kBlocksAt + 2), 0x20);
  table_.set(PageIndex(6), PageState::poisoned);
  EXPECT_EQ(last(), 0ull << 32 | 2);
  EXPECT_EQ(entry(0), 2u);
  EXPECT_EQ(peek<std::uint8_t>(kBlocksAt + kBlockBytes + 3), 0x05);
  table_.set(PageIndex(2 * kStretch + 4), PageState::zeroed);
  EXPECT_EQ(peek<std::uint8_t>(kBlocksAt + 2), 0x24);
  EXPECT_EQ(blocks(), 2u);
}

TEST_F(TwoLevels, WhatChangesNothingTakesNoBlock) {
  table_.set(PageIndex(5), PageState::absent);
  table_.set(stretch(1), PageState::removed);
  table_.set({PageIndex(kStretch - 9), PageCount(9)}, PageState::absent);
  table_.set({PageIndex(kStretch), PageCount(9)}, PageState::removed);
  EXPECT_EQ(blocks(), 0u);
  EXPECT_EQ(entry(0), 0u);
}

TEST_F(TwoLevels, APartOfAStretchLeavesTheRestInItsState) {
  table_.set({PageIndex(0), kGranules}, PageState::removed);
  table_.set({PageIndex(500), PageCount(600)}, PageState::zeroed);
  for (std::uint64_t i = 0; i < kGranules.value; ++i)
    ASSERT_EQ(table_.get(PageIndex(i)), i >= 500 && i < 1100 ? PageState::zeroed : PageState::removed) << i;
  // The stretch in between is whole.
  EXPECT_EQ(blocks(), 2u);
}

TEST_F(TwoLevels, AStretchKeepsItsBlock) {
  table_.set(PageIndex(5), PageState::installed);
  table_.set({PageIndex(0), kGranules}, PageState::removed);
  EXPECT_EQ(entry(0), 1u);
  EXPECT_EQ(entry(1), kAllRemoved);
  for (std::uint64_t i = 0; i < kGranules.value; ++i) ASSERT_EQ(table_.get(PageIndex(i)), PageState::removed);
}

TEST_F(TwoLevels, RunsGoOnFromStretchToStretch) {
  // From within a stretch that has a block, over one that has none, into the last one.
  table_.set({PageIndex(500), PageCount(3 * kStretch + 50 - 500)}, PageState::removed);
  const PageIndex end(kGranules.value);
  EXPECT_EQ(table_.end_of_run(PageIndex(500), end, PageState::removed), PageIndex(3 * kStretch + 50));
  EXPECT_EQ(table_.end_of_run(PageIndex(700), PageIndex(1000), PageState::removed), PageIndex(1000));
  EXPECT_EQ(table_.end_of_run(PageIndex(0), end, PageState::absent), PageIndex(500));
  EXPECT_EQ(table_.end_of_run(PageIndex(600), end, PageState::absent), PageIndex(600));
  EXPECT_EQ(table_.start_of_run(PageIndex(3 * kStretch + 50), PageIndex(0), PageState::removed),
            PageIndex(500));
  EXPECT_EQ(table_.start_of_run(PageIndex(1000), PageIndex(700), PageState::removed), PageIndex(700));
  EXPECT_EQ(table_.start_of_run(PageIndex(1000), PageIndex(0), PageState::absent), PageIndex(1000));
  EXPECT_EQ(table_.end_of_run(end, end, PageState::removed), end);
}

TEST_F(TwoLevels, AValueThatNobodyWritesReadsAsPoisoned) {
  table_.set(PageIndex(0), PageState::installed);
  for (unsigned value = 6; value < 16; ++value) {
    poke(kBlocksAt + 1, static_cast<std::uint8_t>(value << 4));
    EXPECT_EQ(table_.get(PageIndex(2)), PageState::absent);
    EXPECT_EQ(table_.get(PageIndex(3)), PageState::poisoned) << value;
  }
}

// An unknown state, bits that mean nothing, blocks that nobody has given out, and such as there are not.
const std::vector<std::uint32_t> kDamagedEntries = {
    kUniform | 6, kUniform | 15, kUniform | 16 | 3, kUniform | ~0u, 2, 4, 5, kUniform - 1};

TEST_F(TwoLevels, AnEntryThatNobodyWritesReadsAsPoisoned) {
  table_.set(PageIndex(0), PageState::installed);
  for (const std::uint32_t damaged : kDamagedEntries) {
    poke_entry(1, damaged);
    EXPECT_EQ(table_.get(PageIndex(kStretch)), PageState::poisoned) << damaged;
    EXPECT_EQ(table_.end_of_run(PageIndex(kStretch), PageIndex(kGranules.value), PageState::poisoned),
              PageIndex(2 * kStretch));
  }
  // What is set there is found, and the rest stays so.
  table_.set(PageIndex(kStretch + 9), PageState::removed);
  EXPECT_EQ(table_.get(PageIndex(kStretch + 9)), PageState::removed);
  EXPECT_EQ(table_.get(PageIndex(kStretch + 8)), PageState::poisoned);
}

TEST_F(TwoLevels, AStretchForWhichNoBlockIsLeftIsPoisoned) {
  for (std::uint64_t i = 0; i < 4; ++i) table_.set(PageIndex(i * kStretch), PageState::installed);
  poke_entry(2, 0);
  table_.set(PageIndex(2 * kStretch + 7), PageState::removed);
  EXPECT_EQ(table_.get(PageIndex(2 * kStretch + 7)), PageState::poisoned);
  EXPECT_EQ(table_.get(PageIndex(2 * kStretch)), PageState::poisoned);
  EXPECT_EQ(blocks(), 4u);
  // As a whole it can be set.
  table_.set(stretch(2), PageState::removed);
  EXPECT_EQ(table_.get(PageIndex(2 * kStretch + 7)), PageState::removed);
}

// ---- taking up --------------------------------------------------------------------------------------------

TEST_F(TwoLevels, WhoTakesItUpFindsAllButFetches) {
  table_.set(PageIndex(3), PageState::fetching);
  table_.set(PageIndex(4), PageState::fetching);
  table_.set(PageIndex(5), PageState::removed);
  table_.set(stretch(1), PageState::fetching);
  table_.set(stretch(2), PageState::removed);
  table_.set(PageIndex(3 * kStretch + 99), PageState::poisoned);
  const std::optional<PageTable> taken = taken_up();
  ASSERT_TRUE(taken);
  for (std::uint64_t i = 0; i < kGranules.value; ++i) {
    const PageState before = table_.get(PageIndex(i));
    ASSERT_EQ(taken->get(PageIndex(i)), before == PageState::fetching ? PageState::absent : before) << i;
  }
  EXPECT_EQ(taken->get(PageIndex(5)), PageState::removed);
  EXPECT_EQ(taken->get(PageIndex(kStretch)), PageState::absent);
}

TEST_F(TwoLevels, ABlockThatWasGivenOutAndIsNotInTheDirectoryIsPutThere) {
  table_.set(stretch(1), PageState::removed);
  table_.set(PageIndex(0), PageState::installed);
  table_.set(PageIndex(kStretch + 1), PageState::zeroed);
  for (const std::uint32_t before : {0u, kAllRemoved}) {
    poke_entry(1, before);
    std::optional<PageTable> taken = taken_up();
    ASSERT_TRUE(taken);
    EXPECT_EQ(entry(1), 2u);
    EXPECT_EQ(taken->get(PageIndex(kStretch)), PageState::removed);
    EXPECT_EQ(taken->get(PageIndex(kStretch + 1)), PageState::zeroed);
  }
  std::optional<PageTable> taken = taken_up();
  ASSERT_TRUE(taken);
  taken->set(PageIndex(2 * kStretch), PageState::installed);
  EXPECT_EQ(entry(2), 3u);
}

TEST_F(TwoLevels, WhatWasNotWrittenIsNotLookedAt) {
  std::memset(memory_.data(), 0xff, memory_.size());
  std::optional<PageTable> taken = PageTable::take_up(memory_, kGranules, {});
  EXPECT_TRUE(taken);
}

TEST_F(TwoLevels, ADamagedTableIsRefused) {
  table_.set(PageIndex(0), PageState::installed);
  const std::vector<std::byte> before = memory_;
  EXPECT_TRUE(taken_up());
  for (const std::uint32_t damaged : kDamagedEntries) {
    for (const std::uint64_t at : {0u, 1u, 3u}) {
      memory_ = before;
      poke_entry(at, damaged);
      EXPECT_FALSE(taken_up()) << damaged << " at " << at;
    }
  }
  // The last block is no block, none that there is, in no stretch, and in one that has another.
  constexpr std::uint64_t kOne = 1;
  for (const std::uint64_t damaged : {kOne << 32, kOne << 32 | 5, kOne << 32 | 0xffff'ffff,
                                      4 * kOne << 32 | 1, 0xffff'ffff * kOne << 32 | 1, 2 * kOne}) {
    memory_ = before;
    poke(0, damaged);
    EXPECT_FALSE(taken_up()) << damaged;
  }
  // A block, and none was given out.
  memory_ = before;
  poke(0, std::uint64_t{0});
  EXPECT_FALSE(taken_up());
}

// Memory in pages of its own, as a file has it.
class CutTable : public testing::Test {
 protected:
  static constexpr PageCount kGranules{3 * kStretch + 100};
  static constexpr std::uint64_t kBytes = 4096;
  static_assert(page_table_bytes(kGranules) <= ByteCount(kBytes));

  CutTable()
      : memory_(static_cast<std::byte*>(
                    ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)),
                kBytes) {}
  ~CutTable() override { ::munmap(memory_.data(), kBytes); }

  static std::vector<PageState> states_of(const PageTable& table) {
    std::vector<PageState> states;
    for (std::uint64_t i = 0; i < kGranules.value; ++i) states.push_back(table.get(PageIndex(i)));
    return states;
  }

  std::span<std::byte> memory_;
};

TEST_F(CutTable, CutOffAtAnyStoreEachGranuleIsInTheStateOfBeforeOrAfter) {
  if (const std::string lacking = test::stores_cannot_be_cut(); !lacking.empty()) GTEST_SKIP() << lacking;
  PageTable table(memory_, kGranules);
  const std::vector<std::function<void()>> changes = {
      [&] { table.set(PageIndex(700), PageState::installed); },
      [&] { table.set({PageIndex(1024), PageCount(512)}, PageState::removed); },
      [&] { table.set({PageIndex(1030), PageCount(5)}, PageState::zeroed); },
      [&] { table.set({PageIndex(3), PageCount(1300)}, PageState::removed); },
      [&] { table.set({PageIndex(0), kGranules}, PageState::poisoned); },
      [&] { table.set(PageIndex(3 * kStretch + 50), PageState::removed); },
  };
  std::size_t cut_off = 0;
  for (std::size_t change = 0; change < changes.size(); ++change) {
    const std::vector<PageState> before = states_of(table);
    std::vector<std::vector<std::byte>> cuts;
    test::after_each_store(memory_, changes[change],
                           [&] { cuts.emplace_back(memory_.begin(), memory_.end()); });
    const std::vector<PageState> after = states_of(table);
    EXPECT_FALSE(cuts.empty());
    for (std::vector<std::byte>& cut : cuts) {
      const std::span<std::byte> all(cut);
      std::optional<PageTable> taken = PageTable::take_up(cut, kGranules, std::span(&all, 1));
      ASSERT_TRUE(taken) << "change " << change;
      std::vector<PageState> found = states_of(*taken);
      for (std::uint64_t i = 0; i < kGranules.value; ++i)
        ASSERT_TRUE(found[i] == before[i] || found[i] == after[i]) << "change " << change << " at " << i;
      // The next one has no block of another's, and the bytes that were left in it do not count.
      for (const std::uint64_t granule : {1u, 600u, 1100u, 1600u}) {
        const PageState other =
            found[granule] == PageState::installed ? PageState::zeroed : PageState::installed;
        taken->set(PageIndex(granule), other);
        found[granule] = other;
        ASSERT_EQ(states_of(*taken), found) << "change " << change;
      }
      std::set<std::uint32_t> entries;
      for (std::uint64_t i = 0; i < 4; ++i) {
        std::uint32_t entry = 0;
        std::memcpy(&entry, cut.data() + kDirectoryAt + 4 * i, sizeof entry);
        entries.insert(entry);
      }
      EXPECT_EQ(entries, (std::set<std::uint32_t>{1, 2, 3, 4})) << "change " << change;
      ++cut_off;
    }
  }
  EXPECT_GT(cut_off, changes.size());
}

// ---- against an array -------------------------------------------------------------------------------------

TEST(PageTableAsAnArray, ItHoldsWhatAnArrayHolds) {
  for (std::uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    std::mt19937_64 random(seed);
    const std::uint64_t granules = 1 + random() % (seed % 2 == 0 ? 700 : 6 * kStretch);
    std::vector<std::byte> memory(page_table_bytes(PageCount(granules)).value);
    PageTable table(memory, PageCount(granules));
    std::vector<PageState> array(granules, PageState::absent);
    const auto any_state = [&] { return kStates[random() % kStates.size()]; };
    const auto any_range = [&] {
      std::uint64_t first = random() % granules;
      std::uint64_t end = first + random() % (granules - first + 1);
      // Often whole stretches, and their edges.
      if (random() % 2 == 0) first = first / kStretch * kStretch;
      if (random() % 2 == 0) end = std::min(granules, (end + kStretch - 1) / kStretch * kStretch);
      if (random() % 4 == 0) end = std::min(end, first + random() % 20);
      return PageRange{PageIndex(first), PageCount(std::max(first, end) - first)};
    };
    for (int i = 0; i < 3000; ++i) {
      const PageRange range = any_range();
      const PageState state = any_state();
      const auto first = array.begin() + static_cast<std::ptrdiff_t>(range.first.value);
      const auto end = array.begin() + static_cast<std::ptrdiff_t>(range.end().value);
      switch (random() % 8) {
        case 0:
          table.set(range, state);
          std::fill(first, end, state);
          break;
        case 1:
        case 2:
          table.set(range.first, state);
          *first = state;
          break;
        case 3: {
          const PageState to = any_state();
          const auto change = [&](PageState is) { return is == state ? to : is; };
          table.change(range, change);
          std::transform(first, end, first, change);
          break;
        }
        case 4: {
          const auto run_end = std::find_if(first, end, [&](PageState is) { return is != state; });
          ASSERT_EQ(table.end_of_run(range.first, range.end(), state),
                    PageIndex(static_cast<std::uint64_t>(run_end - array.begin())));
          break;
        }
        case 5: {
          auto run = end;
          while (run > first && *(run - 1) == state) --run;
          ASSERT_EQ(table.start_of_run(range.end(), range.first, state),
                    PageIndex(static_cast<std::uint64_t>(run - array.begin())));
          break;
        }
        case 6:
          for (PageIndex at = range.first; at < range.end(); at = at + PageCount(1))
            ASSERT_EQ(table.get(at), array[at.value]) << at.value;
          break;
        default:
          if (random() % 20 != 0) break;
          const std::span<std::byte> all(memory);
          std::optional<PageTable> taken =
              PageTable::take_up(memory, PageCount(granules), std::span(&all, 1));
          ASSERT_TRUE(taken);
          table = std::move(*taken);
          std::replace(array.begin(), array.end(), PageState::fetching, PageState::absent);
      }
    }
    for (std::uint64_t i = 0; i < granules; ++i) ASSERT_EQ(table.get(PageIndex(i)), array[i]) << i;
  }
}

// ---- what it costs ----------------------------------------------------------------------------------------

TEST(PageTableBytes, AreABlockAndAnEntryForEachStretch) {
  EXPECT_EQ(page_table_bytes(PageCount(1)), ByteCount(64 + 64 + 256));
  EXPECT_EQ(page_table_bytes(PageCount(16 * kStretch)), ByteCount(64 + 64 + 16 * 256));
  EXPECT_EQ(page_table_bytes(PageCount(17 * kStretch)), ByteCount(64 + 128 + 17 * 256));
}

}  // namespace
}  // namespace uffdkit
