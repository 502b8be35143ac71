// Sessions driven step by step, against a userfaultfd that does what the test says and a clock that the test
// moves.
#include "engine/session.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "store/read_ahead.h"

namespace uffdkit {
namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kBase = 0x7000'0000'0000;
constexpr std::uint64_t kPages = 4096;  // of the store
constexpr std::int64_t kMillisecond = 1'000'000;

AddressRange pages(std::uint64_t first, std::uint64_t count = 1) {
  return {Address(kBase + first * kPage), ByteCount(count * kPage)};
}

// The first byte of a page of the store; never 0.
std::byte tag_of(std::uint64_t store_page) {
  return static_cast<std::byte>(store_page % 251 + 1);
}

// A userfaultfd and the memory behind it. It keeps the first byte of each page that is present.
class FakeKernel final : public SystemCalls {
 public:
  struct Call {
    unsigned long request;
    AddressRange range;
  };

  std::map<std::uint64_t, std::byte> present;  // by page address
  std::set<std::uint64_t> poisoned;
  std::deque<abi::Msg> messages;
  std::vector<Call> calls;
  bool changing = false;
  bool gone = false;
  int read_error = 0;          // an errno for read(2)
  bool woke_all = false;       // whatever lies where
  std::uint64_t boundary = 0;  // one mapping ends here, and another begins
  AddressRange mapping{};      // registered; all that a CONTINUE of several pages can be asked for
  std::function<int(const Call&)> refuse = [](auto&) { return 0; };  // an errno for a call
  std::set<std::uint64_t> unmapped;                                  // page addresses

  std::size_t count(unsigned long request) const {
    return static_cast<std::size_t>(
        std::count_if(calls.begin(), calls.end(), [&](const Call& call) { return call.request == request; }));
  }
  bool woke(AddressRange range) const {
    return std::any_of(calls.begin(), calls.end(), [&](const Call& call) {
      return call.request == abi::kIoctlWake && call.range.contains(range.start) &&
             call.range.end() >= range.end();
    });
  }

  void fault(AddressRange page, std::uint64_t flags = 0) {
    abi::Msg message{};
    message.event = abi::kEventPagefault;
    message.arg.pagefault = {.flags = flags, .address = page.start.value, .ptid = 0};
    messages.push_back(message);
  }
  void removed(AddressRange range, std::uint8_t event = abi::kEventRemove) {
    abi::Msg message{};
    message.event = event;
    message.arg.remove = {.start = range.start.value, .end = range.end().value};
    messages.push_back(message);
    std::erase_if(present, [&](const auto& page) { return range.contains(Address(page.first)); });
  }
  // Whether it was unregistered, in one piece.
  bool unregistered(AddressRange range) const {
    return std::any_of(calls.begin(), calls.end(), [&](const Call& call) {
      return call.request == abi::kIoctlUnregister && call.range.contains(range.start) &&
             call.range.end() >= range.end();
    });
  }
  void unmap(AddressRange range) { removed(range, abi::kEventUnmap); }
  void moved(AddressRange from, Address to) {
    abi::Msg message{};
    message.event = abi::kEventRemap;
    message.arg.remap = {.from = from.start.value, .to = to.value, .len = from.length.value};
    messages.push_back(message);
  }

  int ioctl(int, unsigned long request, std::uintptr_t argument) override {
    const auto* head = reinterpret_cast<const abi::RangeArgs*>(argument);
    const bool copies = request == abi::kIoctlCopy;
    const auto* copy = reinterpret_cast<const abi::CopyArgs*>(argument);
    const Call call{request, {Address(head->start), ByteCount(copies ? copy->len : head->len)}};
    const bool probe = call.range.start.value < kBase;
    if (!probe) calls.push_back(call);
    if (probe && request == abi::kIoctlWake && call.range.end() >= pages(kPages).end()) woke_all = true;
    if (request == abi::kIoctlWake || request == abi::kIoctlRegister) return 0;
    if (request == abi::kIoctlUnregister) return gone ? -ENOMEM : 0;
    std::int64_t done = 0;
    int error = changing ? EAGAIN : gone ? ESRCH : probe ? ENOENT : refuse(call);
    if (error == 0 && request == abi::kIoctlContinue && call.range.length.value > kPage)
      error = call.range.start >= mapping.start && call.range.end() <= mapping.end() ? EINVAL : ENOENT;
    if (error == 0 && boundary != 0 && call.range.contains(Address(boundary)) &&
        call.range.start.value != boundary)
      error = ENOENT;
    if (error == 0 && request != abi::kIoctlWriteprotect)
      error =
          fill(request, call.range, copies ? reinterpret_cast<const std::byte*>(copy->src) : nullptr, done);
    if (request != abi::kIoctlWriteprotect) {
      std::int64_t& out = copies ? reinterpret_cast<abi::CopyArgs*>(argument)->done
                                 : reinterpret_cast<abi::FillArgs*>(argument)->done;
      if (done > 0) {
        out = done;
        return -EAGAIN;
      }
      out = -error;
    }
    return -error;
  }
  std::ptrdiff_t read(int, void* buffer, std::size_t bytes) override {
    if (read_error != 0) return -read_error;
    if (messages.empty()) return -EAGAIN;
    const std::size_t count = std::min(bytes / sizeof(abi::Msg), messages.size());
    for (std::size_t i = 0; i < count; ++i) {
      std::memcpy(static_cast<abi::Msg*>(buffer) + i, &messages.front(), sizeof(abi::Msg));
      messages.pop_front();
    }
    return static_cast<std::ptrdiff_t>(count * sizeof(abi::Msg));
  }
  int userfaultfd(int) override { return -ENOSYS; }
  int open(const char*, int) override { return -ENOENT; }
  int poll_readable(int, int) override { return 0; }
  int get_flags(int) override { return 0; }
  int duplicate(int) override { return -EMFILE; }
  int close(int) override { return 0; }

 private:
  // The errno; `done` is set when it stops half-way.
  int fill(unsigned long request, AddressRange range, const std::byte* from, std::int64_t& done) {
    for (std::uint64_t at = 0; at < range.length.value; at += kPage) {
      const std::uint64_t page = range.start.value + at;
      const int error = unmapped.contains(page) ? ENOENT : present.contains(page) ? EEXIST : 0;
      if (error != 0) {
        done = static_cast<std::int64_t>(at);
        return error;
      }
      if (request == abi::kIoctlPoison) {
        poisoned.insert(page);
      } else {
        present[page] = from != nullptr ? from[at] : std::byte{0};
      }
    }
    return 0;
  }
};

class FakeStore : public Store {
 public:
  explicit FakeStore(std::uint64_t size_pages = kPages) : size_(size_pages * kPage) {}
  bool cached = true;
  std::set<std::uint64_t> bad;                                 // pages that cannot be read
  std::set<std::uint64_t> zeros;                               // pages full of zeros
  std::set<std::uint64_t> holes;                               // likewise, and known to be
  std::vector<std::pair<std::uint64_t, std::uint64_t>> reads;  // page, count

  ByteCount size() const noexcept override { return ByteCount(size_); }
  std::string name() const override { return "fake"; }
  Extent extent_at(StoreOffset from) const noexcept override {
    std::uint64_t page = from.value / kPage;
    const bool zero = holes.contains(page);
    while (page < size_ / kPage && holes.contains(page) == zero) ++page;
    return {.zero = zero, .end = StoreOffset(page * kPage)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    const std::uint64_t first = from.value / kPage;
    if (wait == Wait::no && !cached) return ReadStatus::would_block;
    reads.emplace_back(first, to.size() / kPage);
    for (std::size_t i = 0; i < to.size() / kPage; ++i) {
      if (bad.contains(first + i)) return Failure(Error("bad page", EIO));
      std::memset(to.data() + i * kPage,
                  zeros.contains(first + i) || holes.contains(first + i)
                      ? 0
                      : std::to_integer<int>(tag_of(first + i)),
                  kPage);
    }
    return ReadStatus::done;
  }

 private:
  const std::uint64_t size_;
};

// One whose bytes are only copied.
class CopyingStore final : public FakeStore, public ReadAhead {
 public:
  using FakeStore::FakeStore;
  std::set<std::uint64_t> told;  // pages that will be needed
  void will_need(StoreOffset from, ByteCount bytes) noexcept override {
    for (std::uint64_t at = 0; at < bytes.value; at += kPage) told.insert((from.value + at) / kPage);
  }
  bool is_only_copied() const noexcept override { return true; }
};

class FakeHost final : public SessionHost {
 public:
  std::int64_t now = 1'000 * kMillisecond;
  std::deque<std::unique_ptr<Fetch>> fetches;
  bool in_a_hurry = false;  // others wait
  bool killable = true;     // its process is known
  bool killed = false;
  bool exited = false;  // has its process
  int stops = 0;
  int continues = 0;
  std::vector<std::string> failures;
  std::vector<std::string> warnings;
  std::vector<std::string> detach_failures;
  std::vector<std::unique_ptr<ForkedSession>> children;
  bool takes_children = true;

  std::int64_t now_ns() override { return now; }
  std::span<std::byte> scratch() override { return scratch_; }
  bool gives_way() override { return in_a_hurry; }
  void start_fetch(StoreLane&, std::unique_ptr<Fetch> fetch) override { fetches.push_back(std::move(fetch)); }
  bool kill_client() override { return killed = killable && !exited; }
  bool client_has_exited() override { return !killable || exited; }
  bool stop_client() override {
    stops += killable ? 1 : 0;
    return killable;
  }
  void continue_client() override { ++continues; }
  Result<void> forked(std::unique_ptr<ForkedSession>& child) override {
    if (!takes_children) return Failure(Error("there is no place for it", ENOSPC));
    children.push_back(std::move(child));
    return {};
  }
  void detach_failed(const Error& error) override { detach_failures.push_back(error.message()); }
  void page_failed(const Error& error) override { failures.push_back(error.message()); }
  void warn(const std::string& text) override { warnings.push_back(text); }

 private:
  std::vector<std::byte> scratch_ = std::vector<std::byte>(kFetchGranulesMax * kPage);
};

class SessionTest : public testing::Test {
 protected:
  // One region: pages 0 to 1023 show the store from its start.
  explicit SessionTest(std::uint64_t around = 4, Features features = {}, OnError on_error = OnError::poison,
                       Background background = Background::off, std::shared_ptr<IoBudget> budget = nullptr,
                       bool follow_streams = false)
      : session_(Uffd::adopt(3, features, kernel_), SessionState::create("fake").value(), {},
                 {.fault_around = PageCount(around),
                  .on_error = on_error,
                  .background = background,
                  .follow_streams = follow_streams,
                  .background_budget = std::move(budget)},
                 host_) {
    add(pages(0, 1024));
  }

