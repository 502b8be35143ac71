// Memory served by a Pager on the running kernel; every byte that is seen is compared.
#include <uffdkit/pager.h>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <optional>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "support/huge_pages.h"

// Declares `name`, a Pager; skips the test where this machine cannot make one.
#define PAGER_OR_SKIP(name, ...)                                                           \
  ::uffdkit::Result<::uffdkit::Pager> made_##name = ::uffdkit::Pager::create(__VA_ARGS__); \
  if (!made_##name) GTEST_SKIP() << "needs a userfaultfd: " << made_##name.error().text(); \
  ::uffdkit::Pager name = std::move(*made_##name)

namespace uffdkit {
namespace {

constexpr std::size_t kPage = 4096;

// The word at `index` of every store here.
std::uint64_t word(std::uint64_t index) {
  return (index + 1) * 0x9e3779b97f4a7c15u;
}

// A store whose words are computed, and whose pages can be made to fail, or to wait until they are let go.
class WordStore final : public Store {
 public:
  explicit WordStore(std::size_t pages) : pages_(pages) {}
  ~WordStore() override { let_go(); }

  void fail_page(std::size_t page) { failing_.insert(page); }
  // From now on nothing can be read without waiting, and whoever waits, waits for let_go().
  void hold() { held_ = true; }
  void let_go() {
    const std::lock_guard lock(mutex_);
    held_ = false;
    changed_.notify_all();
  }
  void wait_for_readers(int readers) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return waiting_ >= readers; });
  }

  ByteCount size() const noexcept override { return ByteCount(pages_ * kPage); }
  std::string name() const override { return "words"; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(pages_ * kPage)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    if (held_) {
      if (wait == Wait::no) return ReadStatus::would_block;
      std::unique_lock lock(mutex_);
      ++waiting_;
      changed_.notify_all();
      changed_.wait(lock, [&] { return !held_; });
      --waiting_;
    }
    for (std::size_t at = 0; at < to.size(); at += kPage)
      if (failing_.contains((from.value + at) / kPage)) return Failure(Error("a bad page", EIO));
    for (std::size_t at = 0; at < to.size(); at += 8) {
      const std::uint64_t value = word((from.value + at) / 8);
      std::memcpy(to.data() + at, &value, sizeof value);
    }
    return ReadStatus::done;
  }

 private:
  const std::size_t pages_;
  std::set<std::size_t> failing_;
  std::atomic<bool> held_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  int waiting_ = 0;
};

std::shared_ptr<WordStore> words(std::size_t pages) {
  return std::make_shared<WordStore>(pages);
}

std::uint64_t load(const std::byte* at) {
  std::uint64_t value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

// Whether the page at `memory` holds the words of the store's page.
testing::AssertionResult shows(const std::byte* memory, std::size_t store_page) {
  for (std::size_t i = 0; i < kPage / 8; ++i)
    if (load(memory + i * 8) != word(store_page * kPage / 8 + i))
      return testing::AssertionFailure() << "word " << i << " of page " << store_page;
  return testing::AssertionSuccess();
}

bool is_zero(const std::byte* memory) {
  return std::all_of(memory, memory + kPage, [](std::byte byte) { return byte == std::byte{0}; });
}

// Whether reading a byte there raises SIGBUS. For one thread of one test at a time.
thread_local sigjmp_buf on_bus_error;
bool raises_bus_error(const std::byte* at) {
  struct sigaction before;
  struct sigaction action{};
  action.sa_handler = [](int) { siglongjmp(on_bus_error, 1); };
  ::sigaction(SIGBUS, &action, &before);
  const bool raised = sigsetjmp(on_bus_error, 1) != 0;
  if (!raised) (void)*const_cast<const volatile std::byte*>(at);
  ::sigaction(SIGBUS, &before, nullptr);
  return raised;
}

// What is counted, when it has come to `expected`, or does not any more: a thread goes on before its page is
// counted.
std::uint64_t counted(const Pager& pager, std::uint64_t PagerStatus::* what, std::uint64_t expected) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
  while (pager.status().*what != expected && std::chrono::steady_clock::now() < end)
    std::this_thread::yield();
  return pager.status().*what;
}

TEST(Pager, EveryByteTouchedInAnyOrderByAnyThreadIsTheStores) {
  PAGER_OR_SKIP(pager);
  constexpr std::size_t kPages = 1024;
  const Region region = pager.map(words(kPages)).value();
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (unsigned t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        std::vector<std::size_t> order(kPages);
        for (std::size_t i = 0; i < kPages; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), std::mt19937(seed + t));
        for (const std::size_t page : order)
          if (!shows(region.data() + page * kPage, page)) ++wrong;
      });
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(counted(pager, &PagerStatus::pages_copied, kPages), kPages);
}

