// Filling pages (COPY, ZEROPAGE, POISON, MOVE) against the running kernel: what comes of each.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <cerrno>
#include <thread>

#include "support/child.h"
#include "support/mapping.h"
#include "support/serving.h"

namespace uffdkit {
namespace {

using test::Background;
using test::Channel;
using test::Child;
using test::Mapping;
using test::next_fault;
using test::page_of;
using test::user_faults;

constexpr ByteCount kOnePage(4096);

TEST(Copy, FillsAMissingPageAndWakesItsReader) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  std::byte seen{};
  Background reader(uffd, memory.range(), [&] { seen = memory.read(0); });
  EXPECT_EQ(next_fault(uffd).address, memory.page(0));
  const Outcome outcome = uffd.copy(memory.page(0), page_of(0x5a));
  reader.join();
  EXPECT_EQ(outcome.stop, Stop::complete);
  EXPECT_EQ(outcome.done, kOnePage);
  EXPECT_EQ(seen, std::byte{0x5a});
}

TEST(Copy, WakesEveryThreadThatWaitsForThePage) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  const auto touch = [&] { memory.read(0); };
  Background first(uffd, memory.range(), touch);
  Background second(uffd, memory.range(), touch);
  Background third(uffd, memory.range(), touch);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(next_fault(uffd).address, memory.page(0));
  EXPECT_EQ(uffd.copy(memory.page(0), page_of(1)).stop, Stop::complete);
  first.join();
  second.join();
  third.join();
}

TEST(Copy, IsCutShortAtAPageThatIsPresentAndSaysHowMuchWasDone) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4 * 4096);
  const Mapping source = Mapping::anonymous(4 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  ASSERT_EQ(uffd.zero(memory.pages(2, 1)).stop, Stop::complete);
  const Outcome all = uffd.copy(memory.page(0), {source.data(), source.size()});
  EXPECT_EQ(all.stop, Stop::cut_short);
  EXPECT_EQ(all.done, ByteCount(2 * 4096));
  const Outcome rest = uffd.copy(memory.page(2), {source.data(), 2 * 4096});
  EXPECT_EQ(rest.stop, Stop::present);
  EXPECT_EQ(rest.done, ByteCount(0));
}

TEST(Copy, OntoAPresentPageWakesNobodyAndWakeDoes) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  std::byte seen{};
  Background reader(uffd, memory.range(), [&] { seen = memory.read(0); });
  next_fault(uffd);
  ASSERT_EQ(uffd.copy(memory.page(0), page_of(7), Wake::no).stop, Stop::complete);
  EXPECT_EQ(uffd.copy(memory.page(0), page_of(8)).stop, Stop::present);
  EXPECT_EQ(test::waiting_threads(uffd), 1u);
  ASSERT_TRUE(uffd.wake(memory.range()));
  reader.join();
  EXPECT_EQ(seen, std::byte{7});
}

TEST(Copy, IsNotReadyWhereNothingIsMapped) {
  UFFD_OR_SKIP(uffd, user_faults());
  AddressRange gone{};
  {
    const Mapping memory = Mapping::anonymous(4096);
    gone = memory.range();
  }
  EXPECT_EQ(uffd.copy(gone.start, page_of(1)).stop, Stop::not_ready);
}

TEST(Copy, IsNotReadyWhereNothingIsRegistered) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  EXPECT_EQ(uffd.copy(memory.page(0), page_of(1)).stop, Stop::not_ready);
}

TEST(Copy, IsNotReadyAcrossTwoMappings) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(2 * 4096);
  const Mapping source = Mapping::anonymous(2 * 4096);
  // Other access rights make two mappings of one.
  ASSERT_EQ(mprotect(memory.data() + 4096, 4096, PROT_READ), 0);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  EXPECT_EQ(uffd.copy(memory.page(0), {source.data(), source.size()}).stop, Stop::not_ready);
}

TEST(Copy, IsBadMemoryFromASourceThatCannotBeRead) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_EQ(mprotect(source.data(), 4096, PROT_NONE), 0);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  const Outcome outcome = uffd.copy(memory.page(0), source.bytes(0));
  EXPECT_EQ(outcome.stop, Stop::bad_memory);
  EXPECT_EQ(outcome.os_error, EFAULT);
}

TEST(Copy, IsBadMemoryBeyondTheEndOfTheFile) {
  UFFD_OR_SKIP(uffd, user_faults());
  const UniqueFd file = test::memory_file(4096);
  const Mapping memory = Mapping::of_file(file.get(), 2 * 4096, MAP_SHARED);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  EXPECT_EQ(uffd.copy(memory.page(0), page_of(1)).stop, Stop::complete);
  EXPECT_EQ(uffd.copy(memory.page(1), page_of(1)).stop, Stop::bad_memory);
}

TEST(Copy, IsInvalidAtAnUnalignedAddress) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(2 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  EXPECT_EQ(uffd.copy(memory.page(0) + ByteCount(1), page_of(1)).stop, Stop::invalid);
}

