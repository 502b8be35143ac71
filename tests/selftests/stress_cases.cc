// uffd-stress: memory that bounces between two areas while threads take locks in its pages and count there.
//
// In each bounce the pages of one area are copied to the other, which is empty: those that threads wait for
// by a handler, all in turn by a background copier, which also protects what is there when it is half
// through. A page holds a lock and a counter; what the counter must be is known elsewhere. A page that is
// lost, copied twice, or seen half copied shows in it.
#include <atomic>
#include <cerrno>
#include <cstring>
#include <random>
#include <variant>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

constexpr int kBounces = 8;
constexpr int kLockers = 2;
constexpr int kRounds = 100;  // of each locker in each bounce

// How a bounce is: as the kernel's test draws it from the bounce's number.
constexpr int kRandom = 1;  // pages at random, not one after the other
constexpr int kRacing = 2;  // all lockers begin with the same page
constexpr int kVerify = 4;  // all counters are looked at in the end

// In a page: a lock, which is free when a page is at rest, and the counter.
constexpr ByteCount kCounter(8);

class Stress {
 public:
  explicit Stress(Case& test)
      : test_(test), source_(test.area()), area_(test.area()), counts_(source_.pages) {
    const bool anonymous = test.type() == MemoryType::anon;
    uffd_.emplace(test.uffd(anonymous ? abi::kFeatureWpUnpopulated : abi::kFeatureWpHugetlbfsShmem));
    // By COPY, because a write would leave a page in the file of a private mapping, and none of its pages
    // would ever be missing again.
    EXPECT_TRUE(uffd_->register_range(source_.range(), kMissing));
    for (std::size_t page = 0; page < source_.pages; ++page) {
      counts_[page] = 1;
      std::vector<std::byte> bytes = contents(page, source_.page_bytes);
      bytes[0] = std::byte{0};
      std::memcpy(&bytes[kCounter.value], &counts_[page], sizeof(std::uint32_t));
      EXPECT_EQ(uffd_->copy(source_.at(page), bytes).stop, Stop::complete);
    }
    EXPECT_TRUE(uffd_->unregister_range(source_.range()));
  }

  void bounce(int number) {
    ASSERT_TRUE(uffd_->register_range(area_.range(), kMissing | kWriteProtect));
    release(area_);
    std::vector<std::unique_ptr<Work>> works;
    for (int locker = 0; locker < kLockers; ++locker)
      works.push_back(test_.machine().start(*uffd_, area_.range(), [this, number, locker](Thread& self) {
        lock_and_count(self, number, locker);
      }));
    works.push_back(
        test_.machine().start(*uffd_, area_.range(), [this](Thread& self) { copy_in_background(self); }));
    serve(*uffd_, works, [this](const Message& message) { handle(std::get<Fault>(message)); });
    for (const auto& work : works) work->join();

    check_present_is_refused();
    EXPECT_EQ(uffd_->unprotect(area_.range()).stop, Stop::complete);
    ASSERT_TRUE(uffd_->unregister_range(area_.range()));
    for (std::size_t page = 0; page < area_.pages && (number & kVerify) != 0; ++page)
      EXPECT_EQ(count(test_.here(), page), counts_[page]) << "page " << page;
    std::swap(source_, area_);
  }

  // Every page has what it had at first, beside the counter, and nothing was counted twice or not at all.
  void check_end() {
    std::swap(source_, area_);
    std::size_t all = 0;
    for (std::size_t page = 0; page < area_.pages; ++page) {
      all += count(test_.here(), page) - 1;
      std::vector<std::byte> seen(area_.page_bytes.value);
      EXPECT_TRUE(test_.here().read(area_.at(page), seen));
      const std::vector<std::byte> expected = contents(page, area_.page_bytes);
      EXPECT_TRUE(std::equal(seen.begin() + 16, seen.end(), expected.begin() + 16)) << "page " << page;
    }
    EXPECT_EQ(all, std::size_t{kBounces * kLockers * kRounds});
  }