TEST(Pager, WhatIsWrittenStays) {
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(64)).value();
  for (std::size_t page = 0; page < 64; page += 2) region.data()[page * kPage] = std::byte{0x5a};
  for (std::size_t page = 0; page < 64; ++page)
    EXPECT_EQ(region.data()[page * kPage],
              page % 2 == 0 ? std::byte{0x5a} : std::byte(word(page * kPage / 8)));
}

TEST(Pager, AWindowOfTheStoreIsShownFromItsOffset) {
  PAGER_OR_SKIP(pager);
  const Region region =
      pager.map(words(64), {.offset = StoreOffset(10 * kPage), .length = ByteCount(3 * kPage)}).value();
  ASSERT_EQ(region.size(), ByteCount(3 * kPage));
  for (std::size_t page = 0; page < 3; ++page) EXPECT_TRUE(shows(region.data() + page * kPage, 10 + page));
}

TEST(Pager, RangesOutsideOfTheStoreOrUnalignedAreRefused) {
  PAGER_OR_SKIP(pager);
  const auto refused = [&](std::uint64_t offset, std::uint64_t length, bool huge = false) {
    return !pager.map(words(64),
                      {.offset = StoreOffset(offset), .length = ByteCount(length), .huge_pages = huge});
  };
  EXPECT_TRUE(refused(64 * kPage, kPage));
  EXPECT_TRUE(refused(64 * kPage, 0));
  EXPECT_TRUE(refused(65 * kPage, 0));
  EXPECT_TRUE(refused(0, 65 * kPage));
  EXPECT_TRUE(refused(kPage, ~std::uint64_t{0} << 12));
  EXPECT_TRUE(refused(1, kPage));
  EXPECT_TRUE(refused(0, kPage + 1));
  EXPECT_TRUE(refused(0, 64 * kPage, true));
  EXPECT_FALSE(refused(63 * kPage, 0));
}

TEST(Pager, OptionsThatMakeNoSenseAreRefused) {
  for (const std::uint64_t around : {0u, 3u, 1024u})
    EXPECT_FALSE(Pager::create({.fault_around = PageCount(around)}));
}

TEST(Pager, SystemCallsReadAndWriteMissingPages) {
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(32)).value();
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  // From the region: the kernel faults on its behalf.
  ASSERT_EQ(::write(ends[1], region.data() + 5 * kPage, kPage), static_cast<ssize_t>(kPage));
  std::array<std::byte, kPage> page;
  ASSERT_EQ(::read(ends[0], page.data(), kPage), static_cast<ssize_t>(kPage));
  EXPECT_TRUE(shows(page.data(), 5));
  // Into the region, half a page: the rest is the store's.
  ASSERT_EQ(::write(ends[1], page.data(), 16), 16);
  ASSERT_EQ(::read(ends[0], region.data() + 29 * kPage, 16), 16);
  EXPECT_EQ(load(region.data() + 29 * kPage), word(5 * kPage / 8));
  EXPECT_EQ(load(region.data() + 29 * kPage + 16), word(29 * kPage / 8 + 2));
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(Pager, PagesGivenBackReadAsZeroWhileOthersTouch) {
  PAGER_OR_SKIP(pager);
  constexpr std::size_t kPages = 512;
  const Region region = pager.map(words(kPages)).value();
  std::vector<std::atomic<bool>> given_back(kPages);
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (unsigned t = 0; t < 3; ++t)
      threads.emplace_back([&, t] {
        std::mt19937 random(t);
        for (int i = 0; i < 3000; ++i) {
          const std::size_t page = random() % kPages;
          const bool must_be_zero = given_back[page];
          const std::uint64_t seen = load(region.data() + page * kPage);
          const bool is_zero_now = seen == 0;
          if (must_be_zero ? !is_zero_now : !is_zero_now && seen != word(page * kPage / 8)) ++wrong;
        }
      });
    std::mt19937 random(99);
    for (int i = 0; i < 300; ++i) {
      const std::size_t first = random() % (kPages - 8);
      ASSERT_EQ(::madvise(region.data() + first * kPage, 8 * kPage, MADV_DONTNEED), 0);
      for (std::size_t page = first; page < first + 8; ++page) given_back[page] = true;
    }
  }
  EXPECT_EQ(wrong, 0);
  for (std::size_t page = 0; page < kPages; ++page) {
    if (given_back[page]) {
      EXPECT_TRUE(is_zero(region.data() + page * kPage)) << page;
    } else {
      EXPECT_TRUE(shows(region.data() + page * kPage, page));
    }
  }
  EXPECT_EQ(counted(pager, &PagerStatus::pages_removed, 2400), 2400u);
}