  void add(AddressRange memory, std::uint64_t store_page = 0) {
    const auto added = session_.add_region(memory, StoreOffset(store_page * kPage), kPage4K, lane_);
    ASSERT_TRUE(added) << added.error().message();
  }
  // Steps until there is nothing to do at once.
  Session::Next settle() {
    Session::Next next;
    for (int steps = 0; steps < 10'000; ++steps)
      if (next = session_.step(); !next.again) return next;
    ADD_FAILURE() << "it never comes to rest";
    return next;
  }
  // Reads the oldest fetch and gives it back.
  void bring() {
    ASSERT_FALSE(host_.fetches.empty());
    auto fetch = std::move(host_.fetches.front());
    host_.fetches.pop_front();
    read_fetch(*fetch);
    session_.fetched(std::move(fetch));
  }
  // The client's process ends, and its memory with it.
  void exit_client() {
    host_.exited = kernel_.gone = true;
    session_.check_target();
  }
  // Goes through time until the session wants nothing more.
  void run_out(int times = 20'000) {
    for (Session::Next next = settle(); next.wake_at_ns != 0 && !session_.end() && times > 0; --times) {
      host_.now = std::max(host_.now, next.wake_at_ns);
      next = settle();
    }
    EXPECT_GT(times, 0) << "it is never done";
  }
  std::optional<std::byte> at(std::uint64_t page) const {
    const auto found = kernel_.present.find(pages(page).start.value);
    return found == kernel_.present.end() ? std::nullopt : std::optional(found->second);
  }
  std::uint64_t counter(const std::atomic<std::uint64_t>& value) const { return value.load(); }
  const SessionCounters& counters() const { return session_.counters(); }
  const SessionWaiting& waiting() const { return session_.waiting(); }

  FakeKernel kernel_;
  FakeHost host_;
  std::shared_ptr<FakeStore> store_ = std::make_shared<FakeStore>();
  std::shared_ptr<StoreLane> lane_ = StoreLane::create(store_).value();
  Session session_;
};

// ---- faults -----------------------------------------------------------------------------------------------

TEST_F(SessionTest, AFaultBringsItsWindow) {
  kernel_.fault(pages(6));
  settle();
  for (std::uint64_t page = 0; page < 12; ++page)
    EXPECT_EQ(at(page), page >= 4 && page < 8 ? std::optional(tag_of(page)) : std::nullopt) << page;
  EXPECT_EQ(kernel_.count(abi::kIoctlCopy), 1u);
  EXPECT_EQ(counter(counters().faults), 1u);
  EXPECT_EQ(counter(counters().pages_copied), 4u);
  EXPECT_EQ(counter(counters().bytes_read), 4 * kPage);
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(SessionTest, FaultsAreServedOneAStepWhileOthersWait) {
  host_.in_a_hurry = true;
  for (const std::uint64_t page : {0ul, 16ul, 32ul}) kernel_.fault(pages(page));
  for (std::size_t step = 1; step <= 3; ++step) {
    EXPECT_EQ(session_.step().again, step < 3);
    EXPECT_EQ(kernel_.count(abi::kIoctlCopy), step);
  }
  EXPECT_EQ(at(32), tag_of(32));
}

TEST_F(SessionTest, MessagesAreReadOneInboxFullAStepWhileOthersWait) {
  host_.in_a_hurry = true;
  for (std::size_t i = 0; i < 2 * kInboxMessages + 1; ++i) kernel_.removed(pages(i));
  EXPECT_TRUE(session_.step().again);
  EXPECT_EQ(kernel_.messages.size(), kInboxMessages + 1);
  EXPECT_TRUE(session_.step().again);
  EXPECT_FALSE(session_.step().again);
  EXPECT_TRUE(kernel_.messages.empty());
}

// ---- memory of a file -------------------------------------------------------------------------------------

// Its pages are elsewhere in the client, or nowhere yet: what UFFDIO_CONTINUE says of memory that is no
// file's.
TEST_F(SessionTest, WhatAMoveLeavesBehindOfMemoryOfItsOwnIsZero) {
  kernel_.refuse = [](const auto& call) { return call.request == abi::kIoctlContinue ? EINVAL : 0; };
  kernel_.moved(pages(0, 8), pages(2000).start);
  kernel_.fault(pages(3));
  settle();
  EXPECT_EQ(at(3), std::byte{0});
  EXPECT_EQ(at(2003), std::nullopt);
}

TEST_F(SessionTest, WhatAMoveLeavesBehindOfAFileIsBroughtToWhereItIsRightInAnyCase) {
  kernel_.refuse = [&](const auto& call) {
    return call.request == abi::kIoctlContinue && at(2003) == std::nullopt ? EFAULT : 0;
  };
  kernel_.moved(pages(0, 8), pages(2000).start);
  kernel_.fault(pages(3));
  settle();
  EXPECT_EQ(at(2003), tag_of(3));
  // The file shows it here as well.
  EXPECT_NE(at(3), std::nullopt);
  EXPECT_EQ(kernel_.count(abi::kIoctlZeropage), 0u);
  // From then on it is known to be the file's.
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), tag_of(6));
}

TEST_F(SessionTest, WhatAMoveLeavesBehindOfAFileWaitsForTheFetchOfThePage) {
  store_->cached = false;
  kernel_.refuse = [&](const auto& call) {
    return call.request == abi::kIoctlContinue && at(2003) == std::nullopt ? EFAULT : 0;
  };
  kernel_.moved(pages(0, 8), pages(2000).start);
  kernel_.fault(pages(2003));
  kernel_.fault(pages(3));
  settle();
  ASSERT_EQ(host_.fetches.size(), 1u);
  bring();
  settle();
  EXPECT_EQ(at(2003), tag_of(3));
  EXPECT_NE(at(3), std::nullopt);
  EXPECT_EQ(kernel_.count(abi::kIoctlZeropage), 0u);
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(SessionTest, WhatAMoveLeavesBehindOfAPrivateMappingOfAFileIsZeroOnceThePageIsElsewhere) {
  kernel_.refuse = [](const auto& call) { return call.request == abi::kIoctlContinue ? EFAULT : 0; };
  kernel_.moved(pages(0, 8), pages(2000).start);
  kernel_.fault(pages(2003));
  settle();
  kernel_.fault(pages(3));
  settle();
  EXPECT_EQ(at(3), std::byte{0});
}

TEST_F(SessionTest, WhatAMoveLeavesBehindIsZeroWhenNobodyCanTellAnyMoreWhatItWas) {
  kernel_.refuse = [](const auto& call) { return call.request == abi::kIoctlContinue ? EFAULT : 0; };
  kernel_.moved(pages(0, 8), pages(2000).start);
  kernel_.unmap(pages(2000, 8));
  kernel_.fault(pages(3));
  run_out();
  EXPECT_EQ(at(3), std::byte{0});
}

TEST_F(SessionTest, WhatAMoveLeavesBehindOfAFileIsTheImageWhenAFetchCouldPutItNowhereElse) {
  store_->cached = false;
  kernel_.refuse = [](const auto& call) { return call.request == abi::kIoctlContinue ? EFAULT : 0; };
  kernel_.moved(pages(0, 8), pages(2000).start);
  // Without a word.
  for (std::uint64_t page = 2000; page < 2008; ++page) kernel_.unmapped.insert(pages(page).start.value);
  kernel_.fault(pages(3));
  settle();
  bring();
  settle();
  for (Session::Next next = settle(); host_.fetches.empty() && next.wake_at_ns != 0; next = settle())
    host_.now = next.wake_at_ns;
  bring();
  settle();
  EXPECT_EQ(at(3), tag_of(3));
}

TEST_F(SessionTest, ASecondMappingOfAFileShowsTheSamePages) {
  kernel_.moved({pages(4).start, ByteCount(0)}, pages(3000).start);
  kernel_.fault(pages(3002));
  kernel_.fault(pages(9));
  settle();
  EXPECT_EQ(at(3002), tag_of(6));
  EXPECT_EQ(at(9), tag_of(9));
  kernel_.removed(pages(3010, 4));
  kernel_.fault(pages(15));
  settle();
  EXPECT_EQ(at(15), std::byte{0});
}

TEST_F(SessionTest, AFilesMappingThatGrowsShowsTheImageAndOtherMemoryIsZero) {
  for (const int answer : {EFAULT, EINVAL, ENOENT}) {
    kernel_.refuse = [&](const auto& call) { return call.request == abi::kIoctlContinue ? answer : 0; };
    kernel_.unmap(pages(500, 600));
    kernel_.fault(pages(600));
    settle();
    EXPECT_EQ(at(600), answer == EFAULT ? tag_of(600) : std::byte{0}) << answer;
  }
}

TEST_F(SessionTest, ZeroPagesAreMappedNotCopied) {
  store_->zeros = {4, 5, 7};
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), tag_of(6));
  EXPECT_EQ(at(5), std::byte{0});
  EXPECT_EQ(at(7), std::byte{0});
  EXPECT_EQ(counter(counters().pages_zeroed), 3u);
  EXPECT_EQ(counter(counters().pages_copied), 1u);
}

TEST_F(SessionTest, HolesAreNotRead) {
  for (std::uint64_t page = 0; page < 6; ++page) store_->holes.insert(page);
  kernel_.fault(pages(1));
  settle();
  EXPECT_EQ(at(1), std::byte{0});
  EXPECT_TRUE(store_->reads.empty());
  EXPECT_EQ(kernel_.count(abi::kIoctlCopy), 0u);
}

TEST_F(SessionTest, FaultsOfManyThreadsOnOnePageCostOneFetch) {
  store_->cached = false;
  for (int thread = 0; thread < 20; ++thread) kernel_.fault(pages(6));
  settle();
  for (int thread = 0; thread < 20; ++thread) kernel_.fault(pages(5));
  settle();
  ASSERT_EQ(host_.fetches.size(), 1u);
  bring();
  settle();
  EXPECT_EQ(at(5), tag_of(5));
  EXPECT_EQ(counter(counters().fetches), 1u);
  EXPECT_EQ(counter(counters().faults), 40u);
  EXPECT_EQ(counter(counters().faults_merged), 39u);
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(SessionTest, AThousandDuplicatesWaitAsOne) {
  store_->cached = false;
  for (int i = 0; i < 1000; ++i) {
    kernel_.fault(pages(6));
    if (i % 100 == 0) settle();
  }
  settle();
  EXPECT_EQ(counter(waiting().pending), 1u);
  EXPECT_GT(waiting().oldest_since_ns.load(), 0);
}

TEST_F(SessionTest, MoreFaultsThanAreKeptAreWokenLater) {
  add(pages(2048, 2048), 0);
  store_->cached = false;
  for (std::uint64_t page = 2048; page < 4096; ++page) kernel_.fault(pages(page));
  settle();
  EXPECT_EQ(counter(waiting().pending), 1024u);
  EXPECT_FALSE(kernel_.woke(pages(4095)));
  for (int i = 0; i < 10'000 && !host_.fetches.empty(); ++i) {
    bring();
    settle();
  }
  EXPECT_TRUE(kernel_.woke(pages(4095)));
  EXPECT_EQ(counter(waiting().pending), 0u);
  for (std::uint64_t page = 0; page < 1024; ++page) ASSERT_TRUE(at(2048 + page)) << page;
}

TEST_F(SessionTest, AFloodOfLargeRemovalsIsTakenInPartsSoThatOthersGetTheirTurn) {
  constexpr std::uint64_t kMany = 1u << 20;
  constexpr std::uint64_t kMessages = 256;
  auto large = std::make_shared<FakeStore>(kMany);
  ASSERT_TRUE(
      session_.add_region(pages(5000, kMany), StoreOffset(0), kPage4K, StoreLane::create(large).value()));
  for (std::uint64_t i = 0; i < kMessages; ++i) kernel_.removed(pages(5000, kMany));
  kernel_.fault(pages(6));
  EXPECT_TRUE(session_.step().again);
  EXPECT_LE(counter(counters().events), kMessages / 4);
  settle();
  EXPECT_EQ(counter(counters().events), kMessages);
  EXPECT_EQ(at(6), tag_of(6));
}

TEST_F(SessionTest, AStoreThatIsStuckCostsNoProcessorTimeAndHoldsUpNoOther) {
  store_->cached = false;
  auto other = std::make_shared<FakeStore>();
  ASSERT_TRUE(
      session_.add_region(pages(5000, 64), StoreOffset(0), kPage4K, StoreLane::create(other).value()));
  for (std::uint64_t page = 0; page < 1000; page += 4) kernel_.fault(pages(page));
  const Session::Next stuck = settle();
  EXPECT_FALSE(stuck.again);
  EXPECT_EQ(stuck.wake_at_ns, 0);
  kernel_.fault(pages(5001));
  settle();
  EXPECT_EQ(at(5001), tag_of(1));
  other->cached = false;
  const std::size_t before = host_.fetches.size();
  kernel_.fault(pages(5040));
  settle();
  EXPECT_EQ(host_.fetches.size(), before + 1);
  EXPECT_LE(before, 16u);
}

// ---- what the kernel answers ------------------------------------------------------------------------------

TEST_F(SessionTest, APageThatTheKernelPutsOffIsTriedOnceAStepAndAgainByTime) {
  kernel_.changing = true;
  kernel_.fault(pages(6));
  Session::Next next = session_.step();
  EXPECT_FALSE(next.again);
  EXPECT_GT(next.wake_at_ns, host_.now);
  EXPECT_EQ(kernel_.count(abi::kIoctlCopy), 1u);
  next = session_.step();
  EXPECT_EQ(kernel_.count(abi::kIoctlCopy), 1u);
  for (int i = 0; i < 50; ++i) {
    EXPECT_LE(next.wake_at_ns - host_.now, 5 * kMillisecond);
    host_.now = next.wake_at_ns;
    next = session_.step();
  }
  EXPECT_EQ(kernel_.count(abi::kIoctlCopy), 51u);
  EXPECT_EQ(counter(counters().retries), 51u);
  kernel_.changing = false;
  run_out();
  EXPECT_EQ(at(6), tag_of(6));
}

TEST_F(SessionTest, AFetchThatTheKernelPutsOffArrivesInTheEnd) {
  store_->cached = false;
  kernel_.fault(pages(6));
  settle();
  kernel_.changing = true;
  bring();
  const Session::Next next = settle();
  EXPECT_GT(next.wake_at_ns, host_.now);
  kernel_.changing = false;
  host_.now = next.wake_at_ns;
  settle();
  bring();
  settle();
  EXPECT_EQ(at(6), tag_of(6));
}

TEST_F(SessionTest, AShortCopyGoesOnAfterThePageThatWasThere) {
  kernel_.present[pages(5).start.value] = std::byte{0xee};
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(4), tag_of(4));
  EXPECT_EQ(at(5), std::byte{0xee});
  EXPECT_EQ(at(6), tag_of(6));
  EXPECT_EQ(at(7), tag_of(7));
  EXPECT_TRUE(kernel_.woke(pages(5)));
}

TEST_F(SessionTest, AFaultOnAPageThatIsThereIsWoken) {
  kernel_.present[pages(6).start.value] = std::byte{0xee};
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), std::byte{0xee});
  EXPECT_TRUE(kernel_.woke(pages(6)));
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(SessionTest, AWriteProtectedPageThatIsNotThereIsFilledWithZeros) {
  for (std::uint64_t page = 0; page < 1024; ++page) store_->holes.insert(page);
  kernel_.refuse = [](const FakeKernel::Call& call) {
    return call.request == abi::kIoctlZeropage && call.range.start == pages(6).start ? EEXIST : 0;
  };
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), std::byte{0});
  EXPECT_EQ(at(7), std::byte{0});
}