TEST(Zero, FillsAPageThatReadsAsZero) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  Background reader(uffd, memory.range(), [&] { EXPECT_EQ(memory.read(0), std::byte{0}); });
  next_fault(uffd);
  EXPECT_EQ(uffd.zero(memory.range()).stop, Stop::complete);
  reader.join();
  EXPECT_EQ(uffd.zero(memory.range()).stop, Stop::present);
}

TEST(Poison, MakesATouchSigbus) {
  Child child([](const Channel&) {
    const rlimit no_core{0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    signal(SIGBUS, SIG_DFL);
    const Result<Uffd> uffd = Uffd::create(user_faults(abi::kFeaturePoison));
    if (!uffd) return 2;
    const Mapping memory = Mapping::anonymous(4096);
    if (!uffd->register_range(memory.range(), kMissing)) return 3;
    if (uffd->poison(memory.range()).stop != Stop::complete) return 4;
    memory.read(0);
    return 5;
  });
  const int end = child.wait();
  if (end == 2) GTEST_SKIP() << "needs a userfaultfd with the feature poison (Linux 6.6)";
  EXPECT_EQ(end, -SIGBUS);
}

TEST(Poison, IsTakenAwayByCopy) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePoison));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  ASSERT_EQ(uffd.poison(memory.range()).stop, Stop::complete);
  EXPECT_EQ(uffd.poison(memory.range()).stop, Stop::present);
  EXPECT_EQ(uffd.copy(memory.page(0), page_of(9)).stop, Stop::complete);
  EXPECT_EQ(memory.read(0), std::byte{9});
}

TEST(Move, TakesThePageAwayFromItsOldPlace) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMove));
  const Mapping memory = Mapping::anonymous(4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  source.write(0, std::byte{0x77});
  std::byte seen{};
  Background reader(uffd, memory.range(), [&] { seen = memory.read(0); });
  next_fault(uffd);
  EXPECT_EQ(uffd.move(memory.page(0), source.range()).stop, Stop::complete);
  reader.join();
  EXPECT_EQ(seen, std::byte{0x77});
  EXPECT_EQ(source.read(0), std::byte{0});
}

TEST(Move, OfAPageThatIsSharedByForkIsBusyUntilItIsWritten) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMove));
  const Mapping memory = Mapping::anonymous(4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  source.write(0, std::byte{1});
  {
    const Child child([](const Channel& parent) {
      parent.wait_closed();
      return 0;
    });
    const Outcome outcome = uffd.move(memory.page(0), source.range());
    EXPECT_EQ(outcome.stop, Stop::busy);
    EXPECT_EQ(outcome.os_error, EBUSY);
  }
  source.write(0, std::byte{2});
  EXPECT_EQ(uffd.move(memory.page(0), source.range()).stop, Stop::complete);
  EXPECT_EQ(memory.read(0), std::byte{2});
}

TEST(Move, EndsAtAHoleOfTheSourceUnlessHolesAreAllowed) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMove));
  const Mapping memory = Mapping::anonymous(2 * 4096);
  const Mapping source = Mapping::anonymous(2 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  source.write(1, std::byte{3});
  EXPECT_EQ(uffd.move(memory.page(0), source.range()).stop, Stop::not_ready);
  const Outcome outcome = uffd.move(memory.page(0), source.range(), Wake::yes, SourceHoles::allow);
  EXPECT_EQ(outcome.stop, Stop::complete);
  EXPECT_EQ(outcome.done, ByteCount(2 * 4096));
  EXPECT_EQ(memory.read(1), std::byte{3});
  EXPECT_EQ(uffd.zero(memory.pages(0, 1)).stop, Stop::complete) << "the hole must stay missing";
}

TEST(FillWhileChanging, IsChangingUntilTheRemoveEventIsReadAndItsThreadHasRun) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureEventRemove | abi::kFeaturePoison | abi::kFeatureMove));
  const Mapping memory = Mapping::anonymous(4 * 4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing | kWriteProtect));
  source.write(0, std::byte{1});
  Background remover(uffd, memory.range(), [&] { madvise(memory.data(), 4096, MADV_DONTNEED); });
  ASSERT_TRUE(uffd.wait_readable(-1).value());
  for (const Outcome& outcome :
       {uffd.copy(memory.page(1), page_of(1)), uffd.zero(memory.pages(1, 1)), uffd.poison(memory.pages(1, 1)),
        uffd.resume(memory.pages(1, 1)), uffd.move(memory.page(1), source.range()),
        uffd.protect(memory.pages(1, 1))}) {
    EXPECT_EQ(outcome.stop, Stop::changing);
    EXPECT_EQ(outcome.done, ByteCount(0));
    EXPECT_EQ(outcome.os_error, EAGAIN);
  }
  EXPECT_TRUE(uffd.target_alive());
  EXPECT_FALSE(remover.finished());

  EXPECT_EQ(std::get<RemoveEvent>(test::next_message(uffd)).range, memory.pages(0, 1));
  Outcome outcome = uffd.zero(memory.pages(1, 1));
  while (outcome.stop == Stop::changing) {
    std::this_thread::yield();
    outcome = uffd.zero(memory.pages(1, 1));
  }
  EXPECT_EQ(outcome.stop, Stop::complete);
  remover.join();
}

}  // namespace
}  // namespace uffdkit
