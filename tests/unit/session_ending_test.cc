// How sessions end: completed, released, failed, gone; and children that cannot be served.
#include <sys/resource.h>
#include <unistd.h>

#include "unit/session_fixture.h"

namespace uffdkit {
namespace {

using namespace session_fixture;

// Until the session ends, at most so many steps; what it wants to read meanwhile is read.
void run_to_end(Session& session, FakeHost& host, int steps_max) {
  for (int i = 0; i < steps_max && !session.end(); ++i) {
    session.step();
    if (host.fetches.empty()) continue;
    auto fetch = std::move(host.fetches.front());
    host.fetches.pop_front();
    read_fetch(*fetch);
    session.fetched(std::move(fetch));
  }
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
    run_to_end(session, host_, 10'000);
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
    run_to_end(session, host_, 100);
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

TEST_F(SessionTest, ADeadClientsMemoryIsServedForAsLongAsOthersUseIt) {
  session_.check_target();
  EXPECT_FALSE(session_.end());
  kernel_.fault(pages(6));
  settle();
  EXPECT_EQ(at(6), tag_of(6));
  kernel_.gone = true;
  session_.check_target();
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

// What it has shows itself when nobody serves it any more; a zero would go to all who share it.
TEST_F(SessionTest, ReleasingPutsZerosWhereTheSharedImagesMemoryHasNothingAndNowhereElse) {
  const std::shared_ptr<SharedImage> image = SharedImage::create(lane_).value();
  std::vector<std::byte> scratch(8 * kPage);
  ASSERT_EQ(image->fill({PageIndex(0), PageCount(4)}, scratch).fill, SharedImage::Fill::done);
  ASSERT_EQ(image->fill({PageIndex(20), PageCount(4)}, scratch).fill, SharedImage::Fill::done);
  ASSERT_TRUE(session_.add_region(pages(2000, 64), StoreOffset(0), kPage4K, lane_, 0,
                                  {.mode = SharingMode::resolve, .image = image}));
  session_.release();
  run_out();
  EXPECT_EQ(session_.end(), SessionEnd::released);
  for (std::uint64_t page = 0; page < 64; ++page)
    EXPECT_EQ(at(2000 + page), image->has(PageIndex(page)) ? std::nullopt : std::optional(std::byte{0}))
        << page;
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
  session_.check_target();
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
  // A client that has got pages 0 to 3, and has given back 8 and 9; and its fork.
  void prepare() {
    kernel_.fault(pages(1));
    kernel_.removed(pages(8, 2));
    settle();
    kernel_.messages.push_back(fork_message(77));
  }
  void fork() {
    prepare();
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
  // Before: the sanitizers' first look at a type needs descriptors.
  prepare();
  rlimit before;
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit none{.rlim_cur = 0, .rlim_max = before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &none), 0);
  settle();
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

TEST_F(CondemnedChild, HasHugePagesPoisonedAsAWholeOfWhichAPartIsMissing) {
  host_.takes_children = false;
  const AddressRange huge = pages(2048, 1024);
  ASSERT_TRUE(session_.add_region(huge, StoreOffset(0), kPage2M, lane_));
  kernel_.removed(pages(2048, 256));
  kernel_.removed(pages(2560 + 100, 412));
  kernel_.refuse = [&](const FakeKernel::Call& call) {
    const bool whole = call.range.length.value % kPage2M.bytes().value == 0;
    return call.request == abi::kIoctlPoison && call.range.overlaps(huge) && !whole ? EINVAL : 0;
  };
  fork();
  for (std::uint64_t page = 2048; page < 3072; ++page) EXPECT_TRUE(is_poisoned(page)) << page;
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

}  // namespace
}  // namespace uffdkit