TEST_F(SessionTest, ARunOverTwoMappingsGoesPageByPage) {
  kernel_.boundary = pages(6).start.value;
  kernel_.fault(pages(7));
  settle();
  for (std::uint64_t page = 4; page < 8; ++page) EXPECT_EQ(at(page), tag_of(page)) << page;
}

TEST_F(SessionTest, AFaultWhereNothingIsMappedAnyMoreIsWokenAndForgotten) {
  for (const bool cached : {true, false}) {
    store_->cached = cached;
    kernel_.unmapped = {pages(6).start.value};
    kernel_.fault(pages(6));
    settle();
    if (!cached) bring();
    run_out();
    EXPECT_TRUE(kernel_.woke(pages(6)));
    EXPECT_EQ(counter(waiting().pending), 0u);
    EXPECT_TRUE(host_.fetches.empty());
    kernel_.calls.clear();
  }
}

TEST_F(SessionTest, AClientThatIsGoneEndsTheSession) {
  kernel_.gone = true;
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(session_.end(), SessionEnd::gone);
  EXPECT_FALSE(host_.killed);
}

TEST_F(SessionTest, MemoryThatIsShortIsWaitedForAndThePagePoisonedAtLast) {
  kernel_.refuse = [](const FakeKernel::Call& call) { return call.request == abi::kIoctlCopy ? ENOMEM : 0; };
  for (const bool cached : {true, false}) {
    SCOPED_TRACE(cached);
    store_->cached = cached;
    const std::uint64_t page = cached ? 6 : 600;
    const std::int64_t start = host_.now;
    kernel_.fault(pages(page));
    for (int i = 0; i < 10'000 && !kernel_.poisoned.contains(pages(page).start.value); ++i) {
      const Session::Next next = settle();
      if (!host_.fetches.empty()) {
        bring();
      } else if (next.wake_at_ns != 0) {
        host_.now = std::max(host_.now, next.wake_at_ns);
      }
    }
    EXPECT_TRUE(kernel_.poisoned.contains(pages(page).start.value));
    EXPECT_GT(host_.now - start, 1'000 * kMillisecond);
    EXPECT_FALSE(kernel_.poisoned.contains(pages(page + 1).start.value));
    ASSERT_EQ(host_.failures.size(), 1u);
    EXPECT_NE(host_.failures[0].find("no memory"), std::string::npos);
    host_.failures.clear();
  }
}

TEST_F(SessionTest, APageThatTheKernelRefusesForAnUnknownReasonIsPoisonedAlone) {
  kernel_.refuse = [](const FakeKernel::Call& call) {
    return call.request == abi::kIoctlCopy && call.range.overlaps(pages(6)) ? EINVAL : 0;
  };
  for (const bool cached : {true, false}) {
    SCOPED_TRACE(cached);
    store_->cached = cached;
    kernel_.poisoned.clear();
    session_.drop(pages(0, 1024)).value();
    kernel_.present.clear();
    add(pages(0, 1024));
    kernel_.fault(pages(6));
    settle();
    if (!cached) bring();
    run_out();
    EXPECT_EQ(kernel_.poisoned, std::set<std::uint64_t>{pages(6).start.value});
    EXPECT_EQ(at(4), tag_of(4));
    EXPECT_EQ(at(7), tag_of(7));
    EXPECT_TRUE(host_.fetches.empty());
  }
}

TEST_F(SessionTest, WriteProtectAndMinorFaultsAreUndone) {
  kernel_.fault(pages(6), abi::kPagefaultWp | abi::kPagefaultWrite);
  kernel_.fault(pages(7), abi::kPagefaultMinor);
  settle();
  EXPECT_EQ(kernel_.count(abi::kIoctlWriteprotect), 1u);
  EXPECT_EQ(kernel_.count(abi::kIoctlContinue), 1u);
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(SessionTest, WriteProtectFaultsThatCannotBeUndoneAreWokenOrTriedAgain) {
  kernel_.refuse = [](const FakeKernel::Call&) { return ENOENT; };
  kernel_.fault(pages(6), abi::kPagefaultWp | abi::kPagefaultWrite);
  settle();
  EXPECT_TRUE(kernel_.woke(pages(6)));
  kernel_.changing = true;
  kernel_.fault(pages(9), abi::kPagefaultWp | abi::kPagefaultWrite);
  EXPECT_GT(settle().wake_at_ns, 0);
}

// ---- stores that fail -------------------------------------------------------------------------------------

TEST_F(SessionTest, OnlyTheDemandedPageOfAFailingStoreIsPoisoned) {
  store_->bad = {5, 6};
  kernel_.fault(pages(6));
  settle();
  bring();
  settle();
  EXPECT_EQ(kernel_.poisoned, std::set<std::uint64_t>{pages(6).start.value});
  EXPECT_EQ(at(4), tag_of(4));
  EXPECT_EQ(at(7), tag_of(7));
  EXPECT_EQ(at(5), std::nullopt);
  EXPECT_EQ(host_.failures.size(), 1u);
  EXPECT_EQ(counter(counters().pages_poisoned), 1u);
  EXPECT_EQ(counter(counters().read_errors), 1u);
  // The neighbour is tried again when somebody needs it.
  store_->bad = {};
  kernel_.fault(pages(5));
  settle();
  EXPECT_EQ(at(5), tag_of(5));
  EXPECT_FALSE(host_.killed);
}

TEST_F(SessionTest, AClientIsKilledWhereAPageCannotBePoisoned) {
  store_->bad = {6};
  kernel_.refuse = [](const FakeKernel::Call& call) {
    return call.request == abi::kIoctlPoison ? EINVAL : 0;
  };
  kernel_.fault(pages(6));
  settle();
  bring();
  settle();
  EXPECT_TRUE(host_.killed);
  EXPECT_EQ(host_.warnings.size(), 1u);
  exit_client();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
}

TEST_F(SessionTest, PoisoningIsTriedAgainWhenItIsPutOffOrShortOfMemory) {
  store_->bad = {6};
  int refusals = 0;
  kernel_.refuse = [&](const FakeKernel::Call& call) {
    return call.request == abi::kIoctlPoison && ++refusals <= 3 ? ENOMEM : 0;
  };
  kernel_.fault(pages(6));
  settle();
  bring();
  run_out();
  EXPECT_TRUE(kernel_.poisoned.contains(pages(6).start.value));
  EXPECT_FALSE(host_.killed);
}

class KillTest : public SessionTest {
 protected:
  KillTest() : SessionTest(4, {}, OnError::kill) {
    store_->cached = false;
    store_->bad = {6};
  }
  void fault_and_fail() {
    kernel_.fault(pages(6));
    settle();
    bring();
    settle();
  }
};

TEST_F(KillTest, WhoNeedsAPageThatCannotBeReadIsKilledAndNotServedAnyMore) {
  fault_and_fail();
  EXPECT_TRUE(host_.killed);
  EXPECT_EQ(counter(counters().read_errors), 1u);
  kernel_.fault(pages(600));
  settle();
  EXPECT_TRUE(host_.fetches.empty());
  EXPECT_FALSE(session_.end());
  exit_client();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  EXPECT_TRUE(kernel_.poisoned.empty());
}

TEST_F(KillTest, WhoseProcessNobodyKnowsOrHasExitedHasThePagePoisonedAlone) {
  host_.exited = true;
  fault_and_fail();
  EXPECT_FALSE(host_.killed);
  EXPECT_FALSE(session_.end());
  EXPECT_EQ(kernel_.poisoned, std::set<std::uint64_t>{pages(6).start.value});
  EXPECT_EQ(at(7), tag_of(7));
}

// ---- why a fault waits ------------------------------------------------------------------------------------

TEST_F(SessionTest, ItIsToldWhichFaultIsOldestAndWhyItWaits) {
  const auto oldest = [&] { return waiting().oldest_page.load(); };
  const auto why = [&] { return waiting().oldest_why.load(); };
  add(pages(2000, 16), 500);
  store_->cached = false;
  kernel_.fault(pages(2003));
  settle();
  EXPECT_EQ(oldest(), pages(2003).start.value);
  EXPECT_EQ(waiting().oldest_offset.load(), 503 * kPage);
  EXPECT_EQ(why(), PendingWhy::reading);
  kernel_.changing = true;
  bring();
  settle();
  EXPECT_EQ(why(), PendingWhy::changing);
  kernel_.changing = false;
  kernel_.refuse = [](const FakeKernel::Call& call) { return call.request == abi::kIoctlCopy ? ENOMEM : 0; };
  host_.now += 1000 * kMillisecond;
  store_->cached = true;
  settle();
  EXPECT_EQ(oldest(), pages(2003).start.value);
  EXPECT_EQ(why(), PendingWhy::no_memory);
  kernel_.refuse = [](const FakeKernel::Call&) { return 0; };
  host_.now += 1000 * kMillisecond;
  settle();
  EXPECT_EQ(waiting().oldest_since_ns.load(), 0);
}

// ---- a client that is stopped -----------------------------------------------------------------------------

class PauseTest : public SessionTest {
 protected:
  PauseTest() : SessionTest(4, {}, OnError::pause) {
    store_->cached = false;
    store_->bad = {6};
  }
  void fault_and_fail() {
    kernel_.fault(pages(6));
    settle();
    bring();
    settle();
  }
};

TEST_F(PauseTest, APageThatCannotBeReadStopsItsClientAndIsLeftAsItIs) {
  fault_and_fail();
  EXPECT_EQ(host_.stops, 1);
  EXPECT_EQ(host_.failures.size(), 1u);
  EXPECT_TRUE(waiting().paused.load());
  EXPECT_EQ(waiting().oldest_why.load(), PendingWhy::paused);
  EXPECT_TRUE(kernel_.poisoned.empty());
  EXPECT_EQ(at(6), std::nullopt);
  EXPECT_EQ(at(7), tag_of(7)) << "its neighbour came";
  // Nothing is tried meanwhile, and nothing spins.
  host_.now += 100'000 * kMillisecond;
  kernel_.fault(pages(6));
  EXPECT_EQ(settle().wake_at_ns, 0);
  EXPECT_TRUE(host_.fetches.empty());
  EXPECT_EQ(counter(waiting().pending), 1u);
}

TEST_F(PauseTest, WhenItCanBeReadTheClientGoesOn) {
  fault_and_fail();
  store_->bad = {};
  session_.resume();
  EXPECT_EQ(host_.continues, 1);
  EXPECT_FALSE(waiting().paused.load());
  settle();
  bring();
  settle();
  EXPECT_EQ(at(6), tag_of(6));
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(PauseTest, OneThatStillCannotBeReadStopsItAgain) {
  fault_and_fail();
  session_.resume();
  settle();
  bring();
  settle();
  EXPECT_EQ(host_.stops, 2);
  EXPECT_TRUE(waiting().paused.load());
  EXPECT_EQ(at(6), std::nullopt);
}

TEST_F(PauseTest, WhoEndsTheSessionLetsTheClientGoOn) {
  fault_and_fail();
  session_.abandon();
  EXPECT_EQ(host_.continues, 1);
}

TEST_F(PauseTest, AClientThatIsToBeCompletedHasThePagePoisoned) {
  fault_and_fail();
  session_.begin_detach(Unreadable::poison);
  while (!session_.end()) {
    settle();
    while (!host_.fetches.empty()) bring();
  }
  EXPECT_EQ(session_.end(), SessionEnd::detached);
  EXPECT_TRUE(kernel_.poisoned.contains(pages(6).start.value));
  EXPECT_EQ(host_.stops, 1);
  EXPECT_EQ(host_.continues, 1);
}

TEST_F(PauseTest, WhatWasGivenBackMeanwhileIsZero) {
  fault_and_fail();
  kernel_.removed(pages(6));
  settle();
  EXPECT_EQ(at(6), std::byte{0});
  EXPECT_FALSE(waiting().paused.load());
}

TEST_F(PauseTest, WhoseProcessNobodyKnowsHasThePagePoisoned) {
  host_.killable = false;
  fault_and_fail();
  EXPECT_TRUE(kernel_.poisoned.contains(pages(6).start.value));
  EXPECT_FALSE(waiting().paused.load());
}

// ---- changes while a fetch is under way ------------------------------------------------------------------

class UnderWayTest : public SessionTest {
 protected:
  UnderWayTest() {
    store_->cached = false;
    kernel_.fault(pages(6));
    settle();
  }
};

TEST_F(UnderWayTest, WhatWasRemovedMeanwhileIsZero) {
  kernel_.removed(pages(6, 1));
  settle();
  bring();
  settle();
  EXPECT_EQ(at(6), std::byte{0});
  EXPECT_EQ(at(5), tag_of(5));
  EXPECT_EQ(counter(counters().pages_removed), 1u);
  EXPECT_EQ(counter(counters().events), 1u);
}

TEST_F(UnderWayTest, WhatWasUnmappedMeanwhileIsLeftAlone) {
  kernel_.unmap(pages(6, 2));
  kernel_.unmapped = {pages(6).start.value, pages(7).start.value};
  settle();
  bring();
  settle();
  EXPECT_EQ(at(6), std::nullopt);
  EXPECT_EQ(at(5), tag_of(5));
  EXPECT_TRUE(kernel_.woke(pages(6)));
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(UnderWayTest, WhatWasMovedMeanwhileArrivesAtItsNewPlace) {
  kernel_.moved(pages(4, 4), pages(3000).start);
  kernel_.unmap(pages(4, 4));
  for (std::uint64_t page = 4; page < 8; ++page) kernel_.unmapped.insert(pages(page).start.value);
  settle();
  bring();
  settle();
  for (std::uint64_t page = 4; page < 8; ++page) {
    EXPECT_EQ(at(page), std::nullopt);
    EXPECT_EQ(at(3000 - 4 + page), tag_of(page));
  }
  EXPECT_TRUE(kernel_.woke(pages(6)));
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(UnderWayTest, WhatWasLeftBehindByAMoveIsZero) {
  kernel_.refuse = [](const auto& call) { return call.request == abi::kIoctlContinue ? EINVAL : 0; };
  kernel_.moved(pages(4, 4), pages(3000).start);
  settle();
  bring();
  settle();
  EXPECT_EQ(at(6), std::byte{0});
  EXPECT_EQ(at(3002), tag_of(6));
}

TEST_F(UnderWayTest, AThreadThatWaitsWhereAPageWasMovedThatIsThereIsWoken) {
  // The page comes from the same window, but not by its fetch.
  kernel_.removed(pages(5));
  kernel_.fault(pages(5));
  settle();
  ASSERT_EQ(at(5), std::byte{0});
  kernel_.unmap(pages(6));
  kernel_.moved(pages(5), pages(6).start);
  kernel_.unmap(pages(5));
  kernel_.present[pages(6).start.value] = std::byte{0};
  settle();
  kernel_.calls.clear();
  bring();
  settle();
  EXPECT_TRUE(kernel_.woke(pages(6)));
  EXPECT_EQ(counter(waiting().pending), 0u);
}

TEST_F(UnderWayTest, WhatWasDroppedMeanwhileIsLeftAlone) {
  ASSERT_TRUE(session_.drop(pages(0, 1024)));
  settle();
  bring();
  settle();
  EXPECT_TRUE(kernel_.present.empty());
}

TEST_F(UnderWayTest, AnOldFetchIsNotTakenForOneOfTheRegionThatHasItsNumberNow) {
  ASSERT_TRUE(session_.drop(pages(0, 1024)));
  add(pages(0, 1024), 2000);
  kernel_.fault(pages(6));
  settle();
  ASSERT_EQ(host_.fetches.size(), 2u);
  bring();  // the old one
  settle();
  EXPECT_EQ(at(6), std::nullopt);
  bring();
  settle();
  EXPECT_EQ(at(6), tag_of(2006));
}

TEST_F(UnderWayTest, AStateThatNobodyWroteDoesNotStopTheManager) {
  // Another holder of the state file marks a page as being fetched.
  auto& state = const_cast<SessionState&>(session_.state());
  state.table(0).set(PageIndex(100), PageState::fetching);
  store_->cached = true;
  kernel_.fault(pages(100));
  run_out();
  EXPECT_EQ(at(100), tag_of(100));
}

TEST_F(SessionTest, RemovedPagesReadAsZeroForEverAfter) {
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), tag_of(6));
  for (int i = 0; i < 3; ++i) {
    kernel_.fault(pages(6));  // the kernel gives faults before events
    kernel_.removed(pages(6));
    settle();
    EXPECT_EQ(at(6), std::byte{0});
  }
}

TEST_F(SessionTest, APageThatIsLostIsTheImageAgainForAClientThatTellsOfNothing) {
  kernel_.fault(pages(6));
  settle();
  kernel_.present.clear();
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), tag_of(6));
}

// Its client tells what it removes.
class TellingTest : public SessionTest {
 protected:
  TellingTest() : SessionTest(4, Features(abi::kFeatureEventRemove)) {}
};

TEST_F(TellingTest, APageThatIsLostWithoutAWordIsZero) {
  kernel_.fault(pages(6));
  settle();
  kernel_.present.clear();
  kernel_.fault(pages(6));
  kernel_.fault(pages(9));
  settle();
  EXPECT_EQ(at(6), std::byte{0});
  EXPECT_EQ(at(9), tag_of(9));
}

TEST_F(TellingTest, ALateFaultOnAPageThatIsThereChangesNothing) {
  kernel_.fault(pages(6));
  settle();
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), tag_of(6));
  EXPECT_TRUE(kernel_.woke(pages(6)));
}

