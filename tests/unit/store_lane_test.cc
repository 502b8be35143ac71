#include "engine/store_lane.h"

#include <gtest/gtest.h>
#include <uffdkit/faulty_store.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

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

}  // namespace
}  // namespace uffdkit
