#include "engine/store_lane.h"

#include <gtest/gtest.h>
#include <uffdkit/faulty_store.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "store/read_ahead.h"
#include "support/idle_work.h"

namespace uffdkit {
namespace {

// Holds every reader until it is let go.
class Gate final : public Store {
 public:
  void wait_for_readers(int readers) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return inside_ >= readers; });
  }
  void let_go() {
    const std::lock_guard lock(mutex_);
    open_ = true;
    changed_.notify_all();
  }
  // One reader goes, and another comes: which page it reads.
  std::uint64_t let_one_go() {
    std::unique_lock lock(mutex_);
    const std::size_t before = entered_.size();
    ++may_go_;
    changed_.notify_all();
    changed_.wait(lock, [&] { return entered_.size() > before; });
    return entered_.back().value / 4096;
  }
  int most_inside() {
    const std::lock_guard lock(mutex_);
    return most_inside_;
  }

  ByteCount size() const noexcept override { return ByteCount(1u << 20); }
  std::string name() const override { return "gate"; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(1u << 20)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte>, Wait) noexcept override {
    std::unique_lock lock(mutex_);
    entered_.push_back(from);
    most_inside_ = std::max(most_inside_, ++inside_);
    changed_.notify_all();
    changed_.wait(lock, [&] { return open_ || may_go_ > 0; });
    if (!open_) --may_go_;
    --inside_;
    return ReadStatus::done;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int inside_ = 0;
  int most_inside_ = 0;
  std::vector<StoreOffset> entered_;
  int may_go_ = 0;
  bool open_ = false;
};

class Sink final : public FetchSink {
 public:
  void fetched(std::unique_ptr<Fetch> fetch) override {
    const std::lock_guard lock(mutex_);
    ids_.push_back(fetch->id);
    last_failed_ = fetch->failed.any();
    changed_.notify_all();
  }
  std::vector<std::uint64_t> wait_for(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return ids_.size() >= count; });
    std::sort(ids_.begin(), ids_.end());
    return ids_;
  }
  bool last_failed() {
    const std::lock_guard lock(mutex_);
    return last_failed_;
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::uint64_t> ids_;
  bool last_failed_ = false;
};

std::unique_ptr<Fetch> fetch_of(const std::shared_ptr<Store>& store, std::uint64_t id) {
  auto fetch = std::make_unique<Fetch>();
  fetch->id = id;
  fetch->granules = PageCount(1);
  fetch->store = store;
  fetch->buffer = std::make_unique<std::byte[]>(4096);
  return fetch;
}

TEST(StoreLane, GrowsToItsMostThreadsWhileReadersAreStuckAndAnswersAll) {
  const auto gate = std::make_shared<Gate>();
  const auto lane = StoreLane::create(gate).value();
  const auto sink = std::make_shared<Sink>();
  for (std::uint64_t id = 0; id < 50; ++id) lane->submit(fetch_of(gate, id), sink);
  gate->wait_for_readers(StoreLane::kThreadsMax);
  gate->let_go();
  const std::vector<std::uint64_t> ids = sink->wait_for(50);
  for (std::uint64_t id = 0; id < 50; ++id) EXPECT_EQ(ids[id], id);
  EXPECT_EQ(gate->most_inside(), static_cast<int>(StoreLane::kThreadsMax));
}

// Of page number `id`.
std::unique_ptr<Fetch> fetch_of_page(const std::shared_ptr<Store>& store, std::uint64_t id, Urgency urgency) {
  auto fetch = fetch_of(store, id);
  fetch->from = StoreOffset(id * 4096);
  fetch->urgency = urgency;
  if (urgency == Urgency::demand) return fetch;
  fetch->pieces = {{.from = fetch->from, .granules = {PageIndex(0), PageCount(1)}}};
  return fetch;
}

