// Sessions driven step by step, against a userfaultfd that does what the test says and a clock that the test
// moves: what the tests of sessions share.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <vector>

#include "engine/session.h"
#include "store/read_ahead.h"

namespace uffdkit::session_fixture {

inline constexpr std::uint64_t kPage = 4096;
inline constexpr std::uint64_t kBase = 0x7000'0000'0000;
inline constexpr std::uint64_t kPages = 4096;  // of the store
inline constexpr std::int64_t kMillisecond = 1'000'000;

inline AddressRange pages(std::uint64_t first, std::uint64_t count = 1) {
  return {Address(kBase + first * kPage), ByteCount(count * kPage)};
}

// The first byte of a page of the store; never 0.
inline std::byte tag_of(std::uint64_t store_page) {
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
  std::size_t room = 0;        // messages that the last read(2) had room for
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
    room = bytes / sizeof(abi::Msg);
    if (read_error != 0) return -read_error;
    if (messages.empty()) return -EAGAIN;
    const std::size_t count = std::min(room, messages.size());
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
  unsigned times_told = 0;
  std::uint64_t unit_pages = 1;
  void will_need(StoreOffset from, ByteCount bytes) noexcept override {
    ++times_told;
    for (std::uint64_t at = 0; at < bytes.value; at += kPage) told.insert((from.value + at) / kPage);
  }
  std::uint64_t unit_at(StoreOffset from) const noexcept override { return from.value / kPage / unit_pages; }
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

}  // namespace uffdkit::session_fixture