TEST(Pager, MovedPagesShowTheSameBytes) {
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(64)).value();
  EXPECT_TRUE(shows(region.data() + 9 * kPage, 9));
  void* place = ::mmap(nullptr, 8 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  auto* moved = static_cast<std::byte*>(
      ::mremap(region.data() + 8 * kPage, 8 * kPage, 8 * kPage, MREMAP_MAYMOVE | MREMAP_FIXED, place));
  ASSERT_NE(static_cast<void*>(moved), MAP_FAILED);
  for (std::size_t page = 0; page < 8; ++page) EXPECT_TRUE(shows(moved + page * kPage, 8 + page));
  EXPECT_TRUE(shows(region.data() + 7 * kPage, 7));
  EXPECT_TRUE(shows(region.data() + 16 * kPage, 16));
}

TEST(Pager, AMoveThatShrinksLeavesItsNeighboursAlone) {
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(64)).value();
  const Region neighbour = pager.map(words(64), {.offset = StoreOffset(32 * kPage)}).value();
  // Its first page is given up for the two that stay of eight; the next ones must not be touched by the rest.
  auto* moved = static_cast<std::byte*>(::mremap(region.data() + 8 * kPage, 8 * kPage, 2 * kPage,
                                                 MREMAP_MAYMOVE | MREMAP_FIXED, neighbour.data()));
  ASSERT_EQ(moved, neighbour.data());
  EXPECT_TRUE(shows(moved, 8));
  EXPECT_TRUE(shows(moved + kPage, 9));
  for (std::size_t page = 2; page < 32; ++page)
    EXPECT_TRUE(shows(neighbour.data() + page * kPage, 32 + page));
}

TEST(Pager, WhatAMoveLeavesBehindIsZero) {
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(16)).value();
  auto* moved = static_cast<std::byte*>(
      ::mremap(region.data(), 16 * kPage, 16 * kPage, MREMAP_MAYMOVE | MREMAP_DONTUNMAP, nullptr));
  ASSERT_NE(static_cast<void*>(moved), MAP_FAILED);
  for (std::size_t page = 0; page < 16; ++page) {
    EXPECT_TRUE(shows(moved + page * kPage, page));
    EXPECT_TRUE(is_zero(region.data() + page * kPage));
  }
  ::munmap(region.data(), 16 * kPage);
}

TEST(Pager, WhatARegionGrowsByIsZero) {
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(16)).value();
  auto* grown = static_cast<std::byte*>(::mremap(region.data(), 16 * kPage, 32 * kPage, MREMAP_MAYMOVE));
  ASSERT_NE(static_cast<void*>(grown), MAP_FAILED);
  for (std::size_t page = 0; page < 32; ++page) {
    if (page < 16) {
      EXPECT_TRUE(shows(grown + page * kPage, page));
    } else {
      EXPECT_TRUE(is_zero(grown + page * kPage));
    }
  }
  ::munmap(grown + 16 * kPage, 16 * kPage);
}