TEST(StoreLane, ReadsWhatIsUrgentFirst) {
  const auto gate = std::make_shared<Gate>();
  const auto lane = StoreLane::create(gate).value();
  const auto sink = std::make_shared<Sink>();
  // All threads are busy with what faults wait for, then one of them is free for what waits here.
  for (std::uint64_t id = 0; id < StoreLane::kThreadsMax; ++id) lane->submit(fetch_of(gate, id), sink);
  gate->wait_for_readers(StoreLane::kThreadsMax);
  lane->submit(fetch_of_page(gate, 102, Urgency::background), sink);
  lane->submit(fetch_of_page(gate, 101, Urgency::prefetch), sink);
  lane->submit(fetch_of_page(gate, 100, Urgency::demand), sink);
  EXPECT_EQ(gate->let_one_go(), 100u);
  EXPECT_EQ(gate->let_one_go(), 101u);
  EXPECT_EQ(gate->let_one_go(), 102u);
  gate->let_go();
  sink->wait_for(StoreLane::kThreadsMax + 3);
}

TEST(StoreLane, KeepsThreadsForFaultsWhileOthersAreRead) {
  const auto gate = std::make_shared<Gate>();
  const auto lane = StoreLane::create(gate).value();
  const auto sink = std::make_shared<Sink>();
  for (std::uint64_t id = 0; id < 2 * StoreLane::kThreadsMax; ++id)
    lane->submit(fetch_of_page(gate, id, Urgency::prefetch), sink);
  gate->wait_for_readers(StoreLane::kThreadsMax / 2);
  EXPECT_EQ(gate->most_inside(), static_cast<int>(StoreLane::kThreadsMax / 2));
  lane->submit(fetch_of(gate, 100), sink);
  gate->wait_for_readers(StoreLane::kThreadsMax / 2 + 1);
  gate->let_go();
  sink->wait_for(2 * StoreLane::kThreadsMax + 1);
}

TEST(StoreLane, GoesWithoutWaitingForAReaderThatIsStuck) {
  const auto gate = std::make_shared<Gate>();
  auto lane = StoreLane::create(gate).value();
  const auto sink = std::make_shared<Sink>();
  for (std::uint64_t id = 0; id < 20; ++id) lane->submit(fetch_of(gate, id), sink);
  gate->wait_for_readers(StoreLane::kThreadsMax);
  lane.reset();  // returns though the readers are inside
  gate->let_go();
  // Those that were being read still come; the others went with the lane.
  EXPECT_EQ(sink->wait_for(StoreLane::kThreadsMax).size(), StoreLane::kThreadsMax);
}

TEST(StoreLane, DropsWhatNobodyWaitsForAnyMore) {
  const auto gate = std::make_shared<Gate>();
  const auto lane = StoreLane::create(gate).value();
  auto gone = std::make_shared<Sink>();
  lane->submit(fetch_of(gate, 1), gone);
  gate->wait_for_readers(1);
  gone.reset();
  gate->let_go();
  const auto sink = std::make_shared<Sink>();
  lane->submit(fetch_of(gate, 2), sink);
  EXPECT_EQ(sink->wait_for(1), std::vector<std::uint64_t>{2});
}

TEST(StoreLane, ServesOnAfterItsThreadsWereIdle) {
  const auto store = make_zero_store(ByteCount(4096));
  const auto lane = StoreLane::create(store).value();
  const auto sink = std::make_shared<Sink>();
  for (std::uint64_t id = 1; id <= 200; ++id) {
    lane->submit(fetch_of(store, id), sink);
    EXPECT_EQ(sink->wait_for(id).size(), id);
  }
}

TEST(StoreLane, TriesWhatCannotBeReadAgainAndGivesUpAfterSoManyTries) {
  const auto recovers = [](const char* fault, unsigned retries) {
    const auto store =
        make_faulty_store(make_zero_store(ByteCount(4096)), {parse_store_fault(fault).value()});
    const auto lane =
        StoreLane::create(store, {.count = retries, .first_pause = std::chrono::milliseconds(1)}).value();
    const auto sink = std::make_shared<Sink>();
    lane->submit(fetch_of(store, 1), sink);
    return sink->wait_for(1).size() == 1 && !sink->last_failed();
  };
  // The first read takes two: of the whole, then of the page alone.
  EXPECT_TRUE(recovers("error,times=4", 3));
  EXPECT_FALSE(recovers("error,times=5", 3));
  EXPECT_FALSE(recovers("error", 3));
}

