// How a session serves faults, and follows what the client does to its memory.
#include "unit/session_fixture.h"

#include <numeric>

namespace uffdkit {
namespace {

using namespace session_fixture;

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

// Faults for pages that nobody has asked for come in groups of `together`. Says how many messages the reads
// had room for that brought them.
class SessionReads : public SessionTest {
 protected:
  SessionReads() : SessionTest(/*around=*/1) {}
  std::set<std::size_t> fault(int groups, int together) {
    std::set<std::size_t> rooms;
    for (int group = 0; group < groups; ++group) {
      for (int i = 0; i < together; ++i) kernel_.fault(pages(faults_++));
      while (!kernel_.messages.empty()) {
        session_.step();
        rooms.insert(kernel_.room);
      }
    }
    return rooms;
  }
  std::uint64_t faults_ = 0;
};

TEST_F(SessionReads, AskForOneMessageWhereTheyComeOneByOne) {
  fault(64, 1);
  // Now and then for all, to see whether there are several.
  EXPECT_EQ(fault(32, 1), (std::set<std::size_t>{1, kInboxMessages}));
}

TEST_F(SessionReads, AskForAllMessagesWhereSeveralCome) {
  fault(64, 1);
  fault(32, 2);
  EXPECT_EQ(fault(32, 2), std::set{kInboxMessages});
}

// Then it is known that nothing else waits.
TEST_F(SessionReads, AskForAllMessagesAfterOneThatIsNotAnsweredAtOnce) {
  fault(64, 1);
  kernel_.removed(pages(1000));
  session_.step();
  EXPECT_EQ(kernel_.room, kInboxMessages);
  EXPECT_EQ(fault(16, 1), std::set{kInboxMessages});
}

TEST_F(SessionReads, AskForAllMessagesWhileThereIsSomethingElseToBring) {
  fault(64, 1);
  std::vector<std::uint32_t> order(700);
  std::iota(order.begin(), order.end(), 300);
  session_.prefetch(std::make_shared<PrefetchOrder>(std::move(order)), lane_, 0);
  EXPECT_EQ(fault(32, 1), std::set{kInboxMessages});
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

TEST_F(SessionTest, WhereTheKernelPutsOneOffTheOthersAreNotTriedInVain) {
  kernel_.changing = true;
  for (const std::uint64_t page : {6ul, 100ul, 200ul, 300ul}) kernel_.fault(pages(page));
  Session::Next next = settle();
  EXPECT_EQ(kernel_.count(abi::kIoctlCopy), 1u);
  EXPECT_LE(next.wake_at_ns - host_.now, kMillisecond / 10);
  // Until the client has changed its memory, one attempt at a time says that it has not.
  for (int i = 0; i < 20; ++i) {
    host_.now = next.wake_at_ns;
    next = settle();
    EXPECT_EQ(kernel_.count(abi::kIoctlCopy), static_cast<std::size_t>(i) + 2);
  }
  kernel_.changing = false;
  run_out();
  for (const std::uint64_t page : {6ul, 100ul, 200ul, 300ul}) EXPECT_EQ(at(page), tag_of(page)) << page;
}

TEST_F(SessionTest, ThoseThatWereNotTriedAreTriedAlsoWhenTheOneThatWasIsGone) {
  kernel_.changing = true;
  for (const std::uint64_t page : {6ul, 100ul}) kernel_.fault(pages(page));
  settle();
  kernel_.changing = false;
  ASSERT_TRUE(session_.drop(pages(6)));
  run_out();
  EXPECT_EQ(at(100), tag_of(100));
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

// A page that cannot be read, for a session that does this about it.
class UnreadablePage : public SessionTest {
 protected:
  explicit UnreadablePage(OnError on_error) : SessionTest(4, {}, on_error) {
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

class KillTest : public UnreadablePage {
 protected:
  KillTest() : UnreadablePage(OnError::kill) {}
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

class PauseTest : public UnreadablePage {
 protected:
  PauseTest() : UnreadablePage(OnError::pause) {}
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

}  // namespace
}  // namespace uffdkit