TEST_F(TellingTest, AHugePageThatIsSaidToBeThereButWasNotIsBroughtAfterAll) {
  ASSERT_TRUE(session_.add_region(pages(5120, 512), StoreOffset(0), kPage2M, lane_));
  // As 6.18 says when the pool is empty; it has been filled when the manager looks.
  bool pool_is_empty = true;
  kernel_.refuse = [&](const FakeKernel::Call& call) {
    return call.request == abi::kIoctlCopy && pool_is_empty ? EEXIST : 0;
  };
  kernel_.fault(pages(5120));
  settle();
  pool_is_empty = false;
  kernel_.fault(pages(5120));
  run_out();
  EXPECT_EQ(at(5121), tag_of(1));
}

TEST_F(SessionTest, AFaultOutsideOfEveryRegionIsZero) {
  kernel_.fault(pages(9000));
  settle();
  EXPECT_EQ(at(9000), std::byte{0});
  EXPECT_EQ(counter(counters().pages_outside), 1u);
}

TEST_F(SessionTest, ARegionIsDroppedByItsTagWhereverItHasMovedTo) {
  ASSERT_TRUE(session_.add_region(pages(2000, 8), StoreOffset(0), kPage4K, lane_, 77));
  kernel_.moved(pages(2002, 2), pages(3000).start);
  kernel_.unmap(pages(2002, 2));
  settle();
  add(pages(2002, 2));  // another one in the gap
  const auto left = session_.drop_tagged(77).value();
  const std::vector<AddressRange> expected = {pages(2000, 2), pages(2004, 4), pages(3000, 2)};
  EXPECT_EQ(left, expected);
  kernel_.fault(pages(2003));
  settle();
  EXPECT_EQ(at(2003), tag_of(1));
  EXPECT_TRUE(session_.drop_tagged(77).value().empty());
}