TEST(StoreLane, ReadsForOthersWhileItWaitsToTryAgain) {
  const auto store =
      make_faulty_store(make_zero_store(ByteCount(1u << 20)), {parse_store_fault("error,to=4K").value()});
  const auto lane = StoreLane::create(store, {.count = 1, .first_pause = std::chrono::hours(1)}).value();
  const auto sink = std::make_shared<Sink>();
  lane->submit(fetch_of(store, 1), sink);
  for (std::uint64_t id = 2; id < 20; ++id) {
    auto fetch = fetch_of(store, id);
    fetch->from = StoreOffset(4096);
    lane->submit(std::move(fetch), sink);
  }
  EXPECT_EQ(sink->wait_for(18).front(), 2u);
}

TEST(StoreLane, WorksWhenIdleOncePerCall) {
  const auto lane = StoreLane::create(make_zero_store(ByteCount(4096))).value();
  const auto pieces = std::make_shared<test::CountedWork>();
  lane->when_idle(pieces);
  pieces->wait();
  lane->when_idle(pieces);
  pieces->wait();
  EXPECT_EQ(pieces->done(), 2);
}

TEST(StoreLane, DoesNoIdleWorkWhileReadsWait) {
  const auto gate = std::make_shared<Gate>();
  const auto lane = StoreLane::create(gate).value();
  const auto sink = std::make_shared<Sink>();
  const auto pieces = std::make_shared<test::CountedWork>();
  for (std::uint64_t id = 0; id < 20; ++id) lane->submit(fetch_of(gate, id), sink);
  gate->wait_for_readers(StoreLane::kThreadsMax);
  lane->when_idle(pieces);
  EXPECT_EQ(pieces->done(), 0);
  gate->let_go();
  sink->wait_for(20);
  pieces->wait();
}

TEST(StoreLane, LeavesOutIdleWorkThatIsGone) {
  const auto lane = StoreLane::create(make_zero_store(ByteCount(4096))).value();
  lane->when_idle(std::make_shared<test::CountedWork>());
  const auto pieces = std::make_shared<test::CountedWork>();
  lane->when_idle(pieces);
  pieces->wait();
  EXPECT_EQ(pieces->done(), 1);
}

// ---- reads together ---------------------------------------------------------------------------------------

constexpr std::byte kByRead{1};
constexpr std::byte kTogether{2};

// As a file is: each of its pages can be read by others, but for those that lie beyond its end.
class FileLikeStore final : public Store, public ReadAhead {
 public:
  static constexpr std::uint64_t kEnd = 1000 * 4096;

  ByteCount size() const noexcept override { return ByteCount(1u << 30); }
  std::string name() const override { return "a file"; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(1u << 30)};
  }
  Result<ReadStatus> read(StoreOffset, std::span<std::byte> to, Wait) noexcept override {
    ++reads;
    is_open.wait(false);
    std::ranges::fill(to, kByRead);
    return ReadStatus::done;
  }
  void will_need(StoreOffset, ByteCount) noexcept override { ++told; }
  std::uint64_t unit_at(StoreOffset from) const noexcept override { return from.value / 4096; }
  bool is_only_copied() const noexcept override { return true; }
  std::optional<FilePart> part_of(StoreOffset from, ByteCount bytes) const noexcept override {
    if (!has_parts || from.value + bytes.value > kEnd) return std::nullopt;
    return FilePart{.file = 3, .offset = from.value};
  }

  void open() {
    is_open = true;
    is_open.notify_all();
  }

  bool has_parts = true;
  std::atomic<int> reads{0};
  std::atomic<int> told{0};
  std::atomic<bool> is_open{true};  // while it is not, readers wait
};