TEST(Pager, ARegionsEndLeavesAloneWhatElseWasMappedInItsPlace) {
  PAGER_OR_SKIP(pager);
  std::optional<Region> region = pager.map(words(64)).value();
  std::byte* hole = region->data() + 16 * kPage;
  ASSERT_EQ(::munmap(hole, 16 * kPage), 0);
  void* other = ::mmap(hole, 8 * kPage, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
  ASSERT_EQ(other, hole);
  std::memset(other, 0x77, 8 * kPage);
  region.reset();
  EXPECT_EQ(hole[5], std::byte{0x77});
  unsigned char resident;
  EXPECT_LT(::mincore(hole - kPage, kPage, &resident), 0);  // the rest of the region is unmapped
  EXPECT_LT(::mincore(hole + 16 * kPage, kPage, &resident), 0);
  ::munmap(other, 8 * kPage);
}

TEST(Pager, ARegionMappedWhereAnotherWasUnmappedShowsItsOwnBytes) {
  PAGER_OR_SKIP(pager);
  for (int round = 0; round < 50; ++round) {
    const Region first = pager.map(words(64)).value();
    std::optional<Region> second;
    std::jthread unmapping([&] { ::munmap(first.data(), 32 * kPage); });
    second = pager.map(words(64), {.offset = StoreOffset(32 * kPage)}).value();
    unmapping.join();
    for (std::size_t page = 0; page < 32; page += 5)
      ASSERT_TRUE(shows(second->data() + page * kPage, 32 + page)) << round;
  }
}

TEST(Pager, RegionsAndPagerEndInAnyOrder) {
  for (int order = 0; order < 4; ++order) {
    Result<Pager> made = Pager::create();
    if (!made) GTEST_SKIP() << "needs a userfaultfd: " << made.error().text();
    std::optional<Pager> pager = std::move(*made);
    std::optional<Region> a = pager->map(words(16)).value();
    std::optional<Region> b = pager->map(words(16)).value();
    EXPECT_TRUE(shows(a->data() + kPage, 1));
    if (order == 0) pager.reset();
    if (order == 1) a.reset();
    if (order == 2) b.reset();
    if (order == 3) pager.reset(), a.reset();
    EXPECT_TRUE(b ? shows(b->data() + 7 * kPage, 7) : shows(a->data() + 7 * kPage, 7));
  }
}

TEST(Pager, ItEndsWhileAStoreIsStillReading) {
  auto store = words(64);
  {
    Result<Pager> pager = Pager::create();
    if (!pager) GTEST_SKIP() << "needs a userfaultfd: " << pager.error().text();
    std::optional<Region> region = pager->map(store).value();
    store->hold();
    // Its answer comes when nobody wants it any more; the reader goes on with what is there without a pager.
    std::jthread reader([memory = region->data()] { (void)::madvise(memory, kPage, MADV_POPULATE_READ); });
    store->wait_for_readers(1);
    region.reset();
  }
  store->let_go();
}

TEST(Pager, PagesThatTheStoreCannotGiveRaiseSigbusAndNoOthers) {
  PAGER_OR_SKIP(pager);
  auto store = words(64);
  store->fail_page(13);
  store->fail_page(40);
  const Region region = pager.map(store).value();
  for (std::size_t page = 0; page < 64; ++page) {
    std::byte* at = region.data() + page * kPage;
    if (page == 13 || page == 40) {
      EXPECT_TRUE(raises_bus_error(at)) << page;
    } else {
      EXPECT_TRUE(shows(at, page));
    }
  }
  EXPECT_EQ(counted(pager, &PagerStatus::pages_poisoned, 2), 2u);
}

TEST(Pager, AStoreThatIsStuckDelaysNoOther) {
  PAGER_OR_SKIP(pager);
  auto stuck = words(1024);
  const Region slow = pager.map(stuck).value();
  const Region quick = pager.map(words(256)).value();
  stuck->hold();
  std::vector<std::jthread> readers;
  for (std::size_t i = 0; i < 40; ++i)
    readers.emplace_back([&, i] { (void)*const_cast<volatile std::byte*>(slow.data() + i * 16 * kPage); });
  stuck->wait_for_readers(8);
  for (std::size_t page = 0; page < 256; ++page) EXPECT_TRUE(shows(quick.data() + page * kPage, page));
  stuck->let_go();
  readers.clear();
  for (std::size_t i = 0; i < 40; ++i) EXPECT_TRUE(shows(slow.data() + i * 16 * kPage, i * 16));
}

TEST(Pager, HugePagesShowTheStoresBytes) {
  const test::HugePages pool(2);
  if (!pool.lacking().empty()) GTEST_SKIP() << pool.lacking();
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(1024), {.huge_pages = true}).value();
  for (std::size_t page = 0; page < 1024; page += 97) EXPECT_TRUE(shows(region.data() + page * kPage, page));
  ASSERT_EQ(::madvise(region.data(), 2u << 20, MADV_DONTNEED), 0);
  EXPECT_TRUE(is_zero(region.data() + 5 * kPage));
  EXPECT_TRUE(shows(region.data() + 600 * kPage, 600));
}