TEST_F(SessionTest, RegionsThatCannotBeServedAreRefused) {
  const auto refused = [&](AddressRange memory, std::uint64_t offset, PageSize page_size) {
    return !session_.add_region(memory, StoreOffset(offset), page_size, lane_);
  };
  EXPECT_TRUE(refused(pages(5000, 0), 0, kPage4K));
  EXPECT_TRUE(refused({Address(kBase + 1), ByteCount(kPage)}, 0, kPage4K));
  EXPECT_TRUE(refused(pages(5000, 1), 1, kPage4K));
  EXPECT_TRUE(refused(pages(5001, 512), 0, kPage2M));
  EXPECT_TRUE(refused(pages(5120, 511), 0, kPage2M));
  EXPECT_TRUE(refused(pages(1u << 20, 1u << 18), 0, PageSize::from_shift(30)));
  EXPECT_TRUE(refused(pages(5000, kPages + 1), 0, kPage4K));
  EXPECT_TRUE(refused(pages(5000, 1), kPages * kPage, kPage4K));
  EXPECT_TRUE(refused(pages(5000, 2), ~std::uint64_t{0} << 12, kPage4K));
  EXPECT_TRUE(refused({Address(~std::uint64_t{0} << 12), ByteCount(kPage)}, 0, kPage4K));
  EXPECT_FALSE(refused(pages(5120, 512), 0, kPage2M));
}

// ---- ends -------------------------------------------------------------------------------------------------

TEST_F(SessionTest, DetachingBringsEverythingAndUnregisters) {
  for (const bool cached : {true, false}) {
    SCOPED_TRACE(cached);
    FakeKernel kernel;
    store_->cached = cached;
    store_->zeros = {9};
    Session session(Uffd::adopt(3, Features(), kernel), SessionState::create("fake").value(), {}, {}, host_);
    ASSERT_TRUE(session.add_region(pages(0, 1000), StoreOffset(0), kPage4K, lane_));
    kernel.removed(pages(20, 2));
    session.begin_detach(Unreadable::poison);
    for (int i = 0; i < 10'000 && !session.end(); ++i) {
      session.step();
      if (host_.fetches.empty()) continue;
      auto fetch = std::move(host_.fetches.front());
      host_.fetches.pop_front();
      read_fetch(*fetch);
      session.fetched(std::move(fetch));
    }
    EXPECT_EQ(session.end(), SessionEnd::detached);
    for (std::uint64_t page = 0; page < 1000; ++page) {
      const auto found = kernel.present.find(pages(page).start.value);
      const std::byte shown = found == kernel.present.end() ? std::byte{0} : found->second;
      ASSERT_EQ(shown, page == 9 || page == 20 || page == 21 ? std::byte{0} : tag_of(page)) << page;
    }
    EXPECT_EQ(kernel.count(abi::kIoctlUnregister), 1u);
    EXPECT_EQ(kernel.calls.back().request, abi::kIoctlWake);
  }
}

TEST_F(SessionTest, DetachingThatIsPutOffIsTriedAgainSoonAndThenLessOften) {
  kernel_.changing = true;
  session_.begin_detach(Unreadable::poison);
  Session::Next next = settle();
  std::int64_t pause = next.wake_at_ns - host_.now;
  EXPECT_LE(pause, kMillisecond / 10);
  for (int times = 0; times < 10; ++times) {
    host_.now = next.wake_at_ns;
    next = settle();
    EXPECT_GE(next.wake_at_ns - host_.now, pause);
    pause = next.wake_at_ns - host_.now;
  }
  EXPECT_EQ(pause, 5 * kMillisecond);
  kernel_.changing = false;
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::detached);
}

TEST_F(SessionTest, DetachingBringsWhatIsMovedMeanwhileToWhereItHasBeen) {
  session_.begin_detach(Unreadable::poison);
  session_.step();
  ASSERT_TRUE(at(5));
  ASSERT_FALSE(at(1000));
  kernel_.unmap(pages(5));
  kernel_.moved(pages(1000), pages(5).start);
  kernel_.unmap(pages(1000));
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::detached);
  EXPECT_EQ(at(5), tag_of(1000));
}

TEST_F(SessionTest, DetachingPoisonsWhatCannotBeRead) {
  store_->bad = {100};
  session_.begin_detach(Unreadable::poison);
  for (int i = 0; i < 1000 && !session_.end(); ++i) {
    settle();
    if (!host_.fetches.empty()) bring();
  }
  EXPECT_EQ(session_.end(), SessionEnd::detached);
  EXPECT_EQ(kernel_.poisoned, std::set<std::uint64_t>{pages(100).start.value});
  EXPECT_EQ(at(101), tag_of(101));
}

TEST_F(SessionTest, DetachingPoisonsWhatTheKernelHasPutOff) {
  store_->bad = {6};
  kernel_.refuse = [](const FakeKernel::Call& call) {
    return call.request == abi::kIoctlPoison ? ENOMEM : 0;
  };
  kernel_.fault(pages(6));
  settle();
  bring();
  settle();
  session_.begin_detach(Unreadable::poison);
  settle();
  EXPECT_FALSE(session_.end());
  kernel_.refuse = [](const auto&) { return 0; };
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::detached);
  EXPECT_EQ(kernel_.poisoned, std::set<std::uint64_t>{pages(6).start.value});
}

TEST_F(SessionTest, DetachingPoisonsWhatItsFormerOwnerWasAboutToPoison) {
  auto& state = const_cast<SessionState&>(session_.state());
  state.table(0).set(PageIndex(100), PageState::poisoned);
  session_.begin_detach(Unreadable::poison);
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::detached);
  EXPECT_EQ(kernel_.poisoned, std::set<std::uint64_t>{pages(100).start.value});
}

TEST_F(SessionTest, DetachingIsGivenUpOverAPageThatCannotBeReadWhereTheClientWantsThat) {
  store_->bad = {6};
  session_.begin_detach(Unreadable::keep_serving);
  settle();
  bring();
  run_out();
  EXPECT_FALSE(session_.end());
  ASSERT_EQ(host_.detach_failures.size(), 1u);
  EXPECT_TRUE(kernel_.poisoned.empty());
  kernel_.fault(pages(500));
  settle();
  EXPECT_EQ(at(500), tag_of(500));
}

TEST_F(SessionTest, AClientThatCannotBeKilledIsPoisonedBeforeItsMemoryIsLeft) {
  host_.killable = false;
  kernel_.fault(pages(6));
  settle();
  session_.begin_detach(Unreadable::poison);
  session_.fail("a test");
  kernel_.changing = true;
  settle();
  EXPECT_FALSE(session_.end());
  kernel_.changing = false;
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  for (std::uint64_t page = 0; page < 1024; ++page) {
    const bool present = page >= 4 && page < 8;
    EXPECT_EQ(at(page), present ? std::optional(tag_of(page)) : std::nullopt) << page;
    EXPECT_EQ(kernel_.poisoned.contains(pages(page).start.value), !present) << page;
  }
}

TEST_F(SessionTest, DetachingEndsThoughSomePagesCannotBePut) {
  for (const bool cached : {true, false}) {
    SCOPED_TRACE(cached);
    FakeKernel kernel;
    store_->cached = cached;
    kernel.unmapped = {pages(3).start.value};
    Session session(Uffd::adopt(3, Features(), kernel), SessionState::create("fake").value(), {}, {}, host_);
    ASSERT_TRUE(session.add_region(pages(0, 16), StoreOffset(0), kPage4K, lane_));
    session.begin_detach(Unreadable::poison);
    for (int i = 0; i < 100 && !session.end(); ++i) {
      session.step();
      if (host_.fetches.empty()) continue;
      auto fetch = std::move(host_.fetches.front());
      host_.fetches.pop_front();
      read_fetch(*fetch);
      session.fetched(std::move(fetch));
    }
    EXPECT_EQ(session.end(), SessionEnd::detached);
    EXPECT_EQ(kernel.present.size(), 15u);
  }
}

TEST_F(SessionTest, ReleasingEndsWhenNoThreadWaitsForItsEventAnyMore) {
  kernel_.changing = true;
  session_.release();
  EXPECT_EQ(kernel_.count(abi::kIoctlUnregister), 1u);
  Session::Next next = settle();
  EXPECT_FALSE(session_.end());
  kernel_.removed(pages(5));
  kernel_.changing = false;
  host_.now = next.wake_at_ns;
  settle();
  EXPECT_TRUE(kernel_.messages.empty());
  EXPECT_EQ(session_.end(), SessionEnd::released);
}

TEST_F(SessionTest, ReleasingWakesThreadsWhoseFaultsWerePutOff) {
  kernel_.changing = true;
  kernel_.fault(pages(6));
  kernel_.fault(pages(7), abi::kPagefaultWp | abi::kPagefaultWrite);
  kernel_.fault(pages(8), abi::kPagefaultMinor);
  kernel_.fault(pages(3000));  // outside of every region
  settle();
  EXPECT_EQ(counter(waiting().pending), 4u);
  for (const std::uint64_t page : {6u, 7u, 8u, 3000u}) ASSERT_FALSE(kernel_.woke(pages(page))) << page;
  session_.release();
  for (const std::uint64_t page : {6u, 7u, 8u}) EXPECT_TRUE(kernel_.woke(pages(page))) << page;
  // How far the mapping there goes cannot be told before.
  kernel_.changing = false;
  run_out();
  EXPECT_TRUE(kernel_.woke(pages(3000)));
}

TEST_F(SessionTest, DetachingWakesThreadsWhoseFaultsWerePutOff) {
  kernel_.changing = true;
  kernel_.fault(pages(7), abi::kPagefaultWp | abi::kPagefaultWrite);
  kernel_.fault(pages(8), abi::kPagefaultMinor);
  settle();
  session_.begin_detach(Unreadable::poison);
  kernel_.changing = false;
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::detached);
  EXPECT_TRUE(kernel_.woke(pages(7)));
  EXPECT_TRUE(kernel_.woke(pages(8)));
}

TEST_F(SessionTest, MemoryThatWasAddedToAMappingIsNotLeftRegistered) {
  add(pages(2000, 8));
  kernel_.mapping = pages(2000, 45);
  session_.release();
  settle();
  EXPECT_EQ(session_.end(), SessionEnd::released);
  EXPECT_TRUE(kernel_.unregistered(pages(0, 1024)));
  EXPECT_TRUE(kernel_.unregistered(pages(2000, 45)));
  EXPECT_FALSE(kernel_.unregistered(pages(2045)));
  EXPECT_FALSE(kernel_.unregistered(pages(1024)));
}

TEST_F(SessionTest, MemoryThatWasAddedIsLookedForWhenTheClientChangesNothingAnyMore) {
  kernel_.mapping = pages(0, 1100);
  kernel_.changing = true;
  session_.release();
  settle();
  EXPECT_FALSE(session_.end());
  EXPECT_TRUE(kernel_.unregistered(pages(0, 1023)));
  kernel_.changing = false;
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::released);
  EXPECT_TRUE(kernel_.unregistered(pages(1023, 77)));
}