// Answers all that is under way at once, and the last first; the pages of `broken` with an error, those of
// `cut` with half of what was asked for. While it is closed, it answers nobody.
class FakeReaders final : public BatchReaders {
 public:
  bool has_any() const override { return true; }
  BatchReader* take() override { return is_free && !taken_.exchange(true) ? &reader_ : nullptr; }
  void give_back(BatchReader&) override {
    EXPECT_TRUE(reader_.begun.empty());
    taken_ = false;
  }
  void open() {
    const std::lock_guard lock(mutex_);
    is_open_ = true;
    changed_.notify_all();
  }
  void close() {
    const std::lock_guard lock(mutex_);
    is_open_ = false;
  }
  // Until so many reads have begun in all.
  void wait_for_begun(std::size_t count) {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [&] { return all_begun_ >= count; });
  }
  std::size_t most_together() {
    const std::lock_guard lock(mutex_);
    return most_together_;
  }

  bool is_free = true;
  std::vector<std::uint64_t> broken;
  std::vector<std::uint64_t> cut;

 private:
  class Reader final : public BatchReader {
   public:
    explicit Reader(FakeReaders& owner) : owner_(owner) {}
    std::size_t most() const override { return 8; }
    void begin(FilePart from, std::span<std::byte> to, std::uint64_t tag) override {
      EXPECT_LT(begun.size(), most());
      EXPECT_EQ(from.file, 3);
      std::ranges::fill(to, kTogether);
      const std::uint64_t page = from.offset / 4096;
      std::int64_t result = static_cast<std::int64_t>(to.size());
      if (std::ranges::count(owner_.broken, page) != 0) result = -EIO;
      if (std::ranges::count(owner_.cut, page) != 0) result /= 2;
      begun.push_back({.tag = tag, .result = result});
      const std::lock_guard lock(owner_.mutex_);
      ++owner_.all_begun_;
      owner_.changed_.notify_all();
    }
    std::span<const Done> wait() override {
      EXPECT_FALSE(begun.empty());
      std::unique_lock lock(owner_.mutex_);
      owner_.changed_.wait(lock, [&] { return owner_.is_open_; });
      owner_.most_together_ = std::max(owner_.most_together_, begun.size());
      done_.assign(begun.rbegin(), begun.rend());
      begun.clear();
      return done_;
    }
    std::vector<Done> begun;

   private:
    FakeReaders& owner_;
    std::vector<Done> done_;
  };

  std::mutex mutex_;
  std::condition_variable changed_;
  bool is_open_ = true;
  std::size_t all_begun_ = 0;
  std::size_t most_together_ = 0;
  std::atomic<bool> taken_{false};
  Reader reader_{*this};
};

class ReadsTogether : public testing::Test {
 protected:
  // One that nobody waits for, of these runs of pages, one behind the other in its buffer.
  Fetch pieces(const std::vector<std::pair<std::uint64_t, std::uint64_t>>& runs) const {
    Fetch fetch{};
    fetch.id = 1;
    fetch.granules = PageCount(0);
    fetch.store = store_;
    for (const auto& [page, count] : runs) {
      fetch.pieces.push_back(
          {.from = StoreOffset(page * 4096), .granules = {PageIndex(page), PageCount(count)}});
      fetch.granules = fetch.granules + PageCount(count);
    }
    fetch.urgency = Urgency::prefetch;
    fetch.buffer = std::make_unique<std::byte[]>(fetch.bytes().value);
    return fetch;
  }
  static std::vector<std::byte> first_bytes(const Fetch& fetch) {
    std::vector<std::byte> bytes;
    for (std::size_t at = 0; at < fetch.bytes().value; at += 4096) bytes.push_back(fetch.buffer[at]);
    return bytes;
  }

  // Has the lane read together what it is asked for: all of its threads are busy while that is, and nothing
  // that is read together comes back before readers_->open().
  void submit_many(StoreLane& lane, const std::shared_ptr<Sink>& sink, std::uint64_t count) {
    store_->is_open = false;
    readers_->close();
    for (std::uint64_t id = 0; id < count; ++id)
      lane.submit(fetch_of_page(store_, id, Urgency::demand), sink);
    store_->open();
    readers_->wait_for_begun(1);
  }

  const std::shared_ptr<FileLikeStore> store_ = std::make_shared<FileLikeStore>();
  const std::shared_ptr<FakeReaders> readers_ = std::make_shared<FakeReaders>();
};

TEST_F(ReadsTogether, ManySmallPiecesAreReadAsManyAtOnceAsCanBe) {
  std::vector<std::pair<std::uint64_t, std::uint64_t>> runs;
  for (std::uint64_t page = 0; page < 40; page += 2) runs.emplace_back(page, 1);
  Fetch fetch = pieces(runs);
  read_fetch(fetch, readers_.get());
  EXPECT_TRUE(fetch.failed.none());
  EXPECT_EQ(first_bytes(fetch), std::vector<std::byte>(20, kTogether));
  EXPECT_EQ(readers_->most_together(), 8u);
  EXPECT_EQ(store_->reads, 0);
  EXPECT_EQ(store_->told, 0);
}