TEST(Pager, ATebibyteThatIsHardlyTouchedCostsHardlyAnyMemory) {
  PAGER_OR_SKIP(pager);
  Result<Region> region = pager.map(make_zero_store(ByteCount(1ull << 40)));
  if (!region) GTEST_SKIP() << "needs a tebibyte of address space: " << region.error().text();
  const auto memory_bytes = [] {
    std::ifstream statm("/proc/self/statm");
    std::uint64_t total = 0;
    std::uint64_t resident = 0;
    statm >> total >> resident;
    return resident * kPage;
  };
  const std::uint64_t before = memory_bytes();
  for (std::uint64_t i = 0; i < 64; ++i) EXPECT_TRUE(is_zero(region->data() + i * (1ull << 34)));
  // Of each place: 16 pages of zeros (one page of the machine), a page of states, page tables.
  EXPECT_LT(memory_bytes() - before, 4u << 20);
  EXPECT_EQ(counted(pager, &PagerStatus::pages_zeroed, 1024), 1024u);
}

TEST(Pager, AThreadUnderSignalsInASystemCallGetsItsPage) {
  PAGER_OR_SKIP(pager);
  auto store = words(16);
  const Region region = pager.map(store).value();
  store->hold();
  struct sigaction before;
  struct sigaction action{};
  action.sa_handler = [](int) {};
  action.sa_flags = SA_RESTART;
  ::sigaction(SIGUSR1, &action, &before);
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  std::atomic<bool> written{false};
  std::jthread writer([&] {
    EXPECT_EQ(::write(ends[1], region.data() + 3 * kPage, kPage), static_cast<ssize_t>(kPage));
    written = true;
  });
  store->wait_for_readers(1);
  const std::uint64_t faults_at_first = pager.status().faults;
  for (int i = 0; i < 2000 || pager.status().faults < faults_at_first + 100; ++i) {
    ::pthread_kill(writer.native_handle(), SIGUSR1);
    std::this_thread::yield();
  }
  EXPECT_FALSE(written);
  store->let_go();
  writer.join();
  std::array<std::byte, kPage> page;
  ASSERT_EQ(::read(ends[0], page.data(), kPage), static_cast<ssize_t>(kPage));
  EXPECT_TRUE(shows(page.data(), 3));
  EXPECT_EQ(counted(pager, &PagerStatus::pages_copied, 16), 16u);
  ::sigaction(SIGUSR1, &before, nullptr);
  ::close(ends[0]);
  ::close(ends[1]);
}

TEST(Pager, ItsThreadsLeaveSignalsToTheProgram) {
  const auto threads = [] {
    std::set<std::string> ids;
    for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task"))
      ids.insert(entry.path().filename());
    return ids;
  };
  const std::set<std::string> before = threads();
  PAGER_OR_SKIP(pager);
  const Region region = pager.map(words(16)).value();
  int checked = 0;
  for (const std::string& id : threads()) {
    if (before.contains(id)) continue;
    std::ifstream status("/proc/self/task/" + id + "/status");
    for (std::string line; std::getline(status, line);) {
      if (!line.starts_with("SigBlk:")) continue;
      EXPECT_NE(std::stoull(line.substr(7), nullptr, 16) >> (SIGUSR1 - 1) & 1, 0u) << id;
      ++checked;
    }
  }
  EXPECT_GE(checked, 2);  // the handler, and a reader of the store
}

TEST(Pager, AProgramThatLocksItsMemorySeesTheStoresBytes) {
  PAGER_OR_SKIP(pager);
  if (::mlockall(MCL_FUTURE) != 0) GTEST_SKIP() << "needs the right to lock memory (RLIMIT_MEMLOCK)";
  {
    Result<Region> region = pager.map(words(16));
    ::munlockall();
    ASSERT_TRUE(region) << region.error().text();
    for (std::size_t page = 0; page < 16; ++page) EXPECT_TRUE(shows(region->data() + page * kPage, page));
  }
}

}  // namespace
}  // namespace uffdkit