TEST_F(SessionTest, ReleasingEndsThoughTheClientNeverStopsChanging) {
  kernel_.changing = true;
  session_.release();
  run_out(200'000);
  EXPECT_EQ(session_.end(), SessionEnd::released);
}

TEST_F(SessionTest, AnAbandonedSessionTouchesNothing) {
  kernel_.fault(pages(6));
  session_.abandon();
  session_.step();
  EXPECT_EQ(session_.end(), SessionEnd::abandoned);
  EXPECT_TRUE(kernel_.calls.empty());
  EXPECT_EQ(kernel_.messages.size(), 1u);
}

TEST_F(SessionTest, ADeadClientsMemoryIsLookedAtAgainWhileOthersUseIt) {
  session_.check_target();
  EXPECT_FALSE(session_.end());
  const Session::Next next = settle();
  ASSERT_GT(next.wake_at_ns, host_.now);
  kernel_.gone = true;
  host_.now = next.wake_at_ns;
  settle();
  EXPECT_EQ(session_.end(), SessionEnd::gone);
}

TEST_F(SessionTest, WithoutADescriptorForAChildNothingIsReadUntilATime) {
  kernel_.fault(pages(6));
  kernel_.read_error = EMFILE;
  const Session::Next next = session_.step();
  EXPECT_FALSE(next.reads);
  EXPECT_FALSE(next.again);
  EXPECT_GT(next.wake_at_ns, host_.now_ns());
  kernel_.read_error = 0;
  EXPECT_FALSE(session_.step().reads);
  host_.now = next.wake_at_ns;
  EXPECT_TRUE(session_.step().reads);
  EXPECT_EQ(at(6), tag_of(6));
}

TEST_F(SessionTest, AnEventThatCannotBeFollowedKillsTheClient) {
  abi::Msg message{};
  message.event = 0x77;
  kernel_.messages.push_back(message);
  settle();
  EXPECT_TRUE(host_.killed);
  exit_client();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
}

TEST_F(SessionTest, AClientThatIsKilledIsServedNothingMoreAndKeptUntilItsMemoryIsGone) {
  session_.fail("a test");
  kernel_.fault(pages(6));
  Session::Next next = settle();
  host_.now = next.wake_at_ns;
  next = settle();
  EXPECT_FALSE(session_.end());
  EXPECT_GT(next.wake_at_ns, host_.now);
  EXPECT_TRUE(kernel_.present.empty());
  EXPECT_EQ(kernel_.count(abi::kIoctlUnregister), 0u);
  // Its memory goes before its process has.
  kernel_.gone = true;
  host_.now = next.wake_at_ns;
  settle();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  EXPECT_TRUE(kernel_.poisoned.empty());
}

TEST_F(SessionTest, MemoryThatOutlivesTheClientThatIsKilledIsPoisoned) {
  for (const std::uint64_t page : {6ul, 100ul}) kernel_.fault(pages(page));
  kernel_.removed(pages(100));
  settle();
  session_.begin_detach(Unreadable::keep_serving);
  session_.fail("a test");
  kernel_.fault(pages(40));
  settle();
  host_.exited = true;
  session_.check_target();
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  for (std::uint64_t page = 0; page < 1024; ++page)
    EXPECT_NE(kernel_.poisoned.contains(pages(page).start.value), at(page).has_value()) << page;
  EXPECT_EQ(at(6), tag_of(6));
  EXPECT_EQ(at(100), std::byte{0});
  EXPECT_EQ(at(40), std::nullopt);
}

TEST_F(SessionTest, WhatIsPoisonedMayLieInTwoMappings) {
  kernel_.boundary = pages(300).start.value;
  kernel_.unmapped = {pages(40).start.value, pages(41).start.value};
  host_.killable = false;
  session_.fail("a test");
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  EXPECT_EQ(kernel_.poisoned.size(), 1022u);
}

TEST_F(SessionTest, APartOfAHugePageIsPoisonedWithTheWholePage) {
  const AddressRange huge = pages(2048, 1024);
  const PageSize size = PageSize::from_bytes(2u << 20);
  ASSERT_TRUE(session_.add_region(huge, StoreOffset(0), size, lane_));
  kernel_.removed(pages(2048 + 768, 256));
  kernel_.refuse = [&](const FakeKernel::Call& call) {
    const bool whole = call.range.length.value % size.bytes().value == 0;
    return call.request == abi::kIoctlPoison && call.range.overlaps(huge) && !whole ? EINVAL : 0;
  };
  settle();
  host_.killable = false;
  session_.fail("a test");
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  EXPECT_EQ(kernel_.poisoned.size(), 1024u + 1024u);
}

// It maps the image's memory privately, so that what was given back is the image's if nobody serves it.
TEST_F(SessionTest, WhatWasGivenBackOfASharedImageIsPoisonedToo) {
  const std::shared_ptr<SharedImage> image = SharedImage::create(lane_).value();
  const AddressRange memory = pages(2000, 64);
  ASSERT_TRUE(session_.add_region(memory, StoreOffset(0), kPage4K, lane_, 0,
                                  {.mode = SharingMode::resolve, .image = image}));
  for (const std::uint64_t page : {2001ul, 2002ul}) {
    kernel_.fault(pages(page), abi::kPagefaultMinor);
    settle();
    ASSERT_TRUE(at(page));
  }
  kernel_.removed(pages(2001));
  settle();
  host_.killable = false;
  session_.fail("a test");
  session_.step();
  ASSERT_FALSE(session_.end());
  // While it is being poisoned, too.
  kernel_.removed(pages(2002));
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  for (const std::uint64_t page : {2001ul, 2002ul})
    EXPECT_TRUE(kernel_.poisoned.contains(pages(page).start.value)) << page;
}

TEST_F(SessionTest, MemoryOfAClientThatDoesNotDieIsPoisonedAfterAWhile) {
  session_.fail("a test");
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  EXPECT_EQ(kernel_.poisoned.size(), 1024u);
}

TEST_F(SessionTest, OneThatHasFailedIsNotLeftToASuccessor) {
  session_.fail("a test");
  session_.abandon();
  EXPECT_FALSE(session_.end());
  host_.exited = true;
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  EXPECT_EQ(kernel_.poisoned.size(), 1024u);
}

TEST_F(SessionTest, AClientWhoseProcessHasExitedBeforeIsPoisoned) {
  host_.exited = true;
  session_.fail("a test");
  EXPECT_FALSE(host_.killed);
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
  EXPECT_EQ(kernel_.poisoned.size(), 1024u);
}

TEST_F(SessionTest, WhereNothingCanBePoisonedMemoryThatOutlivesItsClientIsNeverLeft) {
  kernel_.refuse = [](const FakeKernel::Call& call) {
    return call.request == abi::kIoctlPoison ? EINVAL : 0;
  };
  session_.fail("a test");
  host_.exited = true;
  for (int looks = 0; looks < 100; ++looks) host_.now = std::max(host_.now, settle().wake_at_ns);
  EXPECT_FALSE(session_.end());
  EXPECT_EQ(kernel_.count(abi::kIoctlUnregister), 0u);
  ASSERT_EQ(host_.warnings.size(), 2u);
  EXPECT_NE(host_.warnings[1].find("cannot poison"), std::string::npos) << host_.warnings[1];
  kernel_.gone = true;
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::failed);
}

TEST_F(SessionTest, ASessionThatIsTakenUpAgainBringsWhatIsMissing) {
  store_->cached = false;
  kernel_.removed(pages(20, 2));
  kernel_.fault(pages(6));
  settle();
  UniqueFd file(::dup(session_.state().fd()));
  session_.abandon();
  store_->cached = true;
  Session next(Uffd::adopt(3, Features(), kernel_), SessionState::open(std::move(file)).value(), {lane_}, {},
               host_);
  next.wake_all();
  EXPECT_TRUE(kernel_.woke(pages(0, 1024)));
  kernel_.fault(pages(6));
  kernel_.fault(pages(20));
  while (next.step().again) {
  }
  EXPECT_EQ(at(6), tag_of(6));
  EXPECT_EQ(at(20), std::byte{0});
}

TEST_F(SessionTest, EventsThatWereReadAndNotAppliedAreAppliedByWhoTakesTheSessionUp) {
  // What its owner had read when it was cut off: a fault, and what a client has done since.
  SessionState state = SessionState::create("fake").value();
  ASSERT_TRUE(state.add_region(pages(0, 64), StoreOffset(0), kPage4K));
  kernel_.fault(pages(1));
  kernel_.removed(pages(4, 2));
  kernel_.moved(pages(0, 8), pages(500).start);
  kernel_.removed(pages(506, 1));
  kernel_.messages.push_back({.event = abi::kEventFork, .reserved = {}, .arg = {.fork = {.ufd = 77}}});
  kernel_.unmap(pages(16, 8));
  ASSERT_EQ(Uffd::adopt(3, Features(), kernel_).read(state.empty_inbox()).messages, 6u);

  Session next(Uffd::adopt(3, Features(), kernel_), SessionState::open(UniqueFd(::dup(state.fd()))).value(),
               {lane_}, {}, host_);
  std::vector<int> asked;
  next.apply_inbox([&](int fd) { return asked.push_back(fd), true; });
  EXPECT_EQ(asked, std::vector<int>{77});
  ASSERT_EQ(host_.children.size(), 1u);
  EXPECT_EQ(next.state().layout().find(pages(16).start), nullptr);
  for (const std::uint64_t page : {501u, 504u, 506u, 24u}) kernel_.fault(pages(page));
  while (next.step().again) {
  }
  EXPECT_EQ(at(501), tag_of(1));
  EXPECT_EQ(at(504), std::byte{0});
  EXPECT_EQ(at(506), std::byte{0});
  EXPECT_EQ(at(24), tag_of(24));
  EXPECT_EQ(counter(next.counters().faults), 4u);  // the one that was read comes again by a wake
}

TEST_F(SessionTest, AForkWhoseDescriptorIsNotItsOwnIsLeftOut) {
  SessionState state = SessionState::create("fake").value();
  ASSERT_TRUE(state.add_region(pages(0, 64), StoreOffset(0), kPage4K));
  kernel_.messages.push_back({.event = abi::kEventFork, .reserved = {}, .arg = {.fork = {.ufd = 77}}});
  ASSERT_EQ(Uffd::adopt(3, Features(), kernel_).read(state.empty_inbox()).messages, 1u);
  Session next(Uffd::adopt(3, Features(), kernel_), SessionState::open(UniqueFd(::dup(state.fd()))).value(),
               {lane_}, {}, host_);
  next.apply_inbox([](int) { return false; });
  EXPECT_TRUE(host_.children.empty());
  EXPECT_EQ(next.state().inbox()[0].event, 0);
}

// ---- children that cannot be served -----------------------------------------------------------------------

class CondemnedChild : public SessionTest {
 protected:
  // A fork of a client that has got pages 0 to 3, and has given back 8 and 9.
  void fork() {
    kernel_.fault(pages(1));
    kernel_.removed(pages(8, 2));
    settle();
    kernel_.messages.push_back(fork_message(77));
    settle();
  }
  static abi::Msg fork_message(std::uint32_t child) {
    return {.event = abi::kEventFork, .reserved = {}, .arg = {.fork = {.ufd = child}}};
  }
  bool is_poisoned(std::uint64_t page) const { return kernel_.poisoned.contains(pages(page).start.value); }
  // What the child has not got would read as zero when its userfaultfd is closed.
  void expect_only_what_is_missing_is_poisoned() const {
    for (std::uint64_t page = 0; page < 1024; ++page)
      EXPECT_EQ(is_poisoned(page), page > 3 && page != 8 && page != 9) << page;
  }
};

TEST_F(CondemnedChild, ThatHasNoPlaceAnswersWithSigbusWhereItWouldReadZeros) {
  host_.takes_children = false;
  fork();
  expect_only_what_is_missing_is_poisoned();
  ASSERT_EQ(host_.warnings.size(), 1u);
  EXPECT_NE(host_.warnings[0].find("SIGBUS"), std::string::npos) << host_.warnings[0];
}