 private:
  std::uint32_t count(Thread& thread, std::size_t page) const {
    std::array<std::byte, sizeof(std::uint32_t)> bytes{};
    EXPECT_TRUE(thread.read(area_.at(page) + kCounter, bytes));
    return std::bit_cast<std::uint32_t>(bytes);
  }

  void lock_and_count(Thread& self, int number, int locker) {
    std::mt19937 random(static_cast<unsigned>(number * kLockers + locker));
    std::size_t page =
        (number & kRacing) != 0 ? 0 : static_cast<std::size_t>(locker) * area_.pages / kLockers;
    for (int round = 0; round < kRounds; ++round) {
      page = (number & kRandom) != 0 ? random() % area_.pages : (page + 1) % area_.pages;
      while (!self.exchange(area_.at(page), std::byte{0}, std::byte{1})) self.pause();
      const std::uint32_t seen = count(self, page);
      EXPECT_EQ(seen, counts_[page]) << "page " << page;
      counts_[page] = seen + 1;
      const auto bytes = std::bit_cast<std::array<std::byte, sizeof seen>>(seen + 1);
      EXPECT_TRUE(self.write(area_.at(page) + kCounter, bytes));
      EXPECT_TRUE(self.exchange(area_.at(page), std::byte{1}, std::byte{0}));
    }
  }

  // Pages arrive armed. Who finds that somebody else was faster wakes the page: its COPY did not.
  void copy_page(Thread& self, std::size_t page) {
    std::vector<std::byte> bytes(source_.page_bytes.value);
    EXPECT_TRUE(self.read(source_.at(page), bytes));
    const Outcome outcome = uffd_->copy(area_.at(page), bytes, Wake::yes, Protect::yes);
    if (outcome.stop == Stop::present) {
      EXPECT_TRUE(uffd_->wake(area_.page(page)));
      return;
    }
    EXPECT_EQ(outcome.stop, Stop::complete) << to_string(outcome.stop);
  }

  void copy_in_background(Thread& self) {
    for (std::size_t page = 0; page < area_.pages; ++page) {
      if (page == area_.pages / 2) {
        EXPECT_EQ(uffd_->protect(area_.range()).stop, Stop::complete);
      }
      copy_page(self, page);
      self.pause();
    }
  }

  void handle(const Fault& fault) {
    const std::size_t page = area_.page_of(fault.address);
    if (fault.kind == Fault::Kind::missing) return copy_page(test_.here(), page);
    EXPECT_EQ(fault.kind, Fault::Kind::write_protect);
    EXPECT_EQ(uffd_->unprotect(area_.page(page)).stop, Stop::complete);
  }

  void check_present_is_refused() {
    const std::vector<std::byte> bytes(area_.page_bytes.value);
    EXPECT_EQ(uffd_->copy(area_.at(0), bytes).stop, Stop::present);
    EXPECT_EQ(test_.system().last_out_field(), -EEXIST);
    EXPECT_EQ(uffd_->zero(area_.page(0)).stop, is_huge(area_.type) ? Stop::invalid : Stop::present);
  }

  void release(const Area& area) {
    EXPECT_EQ(test_.here().advise(area.range(), is_shared(area.type) ? Advice::remove : Advice::dont_need),
              0);
  }

  Case& test_;
  Area source_;
  Area area_;
  std::vector<std::atomic<std::uint32_t>> counts_;  // changed by who holds the page's lock
  std::optional<Uffd> uffd_;
};

}  // namespace

KERNEL_CASE(stress, kAllTypes) {
  Stress stress(test);
  for (int number = kBounces - 1; number >= 0 && !testing::Test::HasFailure(); --number) {
    SCOPED_TRACE("bounce " + std::to_string(number));
    stress.bounce(number);
  }
  stress.check_end();
}

}  // namespace uffdkit::selftests