TEST_F(ReadsTogether, WhatCannotBeReadSoIsReadAsWithoutIt) {
  readers_->broken = {2};
  readers_->cut = {4};
  // The last one is beyond the file's end.
  Fetch fetch = pieces({{0, 1}, {2, 1}, {4, 2}, {8, 1}, {1000, 1}});
  read_fetch(fetch, readers_.get());
  EXPECT_TRUE(fetch.failed.none());
  EXPECT_EQ(first_bytes(fetch),
            (std::vector<std::byte>{kTogether, kByRead, kByRead, kByRead, kTogether, kByRead}));
  EXPECT_EQ(store_->told, 1);
}

TEST_F(ReadsTogether, LargePiecesAFewAndWhatFindsNoReaderAreToldOfAndReadOneByOne) {
  Fetch large = pieces({{0, 3}, {4, 3}, {8, 3}, {12, 3}, {16, 3}});
  read_fetch(large, readers_.get());
  Fetch few = pieces({{0, 1}, {2, 1}, {4, 1}, {6, 1}});
  read_fetch(few, readers_.get());
  const std::vector<std::pair<std::uint64_t, std::uint64_t>> many = {{0, 1}, {2, 1}, {4, 1}, {6, 1}, {8, 1}};
  readers_->is_free = false;
  Fetch busy = pieces(many);
  read_fetch(busy, readers_.get());
  readers_->is_free = true;
  Fetch without = pieces(many);
  read_fetch(without);
  // As of a compressed image.
  store_->has_parts = false;
  Fetch worked_for = pieces(many);
  read_fetch(worked_for, readers_.get());
  for (const Fetch* fetch : {&large, &few, &busy, &without, &worked_for})
    for (const std::byte byte : first_bytes(*fetch)) EXPECT_EQ(byte, kByRead);
  EXPECT_EQ(readers_->most_together(), 0u);
  EXPECT_EQ(store_->told, 5 + 4 + 5 + 5 + 5);
}

TEST_F(ReadsTogether, PagesThatAreOnlyToBeOnTheirWayAreToldOf) {
  Fetch fetch = pieces({{0, 1}, {2, 1}, {4, 1}, {6, 1}, {8, 1}, {10, 1}});
  fetch.pieces[1].read = false;
  fetch.granules = PageCount(5);
  read_fetch(fetch, readers_.get());
  std::vector<std::byte> bytes = first_bytes(fetch);
  EXPECT_EQ(bytes, std::vector<std::byte>(5, kTogether));
  EXPECT_EQ(store_->told, 1);
}

TEST_F(ReadsTogether, FaultsThatComeWhileOthersAreReadJoinThem) {
  const auto lane = StoreLane::create(store_, {.count = 0}, {}, {}, readers_).value();
  const auto sink = std::make_shared<Sink>();
  readers_->broken = {30};
  submit_many(*lane, sink, 200);
  readers_->open();
  const std::vector<std::uint64_t> ids = sink->wait_for(200);
  for (std::uint64_t id = 0; id < 200; ++id) EXPECT_EQ(ids[id], id);
  EXPECT_FALSE(sink->last_failed());
  EXPECT_GE(readers_->most_together(), 2u);
}

TEST_F(ReadsTogether, WhateverFailsTogetherIsReadAlone) {
  const auto lane = StoreLane::create(store_, {.count = 0}, {}, {}, readers_).value();
  const auto sink = std::make_shared<Sink>();
  // All that is read together fails, and is read alone.
  for (std::uint64_t page = 0; page < 200; ++page) readers_->broken.push_back(page);
  submit_many(*lane, sink, 200);
  readers_->open();
  EXPECT_GE(sink->wait_for(200).size(), 200u);
}

TEST_F(ReadsTogether, TheLaneMayGoWhileItIsReadFor) {
  auto lane = StoreLane::create(store_, {}, {}, {}, readers_).value();
  const auto sink = std::make_shared<Sink>();
  submit_many(*lane, sink, 200);
  lane.reset();
  readers_->open();
  EXPECT_GE(sink->wait_for(1).size(), 1u);
}

}  // namespace
}  // namespace uffdkit