TEST_F(CondemnedChild, ForWhoseStateThereIsNoDescriptorDoesSoToo) {
  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit none{.rlim_cur = 0, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  fork();
  EXPECT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  expect_only_what_is_missing_is_poisoned();
  EXPECT_TRUE(host_.children.empty());
}

TEST_F(CondemnedChild, IsPoisonedBeforeItsForkCountsAsApplied) {
  host_.takes_children = false;
  std::size_t unapplied = 1;
  kernel_.refuse = [&](const auto& call) {
    if (call.request == abi::kIoctlPoison)
      unapplied = SessionState::open(UniqueFd(::dup(session_.state().fd()))).value().unapplied();
    return 0;
  };
  fork();
  EXPECT_EQ(unapplied, 0u);
}

TEST_F(CondemnedChild, IsFollowedWhileItMovesAndForks) {
  host_.takes_children = false;
  // It does so before anything of it can be poisoned.
  int put_off = 2;
  kernel_.refuse = [&](const auto& call) {
    if (call.request != abi::kIoctlPoison || put_off == 0) return 0;
    if (--put_off == 0) {
      kernel_.moved(pages(16, 4), pages(2000).start);
      kernel_.messages.push_back(fork_message(78));
    }
    return EAGAIN;
  };
  fork();
  for (const std::uint64_t page : {2000u, 2003u}) EXPECT_TRUE(is_poisoned(page)) << page;
  EXPECT_FALSE(is_poisoned(2004));
}

TEST_F(CondemnedChild, WithoutAKernelThatPoisonsIsSaidToWait) {
  host_.takes_children = false;
  kernel_.refuse = [](const auto& call) { return call.request == abi::kIoctlPoison ? EINVAL : 0; };
  fork();
  ASSERT_EQ(host_.warnings.size(), 1u);
  EXPECT_NE(host_.warnings[0].find("waits for ever"), std::string::npos) << host_.warnings[0];
}

TEST_F(SessionTest, ASessionThatIsTakenUpAgainWakesAlsoThreadsOutsideOfEveryRegion) {
  // Such a fault may have been read by whoever served before, and no list has its address.
  session_.wake_all();
  EXPECT_TRUE(kernel_.woke_all);
}

// ---- pages before they are asked for
// ------------------------------------------------------------------------

class Prefetch : public SessionTest {
 protected:
  explicit Prefetch(Background background = Background::off, std::shared_ptr<IoBudget> budget = nullptr,
                    bool follow_streams = false)
      : SessionTest(1, {}, OnError::poison, background, std::move(budget), follow_streams) {}

  // Begins bringing these pages. Of the seeds there is one that leaves none of them out.
  void prefetch(const std::vector<std::uint32_t>& order, std::uint64_t seed = kSeed) {
    session_.prefetch(std::make_shared<PrefetchOrder>(order), lane_, seed);
  }
  // Brings all that is under way and what comes after it.
  void bring_all() {
    for (settle(); !host_.fetches.empty(); settle()) bring();
  }
  std::vector<std::uint64_t> present() const {
    std::vector<std::uint64_t> all;
    for (std::uint64_t page = 0; page < 2048; ++page)
      if (at(page)) all.push_back(page);
    return all;
  }
  static constexpr std::uint64_t kSeed = 1;
};

TEST_F(Prefetch, BringsThePagesOfTheOrderAndNoOthers) {
  prefetch({500, 3, 501, 7, 4});
  bring_all();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{3, 4, 7, 500, 501}));
  for (const std::uint64_t page : present()) EXPECT_EQ(at(page), tag_of(page));
  EXPECT_EQ(counter(counters().pages_prefetched), 5u);
  EXPECT_EQ(counter(counters().faults), 0u);
}

TEST_F(Prefetch, ReadsManyPagesTogetherInTheOrderOfFirstUse) {
  std::vector<std::uint32_t> order;
  for (std::uint32_t page = 0; page < 1000; page += 2) order.push_back(1000 - page);
  prefetch(order);
  settle();
  ASSERT_GE(host_.fetches.size(), 2u);
  EXPECT_LE(host_.fetches.size(), 8u);
  const Fetch& first = *host_.fetches.front();
  EXPECT_EQ(first.urgency, Urgency::prefetch);
  EXPECT_GT(first.granules.value, 50u);
  // The first batch has the first pages of the order, sorted for the disk.
  EXPECT_EQ(first.pieces.back().granules.first.value, 1000u);
  EXPECT_LT(first.pieces.front().granules.first, first.pieces.back().granules.first);
  EXPECT_GT(first.pieces.front().granules.first, host_.fetches[1]->pieces.back().granules.first);
  bring_all();
  EXPECT_GT(present().size(), 480u);
}

TEST_F(Prefetch, AFaultIsServedWhileItsPageIsUnderWay) {
  prefetch({5, 6});
  settle();
  kernel_.fault(pages(5));
  settle();
  EXPECT_EQ(at(5), tag_of(5));
  EXPECT_EQ(at(6), std::nullopt);
  EXPECT_EQ(counter(counters().prefetch_late), 1u);
  bring_all();
  EXPECT_EQ(at(6), tag_of(6));
  EXPECT_EQ(counter(counters().pages_prefetched), 1u);
}

TEST_F(Prefetch, WhatWasRemovedMeanwhileDoesNotComeBack) {
  prefetch({5, 6, 7});
  settle();
  kernel_.removed(pages(6));
  bring_all();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{5, 7}));
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), std::byte{0});
}

TEST_F(Prefetch, WhatWasUnmappedMeanwhileIsLeftOut) {
  prefetch({5, 6, 7});
  settle();
  kernel_.unmap(pages(6));
  bring_all();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{5, 7}));
}

TEST_F(Prefetch, WhatWasMovedMeanwhileComesToItsNewPlace) {
  prefetch({5, 6, 7});
  settle();
  kernel_.moved(pages(6), pages(1500).start);
  bring_all();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{5, 7, 1500}));
  EXPECT_EQ(at(1500), tag_of(6));
}

TEST_F(Prefetch, ARegionThatWasDroppedMeanwhileGetsNothing) {
  prefetch({5, 6, 7});
  settle();
  ASSERT_TRUE(session_.drop(pages(0, 1024)));
  add(pages(0, 1024), 1024);
  bring_all();
  EXPECT_TRUE(present().empty());
}

TEST_F(Prefetch, PagesThatCannotBeReadAreLeftForWhoAsksForThem) {
  store_->bad = {6};
  prefetch({5, 6, 8});
  bring_all();
  // A piece that cannot be read is left out whole.
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{8}));
  EXPECT_TRUE(host_.failures.empty());
  EXPECT_TRUE(kernel_.poisoned.empty());
  kernel_.fault(pages(5));
  settle();
  EXPECT_EQ(at(5), tag_of(5));
  kernel_.fault(pages(6));
  settle();
  bring();
  settle();
  EXPECT_EQ(host_.failures.size(), 1u);
  EXPECT_TRUE(kernel_.poisoned.contains(pages(6).start.value));
}

TEST_F(Prefetch, WaitsWhileTheClientChangesItsMemory) {
  prefetch({5, 6});
  settle();
  kernel_.changing = true;
  bring();
  const Session::Next next = settle();
  EXPECT_TRUE(present().empty());
  EXPECT_GT(next.wake_at_ns, host_.now);
  kernel_.changing = false;
  host_.now = next.wake_at_ns;
  bring_all();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{5, 6}));
}

TEST_F(Prefetch, IsGivenUpWhereThereIsNoMemory) {
  prefetch({5, 6});
  settle();
  kernel_.refuse = [](const FakeKernel::Call&) { return ENOMEM; };
  bring();
  settle();
  kernel_.refuse = [](const FakeKernel::Call&) { return 0; };
  bring_all();
  EXPECT_TRUE(present().empty());
}

class PrefetchFromASlowStore : public Prefetch {
 protected:
  PrefetchFromASlowStore() {
    std::vector<std::uint32_t> order;
    for (std::uint32_t page = 0; page < 1000; ++page) order.push_back(page);
    prefetch(order);
    settle();
    store_->cached = false;
  }
  // A fault that the store answers after so long; what was under way before it stays so.
  void late_fault(std::int64_t ns) {
    const std::uint64_t page = next_page_++;
    kernel_.fault(pages(page));
    settle();
    host_.now += ns;
    auto fetch = std::move(host_.fetches.back());
    host_.fetches.pop_back();
    ASSERT_EQ(fetch->urgency, Urgency::demand);
    read_fetch(*fetch);
    session_.fetched(std::move(fetch));
    settle();
    ASSERT_EQ(at(page), tag_of(page));
  }
  void late_faults_until_it_rests(std::int64_t ns = 100 * kMillisecond) {
    for (int i = 0; i < 10 && !rests(); ++i) late_fault(ns);
    ASSERT_TRUE(rests());
    bring_all();
  }
  bool rests() { return counter(counters().prefetch_given_up) == 1; }
  std::uint64_t brought() { return counter(counters().pages_prefetched); }

 private:
  std::uint64_t next_page_ = 1001;
};

TEST_F(PrefetchFromASlowStore, RestsWhenFaultsAreLateAgainAndAgain) {
  late_faults_until_it_rests();
  EXPECT_LT(brought(), 600u);
  host_.now += 900 * kMillisecond;
  bring_all();
  EXPECT_TRUE(rests());
  EXPECT_LT(brought(), 600u);
}

TEST_F(PrefetchFromASlowStore, GoesOnWhenNoFaultHadToWaitForASecond) {
  late_faults_until_it_rests();
  const Session::Next next = settle();
  EXPECT_EQ(next.wake_at_ns, host_.now + 1000 * kMillisecond);
  host_.now = next.wake_at_ns;
  bring_all();
  EXPECT_FALSE(rests());
  EXPECT_GT(brought(), 980u);  // some are left out
}

TEST_F(PrefetchFromASlowStore, GoesOnWhenAFaultHadTheStoreForItself) {
  late_faults_until_it_rests();
  late_fault(1 * kMillisecond);
  bring_all();
  EXPECT_FALSE(rests());
  EXPECT_GT(brought(), 980u);  // some are left out
}

TEST_F(PrefetchFromASlowStore, AFaultThatTakesNoLongerThanAloneIsNotLate) {
  late_faults_until_it_rests();
  late_fault(80 * kMillisecond);
  EXPECT_FALSE(rests());
  for (int i = 0; i < 5; ++i) late_fault(100 * kMillisecond);
  EXPECT_FALSE(rests());
}

TEST_F(PrefetchFromASlowStore, ASecondRestNeedsTwiceAsManyFaults) {
  late_faults_until_it_rests();
  late_fault(1 * kMillisecond);
  late_faults_until_it_rests();
  late_fault(1 * kMillisecond);
  EXPECT_TRUE(rests());
  late_fault(1 * kMillisecond);
  EXPECT_FALSE(rests());
}

TEST_F(Prefetch, AFewPagesAreLeftOutAndLookedFor) {
  std::vector<std::uint32_t> order;
  for (std::uint32_t page = 0; page < 1024; ++page) order.push_back(page);
  prefetch(order);
  bring_all();
  const std::uint64_t left_out = 1024 - present().size();
  EXPECT_GT(left_out, 0u);
  EXPECT_LT(left_out, 64u);
  EXPECT_EQ(counter(counters().prefetch_left_out), left_out);
  EXPECT_EQ(counter(counters().pages_prefetched), 1024 - left_out);
  for (std::uint64_t page = 0; page < 1024; ++page)
    if (!at(page)) kernel_.fault(pages(page));
  settle();
  EXPECT_EQ(present().size(), 1024u);
  EXPECT_EQ(counter(counters().prefetch_left_out_used), left_out);
  EXPECT_EQ(counter(counters().prefetch_late), 0u);
}

TEST_F(Prefetch, PagesThatAreNotInTheSetAreCounted) {
  prefetch({5, 6});
  bring_all();
  kernel_.fault(pages(100));
  settle();
  EXPECT_EQ(counter(counters().prefetch_missed), 1u);
}

