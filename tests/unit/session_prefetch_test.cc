// What a session brings before it is asked for: working sets, streams, and in the background.
#include "unit/session_fixture.h"

namespace uffdkit {
namespace {

using namespace session_fixture;

class Prefetch : public SessionTest {
 protected:
  explicit Prefetch(Background background = Background::off, std::shared_ptr<IoBudget> budget = nullptr,
                    bool follow_streams = false, unsigned around = 1)
      : SessionTest(around, {}, OnError::poison, background, std::move(budget), follow_streams) {}

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

TEST_F(Prefetch, LittleIsUnderWayForAsLongAsAFaultForAnotherPageWaits) {
  store_->cached = false;
  std::vector<std::uint32_t> order;
  for (std::uint32_t page = 0; page < 900; ++page) order.push_back(page);
  kernel_.fault(pages(1000));
  prefetch(order);
  settle();
  ASSERT_EQ(host_.fetches.size(), 2u);
  const auto fault = std::move(host_.fetches.front());
  host_.fetches.pop_front();
  ASSERT_EQ(fault->urgency, Urgency::demand);
  host_.now += 1000 * kMillisecond;
  bring();
  settle();
  ASSERT_EQ(host_.fetches.size(), 1u);
  EXPECT_LE(host_.fetches.front()->granules.value, 4u);
}

class PrefetchWithNeighbours : public Prefetch {
 protected:
  PrefetchWithNeighbours() : Prefetch(Background::off, nullptr, false, 16) {}
};

TEST_F(PrefetchWithNeighbours, WithAPageOfTheOrderComeThoseNextToItThatAreInItToo) {
  prefetch({500, 501, 502, 504, 33});
  kernel_.fault(pages(501));
  settle();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{500, 501, 502}));
}

TEST_F(PrefetchWithNeighbours, TheSameOfOneThatHasToBeWaitedFor) {
  store_->cached = false;
  prefetch({500, 501, 504});
  settle();
  host_.fetches.clear();
  kernel_.fault(pages(501));
  settle();
  ASSERT_EQ(host_.fetches.size(), 1u);
  EXPECT_EQ(host_.fetches.front()->granules.value, 2u);
  bring_all();
  EXPECT_EQ(present(), (std::vector<std::uint64_t>{500, 501}));
}

TEST_F(PrefetchWithNeighbours, WithAnyOtherPageComeAllOfItsNeighbours) {
  prefetch({500, 501});
  settle();
  kernel_.fault(pages(17));
  settle();
  EXPECT_EQ(present().size(), 16u);
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

TEST_F(PrefetchAtHand, TheStoreIsToldOnceOfWhatItReadsAsAWhole) {
  copies_->cached = false;
  copies_->unit_pages = 16;
  prefetch({0, 1, 3, 5, 20, 31, 32});
  bring_all();
  // Of 0 to 5, which are one; of 20; of 31 and 32, which are two.
  EXPECT_EQ(copies_->times_told, 3u);
  EXPECT_TRUE(copies_->told.contains(0));
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
