// Memory whose pages are brought by the threads that touch them; every byte that is seen is compared.
#include <uffdkit/sigbus_pager.h>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <uffdkit/faulty_store.h>
#include <uffdkit/pager.h>
#include <uffdkit/signal_safe_store.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <optional>
#include <random>
#include <thread>
#include <vector>

// Declares `name`, a SigbusPager; skips the test where this machine cannot make one.
#define SIGBUS_PAGER_OR_SKIP(name, ...)                                                                \
  ::uffdkit::Result<::uffdkit::SigbusPager> made_##name = ::uffdkit::SigbusPager::create(__VA_ARGS__); \
  if (!made_##name) GTEST_SKIP() << "needs a userfaultfd: " << made_##name.error().text();             \
  ::uffdkit::SigbusPager name = std::move(*made_##name)

namespace uffdkit {
namespace {

constexpr std::size_t kPage = 4096;

std::uint64_t word(std::uint64_t index) {
  return (index + 1) * 0x9e3779b97f4a7c15u;
}

// A store whose words are computed; one page can fail, every third group of pages can be a hole, and reads
// can be made to wait.
class WordStore final : public Store, public SignalSafeStore {
 public:
  explicit WordStore(std::size_t pages) : pages_(pages) {}

  void fail_page(std::size_t page) { failing_ = page; }
  void let_recover() { failing_ = SIZE_MAX; }
  void hold() { held_ = true; }
  void let_go() { held_ = false; }
  void wait_for_readers(int readers) const {
    while (waiting_ < readers) std::this_thread::yield();
  }
  void with_holes() { holes_ = true; }
  static bool in_hole(std::size_t page) { return page % 7 < 2; }

  ByteCount size() const noexcept override { return ByteCount(pages_ * kPage); }
  std::string name() const override { return "words"; }
  Extent extent_at(StoreOffset from) const noexcept override {
    if (!holes_) return {.zero = false, .end = StoreOffset(pages_ * kPage)};
    const std::size_t page = from.value / kPage;
    return {.zero = in_hole(page), .end = StoreOffset((page + 1) * kPage)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait) noexcept override {
    const int os_error = read_in_handler(from, to);
    if (os_error != 0) return Failure(Error("a bad page", os_error));
    return ReadStatus::done;
  }
  int read_in_handler(StoreOffset from, std::span<std::byte> to) noexcept override {
    ++waiting_;
    while (held_) ::usleep(100);
    --waiting_;
    const std::size_t failing = failing_;
    if (failing >= from.value / kPage && failing < (from.value + to.size()) / kPage) return EIO;
    for (std::size_t at = 0; at < to.size(); at += 8) {
      const std::uint64_t value = word((from.value + at) / 8);
      std::memcpy(to.data() + at, &value, sizeof value);
    }
    return 0;
  }

 private:
  const std::size_t pages_;
  std::atomic<std::size_t> failing_{SIZE_MAX};
  std::atomic<bool> held_{false};
  std::atomic<int> waiting_{0};
  bool holes_ = false;
};

std::shared_ptr<WordStore> words(std::size_t pages) {
  return std::make_shared<WordStore>(pages);
}

// Whether the page at `memory` holds the words of the store's page.
testing::AssertionResult shows(const std::byte* memory, std::size_t store_page) {
  for (std::size_t i = 0; i < kPage / 8; ++i) {
    std::uint64_t value;
    std::memcpy(&value, memory + i * 8, sizeof value);
    if (value != word(store_page * kPage / 8 + i))
      return testing::AssertionFailure() << "word " << i << " of page " << store_page;
  }
  return testing::AssertionSuccess();
}

bool is_zero(const std::byte* memory) {
  return std::all_of(memory, memory + kPage, [](std::byte byte) { return byte == std::byte{0}; });
}

bool is_there(const std::byte* page) {
  unsigned char resident = 0;
  ::mincore(const_cast<std::byte*>(page), kPage, &resident);
  return (resident & 1) != 0;
}

// A handler of the program's own, installed while it exists. It is made before the pager, and so is the one
// that signals are passed on to.
class OwnHandler {
 public:
  explicit OwnHandler(int flags = 0) {
    seen = {};
    struct sigaction action{};
    action.sa_flags = SA_SIGINFO | flags;
    ::sigaddset(&action.sa_mask, SIGUSR2);
    action.sa_sigaction = [](int, siginfo_t* info, void*) {
      ++seen.signals;
      seen.code = info->si_code;
      seen.address = info->si_addr;
      ::pthread_sigmask(SIG_BLOCK, nullptr, &seen.mask);
      if (jumps) siglongjmp(out, 1);
    };
    ::sigaction(SIGBUS, &action, &before_);
  }
  ~OwnHandler() { ::sigaction(SIGBUS, &before_, nullptr); }

  // Whether reading a byte there brings a SIGBUS here.
  static bool raises(const std::byte* at) {
    jumps = true;
    const bool raised = sigsetjmp(out, 1) != 0;
    if (!raised) (void)*const_cast<const volatile std::byte*>(at);
    jumps = false;
    return raised;
  }

  struct Seen {
    int signals = 0;
    int code = 0;
    const void* address = nullptr;
    sigset_t mask = {};
  };
  static Seen seen;

 private:
  static sigjmp_buf out;
  static bool jumps;
  struct sigaction before_;
};
OwnHandler::Seen OwnHandler::seen;
sigjmp_buf OwnHandler::out;
bool OwnHandler::jumps = false;

// A file that is mapped beyond its end, so that reading there is a SIGBUS which has nothing to do with a
// pager.
class CutFile {
 public:
  CutFile() {
    const int fd = ::memfd_create("cut", MFD_CLOEXEC);
    EXPECT_EQ(::ftruncate(fd, kPage), 0);
    memory_ = ::mmap(nullptr, kPage, PROT_READ, MAP_SHARED, fd, 0);
    EXPECT_EQ(::ftruncate(fd, 0), 0);
    ::close(fd);
  }
  ~CutFile() { ::munmap(memory_, kPage); }
  const std::byte* data() const { return static_cast<const std::byte*>(memory_); }

 private:
  void* memory_;
};

// How a child that runs `body` ends.
template <class Body>
int end_of_child(Body body) {
  const pid_t child = ::fork();
  if (child == 0) {
    // A sanitizer's own report of what kills it would be an exit.
    for (const int signal : {SIGSEGV, SIGABRT}) ::signal(signal, SIG_DFL);
    body();
    ::_exit(0);
  }
  int status = 0;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return status;
}

TEST(SigbusPager, EveryByteTouchedInAnyOrderByAnyThreadIsTheStores) {
  SIGBUS_PAGER_OR_SKIP(pager);
  constexpr std::size_t kPages = 1024;
  const SigbusRegion region = pager.map(words(kPages)).value();
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (unsigned t = 0; t < 8; ++t)
      threads.emplace_back([&, t] {
        std::vector<std::size_t> order(kPages);
        for (std::size_t i = 0; i < kPages; ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), std::mt19937(seed + t));
        for (const std::size_t page : order)
          if (!shows(region.data() + page * kPage, page)) ++wrong;
      });
  }
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(pager.status().pages_copied, kPages);
  EXPECT_EQ(pager.status().faults_failed, 0u);
}

TEST(SigbusPager, MoreThreadsThanBuffersAllGetTheirPages) {
  SIGBUS_PAGER_OR_SKIP(pager);
  auto store = words(64 * 16);
  const SigbusRegion region = pager.map(store).value();
  store->hold();
  std::atomic<int> wrong{0};
  std::vector<std::jthread> threads;
  for (std::size_t t = 0; t < 40; ++t)
    threads.emplace_back([&, t] { wrong += shows(region.data() + t * 16 * kPage, t * 16) ? 0 : 1; });
  store->wait_for_readers(16);
  store->let_go();
  threads.clear();
  EXPECT_EQ(wrong, 0);
}

TEST(SigbusPager, WhatIsWrittenStays) {
  SIGBUS_PAGER_OR_SKIP(pager);
  const SigbusRegion region = pager.map(words(64)).value();
  for (std::size_t page = 0; page < 64; page += 2) region.data()[page * kPage] = std::byte{0x5a};
  for (std::size_t page = 0; page < 64; ++page)
    if (page % 2 == 0) {
      EXPECT_EQ(region.data()[page * kPage], std::byte{0x5a});
    } else {
      EXPECT_TRUE(shows(region.data() + page * kPage, page));
    }
}

TEST(SigbusPager, HolesAreZeroAndTheirNeighboursAreNot) {
  SIGBUS_PAGER_OR_SKIP(pager);
  auto store = words(64);
  store->with_holes();
  const SigbusRegion region = pager.map(store, {.offset = StoreOffset(3 * kPage)}).value();
  for (std::size_t page = 0; page < 61; ++page) {
    const std::byte* at = region.data() + page * kPage;
    EXPECT_TRUE(WordStore::in_hole(page + 3) ? testing::AssertionResult(is_zero(at)) : shows(at, page + 3));
  }
  EXPECT_EQ(pager.status().pages_copied + pager.status().pages_zeroed, 61u);
}

TEST(SigbusPager, AFaultBringsAsManyPagesAsItIsTold) {
  SIGBUS_PAGER_OR_SKIP(pager, {.fault_around = PageCount(4)});
  const SigbusRegion region = pager.map(words(64)).value();
  EXPECT_TRUE(shows(region.data() + 5 * kPage, 5));
  for (std::size_t page = 0; page < 64; ++page)
    EXPECT_EQ(is_there(region.data() + page * kPage), page >= 4 && page < 8) << page;
}

TEST(SigbusPager, AFaultLeavesErrnoAsItWas) {
  SIGBUS_PAGER_OR_SKIP(pager);
  const SigbusRegion region = pager.map(words(16)).value();
  errno = EDOM;
  (void)*const_cast<volatile std::byte*>(region.data());
  EXPECT_EQ(errno, EDOM);
}

TEST(SigbusPager, ASystemCallGetsEfaultUntilThePagesAreBrought) {
  SIGBUS_PAGER_OR_SKIP(pager);
  const SigbusRegion region = pager.map(words(64)).value();
  const int zeros = ::open("/dev/zero", O_RDONLY | O_CLOEXEC);
  // A few bytes in the middle of one page, the whole of two, a few of the next.
  const std::span<std::byte> part = region.bytes().subspan(19 * kPage + 100, 3 * kPage);
  EXPECT_LT(::read(zeros, part.data(), part.size()), 0);
  EXPECT_EQ(errno, EFAULT);
  ASSERT_TRUE(region.bring(part));
  EXPECT_EQ(::read(zeros, part.data(), part.size()), static_cast<ssize_t>(part.size()));
  EXPECT_TRUE(shows(region.data() + 18 * kPage, 18));
  EXPECT_EQ(region.data()[20 * kPage], std::byte{0});
  EXPECT_TRUE(shows(region.data() + 23 * kPage, 23));
  ::close(zeros);
}

TEST(SigbusPager, BringingAllOfARegionLeavesWhatIsThereAlone) {
  SIGBUS_PAGER_OR_SKIP(pager);
  const SigbusRegion region = pager.map(words(5000)).value();
  region.data()[4999 * kPage] = std::byte{0x5a};
  ASSERT_TRUE(region.bring(region.bytes()));
  EXPECT_EQ(pager.status().faults, 1u);
  for (std::size_t page = 0; page < 4999; ++page) ASSERT_TRUE(shows(region.data() + page * kPage, page));
  EXPECT_EQ(region.data()[4999 * kPage], std::byte{0x5a});
  EXPECT_EQ(pager.status().pages_copied, 5000u);
  EXPECT_EQ(pager.status().faults, 1u);
}

TEST(SigbusPager, BringingReportsThePageThatTheStoreCannotGive) {
  SIGBUS_PAGER_OR_SKIP(pager);
  auto store = words(64);
  store->fail_page(21);
  const SigbusRegion region = pager.map(store).value();
  const Result<void> brought = region.bring(region.bytes());
  ASSERT_FALSE(brought);
  EXPECT_EQ(brought.error().os_error(), EIO);
  EXPECT_NE(brought.error().message().find("words at offset 86016"), std::string::npos)
      << brought.error().text();
  EXPECT_TRUE(shows(region.data() + 20 * kPage, 20));
}

TEST(SigbusPager, WhatIsNotInTheRegionCanNeitherBeBroughtNorDiscarded) {
  SIGBUS_PAGER_OR_SKIP(pager);
  const SigbusRegion region = pager.map(words(16)).value();
  std::byte* data = region.data();
  EXPECT_FALSE(region.bring({data - 1, 2}));
  EXPECT_FALSE(region.bring({data + 15 * kPage, kPage + 1}));
  EXPECT_FALSE(region.discard({data + 16 * kPage, kPage}));
  EXPECT_FALSE(region.discard({data + 1, kPage}));
  EXPECT_FALSE(region.discard({data, kPage - 1}));
  EXPECT_TRUE(shows(data, 0));
}

TEST(SigbusPager, DiscardedPagesReadAsZeroWhetherTheyWereThereOrNot) {
  SIGBUS_PAGER_OR_SKIP(pager);
  const SigbusRegion region = pager.map(words(256)).value();
  EXPECT_TRUE(shows(region.data() + 70 * kPage, 70));  // brings 64 to 79
  ASSERT_TRUE(region.discard(region.bytes().subspan(60 * kPage, 80 * kPage)));
  for (std::size_t page = 0; page < 256; ++page) {
    const std::byte* at = region.data() + page * kPage;
    EXPECT_TRUE(page >= 60 && page < 140 ? testing::AssertionResult(is_zero(at)) : shows(at, page)) << page;
  }
}

TEST(SigbusPager, APageThatIsBeingReadWhenItIsDiscardedReadsAsZero) {
  SIGBUS_PAGER_OR_SKIP(pager);
  auto store = words(64);
  const SigbusRegion region = pager.map(store).value();
  store->hold();
  std::jthread reader([&] { (void)*const_cast<volatile std::byte*>(region.data() + 5 * kPage); });
  store->wait_for_readers(1);
  std::atomic<bool> discarded{false};
  std::jthread discarder([&] {
    EXPECT_TRUE(region.discard(region.bytes().subspan(4 * kPage, 4 * kPage)));
    discarded = true;
  });
  // Its bits are set at once; then it must wait for the read.
  ASSERT_TRUE(region.discard(region.bytes().subspan(32 * kPage, kPage)));
  EXPECT_FALSE(discarded);
  store->let_go();
  reader.join();
  discarder.join();
  for (std::size_t page = 0; page < 16; ++page) {
    const std::byte* at = region.data() + page * kPage;
    EXPECT_TRUE(page >= 4 && page < 8 ? testing::AssertionResult(is_zero(at)) : shows(at, page)) << page;
  }
}

TEST(SigbusPager, PagesDiscardedAmongReadersAreNeverTheStoresAgain) {
  SIGBUS_PAGER_OR_SKIP(pager);
  constexpr std::size_t kPages = 512;
  const SigbusRegion region = pager.map(words(kPages)).value();
  std::array<std::atomic<bool>, kPages> given_back{};
  std::atomic<int> wrong{0};
  {
    std::vector<std::jthread> threads;
    for (unsigned t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        std::mt19937 random(t);
        for (int i = 0; i < 5000; ++i) {
          const std::size_t page = random() % kPages;
          const bool must_be_zero = given_back[page];
          std::uint64_t seen;
          std::memcpy(&seen, region.data() + page * kPage, sizeof seen);
          if (seen != 0 && (must_be_zero || seen != word(page * kPage / 8))) ++wrong;
        }
      });
    std::mt19937 random(99);
    for (int i = 0; i < 150; ++i) {
      const std::size_t first = random() % (kPages - 3);
      ASSERT_TRUE(region.discard(region.bytes().subspan(first * kPage, 3 * kPage)));
      for (std::size_t page = first; page < first + 3; ++page) given_back[page] = true;
    }
  }
  EXPECT_EQ(wrong, 0);
  for (std::size_t page = 0; page < kPages; ++page) {
    const std::byte* at = region.data() + page * kPage;
    EXPECT_TRUE(given_back[page] ? testing::AssertionResult(is_zero(at)) : shows(at, page)) << page;
  }
}

TEST(SigbusPager, ASigbusOfAFileThatWasCutShortReachesThePreviousHandler) {
  const OwnHandler own;
  SIGBUS_PAGER_OR_SKIP(pager);
  const SigbusRegion region = pager.map(words(16)).value();
  const CutFile file;
  EXPECT_TRUE(OwnHandler::raises(file.data() + 7));
  EXPECT_EQ(OwnHandler::seen.signals, 1);
  EXPECT_EQ(OwnHandler::seen.address, file.data() + 7);
  EXPECT_TRUE(shows(region.data(), 0));
  EXPECT_EQ(OwnHandler::seen.signals, 1);
}

TEST(SigbusPager, ASigbusThatIsSentReachesThePreviousHandlerWithItsSignalMask) {
  const OwnHandler own;
  SIGBUS_PAGER_OR_SKIP(pager);
  ::raise(SIGBUS);
  EXPECT_EQ(OwnHandler::seen.signals, 1);
  EXPECT_EQ(OwnHandler::seen.code, SI_TKILL);
  EXPECT_EQ(::sigismember(&OwnHandler::seen.mask, SIGBUS), 1);
  EXPECT_EQ(::sigismember(&OwnHandler::seen.mask, SIGUSR2), 1);
  EXPECT_EQ(::sigismember(&OwnHandler::seen.mask, SIGUSR1), 0);
}

TEST(SigbusPager, APageThatTheStoreCannotGiveReachesThePreviousHandlerAndNoOtherDoes) {
  const OwnHandler own;
  SIGBUS_PAGER_OR_SKIP(pager);
  auto store = words(64);
  store->fail_page(21);
  const SigbusRegion region = pager.map(store).value();
  for (std::size_t page = 0; page < 64; ++page) {
    const std::byte* at = region.data() + page * kPage;
    if (page != 21) {
      EXPECT_TRUE(shows(at, page));
    }
  }
  EXPECT_EQ(OwnHandler::seen.signals, 0);
  const std::byte* bad = region.data() + 21 * kPage + 9;
  for (int times = 1; times <= 40; ++times) {  // more often than there are buffers: none may be lost
    EXPECT_TRUE(OwnHandler::raises(bad));
    EXPECT_EQ(OwnHandler::seen.signals, times);
  }
  EXPECT_EQ(OwnHandler::seen.address, bad);
  EXPECT_EQ(pager.status().faults_failed, 40u);
  store->let_recover();
  EXPECT_TRUE(shows(region.data() + 21 * kPage, 21));
}

TEST(SigbusPager, AFileCutShortConcernsOnlyThePagesBeyondItsEnd) {
  const OwnHandler own;
  SIGBUS_PAGER_OR_SKIP(pager);
  const int fd = ::memfd_create("image", MFD_CLOEXEC);
  const std::vector<std::byte> bytes(16 * kPage, std::byte{0x21});
  ASSERT_EQ(::write(fd, bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  const SigbusRegion region = pager.map(open_file_store(fd, "image").value()).value();
  ASSERT_EQ(::ftruncate(fd, 10 * kPage), 0);
  EXPECT_TRUE(OwnHandler::raises(region.data() + 12 * kPage));
  EXPECT_EQ(region.data()[9 * kPage], std::byte{0x21});
  ::close(fd);
}

TEST(SigbusPager, WithoutAPreviousHandlerAForeignSigbusEndsTheProcess) {
  if (const Result<SigbusPager> any = SigbusPager::create(); !any)
    GTEST_SKIP() << "needs a userfaultfd: " << any.error().text();
  const CutFile file;
  const auto end_with_pager = [&](auto body) {
    return end_of_child([&] {
      ::signal(SIGBUS, SIG_DFL);
      const Result<SigbusPager> pager = SigbusPager::create();
      if (pager) body();
    });
  };
  const int touching = end_with_pager([&] { (void)*const_cast<const volatile std::byte*>(file.data()); });
  EXPECT_TRUE(WIFSIGNALED(touching) && WTERMSIG(touching) == SIGBUS) << touching;
  const int sent = end_with_pager([] { ::raise(SIGBUS); });
  EXPECT_TRUE(WIFSIGNALED(sent) && WTERMSIG(sent) == SIGBUS) << sent;
}

TEST(SigbusPager, AChildHasNoPartOfTheRegionsAndMapsItsOwn) {
  SIGBUS_PAGER_OR_SKIP(pager);
  SigbusRegion region = pager.map(words(16)).value();
  std::optional<SigbusRegion> lost = pager.map(words(16)).value();
  EXPECT_TRUE(shows(region.data(), 0));
  EXPECT_FALSE(is_there(lost->data()));
  const int status = end_of_child([&] {
    if (pager.map(words(16)) || region.bring(region.bytes()) || region.discard(region.bytes())) ::_exit(1);
    // What the child maps where a region of its parent was stays when the region's handle goes.
    void* place = ::mmap(lost->data(), kPage, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
    if (place == MAP_FAILED) ::_exit(2);
    lost.reset();
    *static_cast<volatile char*>(place) = 1;
    auto own = SigbusPager::create();
    if (!own) ::_exit(3);
    auto mapped = own->map(words(32));
    if (!mapped || !shows(mapped->data() + 17 * kPage, 17)) ::_exit(4);
  });
  EXPECT_EQ(status, 0) << WEXITSTATUS(status);
  const int touching = end_of_child([&] { (void)*const_cast<volatile std::byte*>(region.data()); });
  EXPECT_TRUE(WIFSIGNALED(touching) && WTERMSIG(touching) == SIGSEGV) << touching;
  EXPECT_TRUE(shows(lost->data() + kPage, 1));
}

TEST(SigbusPager, SeveralPagersAndRegionsEndInAnyOrder) {
  for (int order = 0; order < 6; ++order) {
    Result<SigbusPager> first = SigbusPager::create();
    Result<SigbusPager> second = SigbusPager::create();
    if (!first || !second) GTEST_SKIP() << "needs a userfaultfd";
    std::array<std::optional<SigbusPager>, 2> pagers = {std::move(*first), std::move(*second)};
    std::array<std::optional<SigbusRegion>, 4> regions;
    for (std::size_t i = 0; i < 4; ++i)
      regions[i] = pagers[i % 2]->map(words(128), {.offset = StoreOffset(i * 16 * kPage)}).value();
    if (order % 3 == 0) pagers[0].reset();
    if (order % 3 == 1) pagers[1].reset(), pagers[0].reset();
    regions[static_cast<std::size_t>(order) % 4].reset();
    for (std::size_t i = 0; i < 4; ++i)
      if (regions[i]) {
        EXPECT_TRUE(shows(regions[i]->data() + 40 * kPage, i * 16 + 40));
      }
  }
}

TEST(SigbusPager, RegionsComeAndGoWhileOthersFault) {
  SIGBUS_PAGER_OR_SKIP(pager);
  std::atomic<int> wrong{0};
  std::vector<std::jthread> threads;
  for (unsigned t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      for (std::size_t round = 0; round < 300; ++round) {
        const std::size_t first = (round * 16 + t) % 128;
        const SigbusRegion region = pager.map(words(256), {.offset = StoreOffset(first * kPage)}).value();
        for (std::size_t page = 0; page < 64; page += 13)
          if (!shows(region.data() + page * kPage, first + page)) ++wrong;
      }
    });
  threads.clear();
  EXPECT_EQ(wrong, 0);
}

TEST(SigbusPager, TheLastOneToGoPutsThePreviousHandlerBack) {
  const OwnHandler own;
  struct sigaction before;
  ::sigaction(SIGBUS, nullptr, &before);
  {
    SIGBUS_PAGER_OR_SKIP(pager);
    const SigbusRegion region = pager.map(words(16)).value();
    struct sigaction during;
    ::sigaction(SIGBUS, nullptr, &during);
    EXPECT_NE(before.sa_sigaction, during.sa_sigaction);
  }
  struct sigaction after;
  ::sigaction(SIGBUS, nullptr, &after);
  EXPECT_EQ(before.sa_sigaction, after.sa_sigaction);
}

TEST(SigbusPager, APagerIsRefusedWhereAHandlerThatCameLaterIsInTheWay) {
  SIGBUS_PAGER_OR_SKIP(pager);
  {
    const OwnHandler later;
    const Result<SigbusPager> refused = SigbusPager::create();
    ASSERT_FALSE(refused);
    EXPECT_NE(refused.error().remedy().find("before the first SigbusPager"), std::string::npos);
  }
  EXPECT_TRUE(SigbusPager::create());
}

TEST(SigbusPager, AStoreThatASignalHandlerCannotReadIsRefused) {
  SIGBUS_PAGER_OR_SKIP(pager);
  const Result<SigbusRegion> region = pager.map(make_faulty_store(words(16), {StoreFault{}}));
  ASSERT_FALSE(region);
  EXPECT_NE(region.error().message().find("words cannot be read inside a signal handler"), std::string::npos);
}

TEST(SigbusPager, OptionsThatMakeNoSenseAreRefused) {
  SIGBUS_PAGER_OR_SKIP(pager);
  EXPECT_FALSE(SigbusPager::create({.fault_around = PageCount(3)}));
  EXPECT_FALSE(SigbusPager::create({.fault_around = PageCount(1024)}));
  EXPECT_FALSE(pager.map(words(16), {.offset = StoreOffset(1)}));
  EXPECT_FALSE(pager.map(words(16), {.offset = StoreOffset(8 * kPage), .length = ByteCount(9 * kPage)}));
}

TEST(SigbusPager, OneRegionTooManyIsRefusedAndThereIsRoomAgainWhenAnotherGoes) {
  SIGBUS_PAGER_OR_SKIP(pager);
  std::vector<SigbusRegion> regions;
  for (;;) {
    Result<SigbusRegion> region = pager.map(make_zero_store(ByteCount(kPage)));
    if (!region) {
      EXPECT_NE(region.error().message().find("512 regions"), std::string::npos) << region.error().text();
      break;
    }
    regions.push_back(std::move(*region));
  }
  EXPECT_EQ(regions.size(), 512u);
  regions.erase(regions.begin() + 100);
  const Result<SigbusRegion> region = pager.map(words(16));
  ASSERT_TRUE(region);
  EXPECT_TRUE(shows(region->data() + kPage, 1));
}

TEST(SigbusPager, AThreadThatIsCancelledWhileItBringsAPageLeavesItsBufferToOthers) {
  SIGBUS_PAGER_OR_SKIP(pager);
  auto store = words(1024);
  const SigbusRegion region = pager.map(store).value();
  for (int i = 0; i < 20; ++i) {  // more than there are buffers
    store->hold();
    std::thread reader([&] {
      (void)*const_cast<volatile std::byte*>(region.data() + static_cast<std::size_t>(i) * 16 * kPage);
    });
    store->wait_for_readers(1);
    ::pthread_cancel(reader.native_handle());
    store->let_go();
    reader.join();
  }
  EXPECT_TRUE(shows(region.data() + 1000 * kPage, 1000));
}

TEST(SigbusPager, StandsBesideAPagerWithAThread) {
  SIGBUS_PAGER_OR_SKIP(pager);
  Result<Pager> other = Pager::create({.kernel_faults = false});
  if (!other) GTEST_SKIP() << "needs a userfaultfd: " << other.error().text();
  const SigbusRegion region = pager.map(words(64)).value();
  const Region other_region = other->map(words(64)).value();
  for (std::size_t page = 0; page < 64; ++page) {
    EXPECT_TRUE(shows(region.data() + page * kPage, page));
    EXPECT_TRUE(shows(other_region.data() + page * kPage, page));
  }
}

}  // namespace
}  // namespace uffdkit