TEST_F(Prefetch, FewPagesArePutBetweenTwoLooksAtMessages) {
  std::vector<std::uint32_t> order;
  for (std::uint32_t page = 0; page < 60; ++page) order.push_back(page);
  prefetch(order);
  settle();
  bring();
  kernel_.fault(pages(900));
  session_.step();
  EXPECT_EQ(at(900), tag_of(900));
  EXPECT_LE(present().size(), 17u);
  bring_all();
}

TEST_F(Prefetch, LittleIsUnderWayWhileOtherPagesAreAskedFor) {
  std::vector<std::uint32_t> order;
  for (std::uint32_t page = 0; page < 900; ++page) order.push_back(page);
  kernel_.fault(pages(1000));
  prefetch(order);
  settle();
  ASSERT_EQ(host_.fetches.size(), 1u);
  EXPECT_LE(host_.fetches.front()->granules.value, 16u);
  // Faults for what is on its way change nothing.
  host_.now += 1000 * kMillisecond;
  kernel_.fault(pages(800));
  settle();
  EXPECT_GE(host_.fetches.size(), 2u);
  bring_all();
  EXPECT_GT(present().size(), 880u);
}

class PrefetchAtHand : public Prefetch {
 protected:
  PrefetchAtHand() { EXPECT_TRUE(session_.add_region(pages(1024, 512), StoreOffset(0), kPage4K, copying_)); }
  void prefetch(const std::vector<std::uint32_t>& order) {
    session_.prefetch(std::make_shared<PrefetchOrder>(order), copying_, kSeed);
  }
  const std::shared_ptr<CopyingStore> copies_ = std::make_shared<CopyingStore>();
  const std::shared_ptr<StoreLane> copying_ = StoreLane::create(copies_).value();
};

TEST_F(PrefetchAtHand, WhatNeedsNoWaitingNeedsNoLane) {
  std::vector<std::uint32_t> order;
  for (std::uint32_t page = 0; page < 400; ++page) order.push_back(page);
  prefetch(order);
  settle();
  EXPECT_TRUE(host_.fetches.empty());
  EXPECT_GT(present().size(), 380u);
  for (const std::uint64_t page : present()) EXPECT_EQ(at(page), tag_of(page - 1024));
  EXPECT_TRUE(copies_->told.empty());
  EXPECT_EQ(session_.step().again, false);
}

TEST_F(PrefetchAtHand, WhatHasToBeWaitedForGoesToTheLane) {
  copies_->cached = false;
  prefetch({5, 6, 9});
  settle();
  EXPECT_EQ(host_.fetches.size(), 1u);
  bring_all();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{1029, 1030, 1033}));
  EXPECT_EQ(copies_->told, (std::set<std::uint64_t>{5, 6, 9}));
}

TEST_F(PrefetchAtHand, AFaultIsServedBetweenTwoPiecesOfIt) {
  std::vector<std::uint32_t> order;
  for (std::uint32_t page = 0; page < 400; ++page) order.push_back(page);
  prefetch(order);
  session_.step();
  kernel_.fault(pages(900));
  session_.step();
  EXPECT_EQ(at(900), tag_of(900));
  EXPECT_LE(present().size(), 33u);
  settle();
  EXPECT_GT(present().size(), 380u);
}

TEST_F(Prefetch, EndsWhereTheClientIsDetached) {
  prefetch({5, 6});
  settle();
  session_.begin_detach(Unreadable::poison);
  bring_all();
  EXPECT_EQ(session_.end(), SessionEnd::detached);
  EXPECT_EQ(at(5), tag_of(5));
}

TEST_F(Prefetch, HugePagesComeWhole) {
  ASSERT_TRUE(session_.add_region(pages(1024, 1024), StoreOffset(1024 * kPage), kPage2M, lane_));
  prefetch({1030, 1024, 2000});
  bring_all();
  EXPECT_EQ(present().size(), 1024u);
  EXPECT_EQ(counter(counters().pages_prefetched), 1024u);
  EXPECT_EQ(store_->reads.size(), 2u) << "one was read twice";
}

class InOrder : public Prefetch {
 protected:
  InOrder() : Prefetch(Background::off, nullptr, /*follow_streams=*/true) {}
  void touch(std::uint64_t first, std::uint64_t count) {
    for (std::uint64_t page = first; page < first + count; ++page) {
      if (!at(page)) kernel_.fault(pages(page));
      settle();
    }
  }
};

TEST_F(InOrder, WhatAClientWillComeToIsBrought) {
  touch(100, 3);
  ASSERT_EQ(host_.fetches.size(), 1u);
  EXPECT_EQ(host_.fetches.front()->urgency, Urgency::prefetch);
  bring_all();
  // One is left, to see whether the client goes on.
  EXPECT_EQ(present().size(), 3 + 63u);
  EXPECT_EQ(present().front(), 100u);
  EXPECT_EQ(present().back(), 166u);
  for (const std::uint64_t page : present()) EXPECT_EQ(at(page), tag_of(page));
  EXPECT_EQ(counter(counters().pages_prefetched), 63u);
  const std::uint64_t faults = counter(counters().faults);
  touch(103, 64);
  EXPECT_EQ(counter(counters().faults), faults + 1);
  bring_all();
  EXPECT_GT(present().back(), 250u);
}

TEST_F(InOrder, NothingIsBroughtBehindTheRegion) {
  touch(1000, 4);
  bring_all();
  touch(1004, 20);
  bring_all();
  EXPECT_EQ(present().size(), 24u);
}

TEST_F(InOrder, BackwardsThePagesBeforeAreBrought) {
  for (const std::uint64_t page : {50u, 49u, 48u}) touch(page, 1);
  bring_all();
  EXPECT_EQ(present().front(), 0u);
  EXPECT_EQ(present().back(), 50u);
}

TEST_F(InOrder, WhatWasRemovedIsNotBrought) {
  kernel_.removed(pages(110, 10));
  touch(100, 3);
  bring_all();
  EXPECT_EQ(at(109), tag_of(109));
  for (std::uint64_t page = 110; page < 120; ++page) EXPECT_EQ(at(page), std::nullopt);
  EXPECT_EQ(at(120), tag_of(120));
}

TEST_F(InOrder, NothingIsBroughtWherePagesAreRecorded) {
  session_.record(AccessRecord::create(PageCount(kPages)).value(), lane_);
  touch(100, 10);
  EXPECT_TRUE(host_.fetches.empty());
}

TEST_F(InOrder, ADroppedRegionGetsNothing) {
  touch(100, 2);
  kernel_.fault(pages(102));
  session_.step();
  ASSERT_TRUE(session_.drop(pages(0, 1024)));
  bring_all();
  EXPECT_TRUE(host_.fetches.empty());
}

class InBackground : public Prefetch {
 protected:
  InBackground() : Prefetch(Background::full) {}
};

TEST_F(InBackground, EverythingComesThatNobodyHasAskedFor) {
  kernel_.fault(pages(500));
  settle();
  bring_all();
  EXPECT_EQ(present().size(), 1024u);
  EXPECT_EQ(counter(counters().pages_background), 1023u);
  EXPECT_EQ(counter(counters().pages_prefetched), 0u);
  const Session::Next next = settle();
  EXPECT_EQ(next.wake_at_ns, 0) << "it looks for more for ever";
}

TEST_F(InBackground, HolesAreLeftAlone) {
  for (std::uint64_t page = 3; page < 900; ++page) store_->holes.insert(page);
  bring_all();
  EXPECT_EQ(present().size(), 1024u - 897u);
}

TEST_F(InBackground, WhatWasRecordedComesFirst) {
  prefetch({900, 1000});
  settle();
  EXPECT_EQ(host_.fetches.front()->urgency, Urgency::prefetch);
  bring_all();
  EXPECT_EQ(present().size(), 1024u);
  EXPECT_EQ(counter(counters().pages_prefetched), 2u);
}

TEST_F(InBackground, NothingIsBegunWhileAFaultWaits) {
  store_->cached = false;
  kernel_.fault(pages(1000));
  settle();
  while (host_.fetches.size() > 1) {
    auto fetch = std::move(host_.fetches.front());
    host_.fetches.pop_front();
    if (fetch->urgency == Urgency::demand) {
      host_.fetches.push_back(std::move(fetch));
      continue;
    }
    read_fetch(*fetch);
    session_.fetched(std::move(fetch));
    settle();
  }
  ASSERT_EQ(host_.fetches.size(), 1u);
  EXPECT_EQ(host_.fetches.front()->urgency, Urgency::demand);
  bring_all();
  EXPECT_EQ(present().size(), 1024u);
}

TEST_F(InBackground, HugePagesComeWhole) {
  ASSERT_TRUE(session_.add_region(pages(1024, 1024), StoreOffset(1024 * kPage), kPage2M, lane_));
  bring_all();
  EXPECT_EQ(present().size(), 2048u);
}

TEST_F(InBackground, WhatWasRemovedDoesNotComeBack) {
  settle();
  kernel_.removed(pages(0, 10));
  bring_all();
  EXPECT_EQ(present().size(), 1014u);
}

class WhenIdle : public Prefetch {
 protected:
  WhenIdle() : Prefetch(Background::idle) {}
};

TEST_F(WhenIdle, NothingIsBegunSoonAfterAFault) {
  kernel_.fault(pages(1000));
  const Session::Next next = settle();
  EXPECT_TRUE(host_.fetches.empty());
  ASSERT_GT(next.wake_at_ns, host_.now);
  host_.now = next.wake_at_ns;
  bring_all();
  EXPECT_EQ(present().size(), 1024u);
}

class WithinABudget : public Prefetch {
 protected:
  // A batch of 64 pages takes a second.
  WithinABudget() : Prefetch(Background::full, std::make_shared<IoBudget>(ByteCount(64 * kPage))) {}
};

TEST_F(WithinABudget, OneBatchComesAfterTheOther) {
  const std::int64_t start = host_.now;
  for (int batches = 1; batches <= 16; ++batches) {
    bring_all();
    EXPECT_EQ(present().size(), static_cast<std::size_t>(64 * batches));
    EXPECT_EQ(host_.now - start, (batches - 1) * 1000 * kMillisecond);
    host_.now = std::max(host_.now, settle().wake_at_ns);
  }
}

TEST(IoBudget, GrantsInTurnWhatManyAskFor) {
  IoBudget budget(ByteCount(1000));
  EXPECT_EQ(budget.take(ByteCount(1000), 5), 5);
  EXPECT_EQ(budget.take(ByteCount(500), 6), 1'000'000'005);
  EXPECT_EQ(budget.take(ByteCount(500), 7), 1'500'000'005);
  EXPECT_EQ(budget.take(ByteCount(1), 9'000'000'000), 9'000'000'000);
}

TEST(IoBudget, WithoutALimitGrantsAtOnce) {
  IoBudget budget(ByteCount(0));
  EXPECT_EQ(budget.take(ByteCount(1u << 30), 5), 5);
  EXPECT_EQ(budget.take(ByteCount(1u << 30), 5), 5);
}

TEST_F(SessionTest, ARecordHasThePagesThatWereAskedForAndNotTheirNeighbours) {
  const auto record = AccessRecord::create(PageCount(kPages)).value();
  session_.record(record, lane_);
  for (const std::uint64_t page : {9u, 3u, 10u}) kernel_.fault(pages(page));
  settle();
  EXPECT_EQ(at(2), tag_of(2));
  const std::vector<std::uint32_t> recorded(record->pages().begin(), record->pages().end());
  EXPECT_EQ(recorded, (std::vector<std::uint32_t>{9, 3}));
}

}  // namespace
}  // namespace uffdkit
