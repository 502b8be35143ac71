// Messages of the running kernel, decoded: faults of each kind and the events.
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <optional>

#include "support/child.h"
#include "support/mapping.h"
#include "support/serving.h"
#include "support/sigbus.h"

namespace uffdkit {
namespace {

using test::Background;
using test::Channel;
using test::Child;
using test::Mapping;
using test::next_fault;
using test::next_message;
using test::page_of;
using test::user_faults;

TEST(FaultMessage, TellsReadsFromWrites) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(2 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  Background client(uffd, memory.range(), [&] {
    memory.read(0);
    memory.write(1, std::byte{1});
  });
  const Fault read = next_fault(uffd);
  EXPECT_EQ(read.kind, Fault::Kind::missing);
  EXPECT_FALSE(read.write);
  uffd.zero(memory.pages(0, 1));
  const Fault write = next_fault(uffd);
  EXPECT_EQ(write.kind, Fault::Kind::missing);
  EXPECT_TRUE(write.write);
  uffd.zero(memory.pages(1, 1));
  client.join();
}

TEST(FaultMessage, IsRoundedToThePageUnlessTheExactAddressIsAskedFor) {
  for (const bool exact : {false, true}) {
    UFFD_OR_SKIP(uffd, user_faults(exact ? abi::kFeatureExactAddress : 0));
    const Mapping memory = Mapping::anonymous(4096);
    ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
    Background client(uffd, memory.range(), [&] {
      [[maybe_unused]] const std::byte seen = *static_cast<volatile std::byte*>(memory.data() + 123);
    });
    EXPECT_EQ(next_fault(uffd).address, memory.page(0) + ByteCount(exact ? 123 : 0));
    uffd.zero(memory.range());
    client.join();
  }
}

TEST(FaultMessage, NamesTheThreadWhereThatIsAskedFor) {
  for (const bool asked : {false, true}) {
    UFFD_OR_SKIP(uffd, user_faults(asked ? abi::kFeatureThreadId : 0));
    const Mapping memory = Mapping::anonymous(4096);
    ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
    std::uint32_t thread = 0;
    Background client(uffd, memory.range(), [&] {
      thread = static_cast<std::uint32_t>(gettid());
      memory.read(0);
    });
    const std::uint32_t named = next_fault(uffd).thread_id;
    uffd.zero(memory.range());
    client.join();
    EXPECT_EQ(named, asked ? thread : 0u);
  }
}

TEST(ReadMessages, TakesManyAtOnceAndNoneFromAnEmptyQueue) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(2 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  std::array<abi::Msg, 8> messages;
  EXPECT_EQ(uffd.read(messages).messages, 0u);
  EXPECT_EQ(uffd.read(messages).os_error, 0);
  Background first(uffd, memory.range(), [&] { memory.read(0); });
  Background second(uffd, memory.range(), [&] { memory.read(1); });
  while (test::waiting_threads(uffd) < 2) std::this_thread::yield();
  EXPECT_EQ(uffd.read(messages).messages, 2u);
  uffd.zero(memory.range());
  first.join();
  second.join();
}

TEST(ReadMessages, GivesFaultsBeforeEventsThatCameEarlier) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureEventRemove));
  const Mapping memory = Mapping::anonymous(2 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  Background remover(uffd, memory.range(), [&] { madvise(memory.data(), 4096, MADV_DONTNEED); });
  ASSERT_TRUE(uffd.wait_readable(-1).value());
  Background reader(uffd, memory.range(), [&] { memory.read(1); });
  while (test::waiting_threads(uffd) < 1) std::this_thread::yield();
  EXPECT_TRUE(std::holds_alternative<Fault>(next_message(uffd)));
  EXPECT_TRUE(std::holds_alternative<RemoveEvent>(next_message(uffd)));
  remover.join();
  EXPECT_EQ(uffd.zero(memory.pages(1, 1)).stop, Stop::complete);
  reader.join();
}

TEST(RemoveEvent, ComesForEachAdviceThatGivesMemoryBack) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureEventRemove));
  const Mapping memory = Mapping::anonymous(4 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  for (const int advice : {MADV_DONTNEED, MADV_FREE}) {
    Background client(uffd, memory.range(), [&] { madvise(memory.data() + 4096, 2 * 4096, advice); });
    EXPECT_EQ(std::get<RemoveEvent>(next_message(uffd)).range, memory.pages(1, 2));
    client.join();
  }
}

TEST(RemoveEvent, LeavesTheRangeRegistered) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureEventRemove));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  ASSERT_EQ(uffd.copy(memory.page(0), page_of(1)).stop, Stop::complete);
  std::byte seen{9};
  Background client(uffd, memory.range(), [&] {
    madvise(memory.data(), 4096, MADV_DONTNEED);
    seen = memory.read(0);
  });
  EXPECT_TRUE(std::holds_alternative<RemoveEvent>(next_message(uffd)));
  EXPECT_EQ(next_fault(uffd).address, memory.page(0));
  EXPECT_EQ(uffd.zero(memory.range()).stop, Stop::complete);
  client.join();
  EXPECT_EQ(seen, std::byte{0});
}

TEST(UnmapEvent, GivesThePartThatWasUnmapped) {
  // The userfaultfd must end first: unmapping the rest would wait for somebody to read of it.
  const Mapping memory = Mapping::anonymous(4 * 4096);
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureEventUnmap));
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  Background client(uffd, memory.range(), [&] { munmap(memory.data() + 4096, 2 * 4096); });
  EXPECT_EQ(std::get<UnmapEvent>(next_message(uffd)).range, memory.pages(1, 2));
  client.join();
}

TEST(RemapEvent, GivesTheOldRangeAndTheNewPlaceAndTheRegistrationMoves) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureEventRemap));
  Mapping memory = Mapping::anonymous(2 * 4096);
  const Mapping target = Mapping::anonymous(2 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  std::byte seen{};
  Background client(uffd, target.range(), [&] {
    mremap(memory.data(), memory.size(), memory.size(), MREMAP_MAYMOVE | MREMAP_FIXED, target.data());
    seen = target.read(1);
  });
  const auto remap = std::get<RemapEvent>(next_message(uffd));
  EXPECT_EQ(remap.from, memory.range());
  EXPECT_EQ(remap.to, target.page(0));
  EXPECT_EQ(next_fault(uffd).address, target.page(1));
  EXPECT_EQ(uffd.copy(target.page(1), page_of(6)).stop, Stop::complete);
  client.join();
  EXPECT_EQ(seen, std::byte{6});
}

// A userfaultfd with EVENT_FORK, memory that it serves, and a child that reads the first page.
class ForkEventTest : public testing::Test {
 protected:
  void SetUp() override {
    Result<Uffd> made = Uffd::create(user_faults(abi::kFeatureEventFork));
    if (!made) GTEST_SKIP() << "needs CAP_SYS_PTRACE for event-fork: " << made.error().text();
    uffd_.emplace(std::move(*made));
    ASSERT_TRUE(uffd_->register_range(memory_.range(), kMissing));
  }
  // Forks the child and waits for what it read. fork(2) returns only after its event has been read, hence in
  // a thread; a child lives no longer than the thread that made it.
  void fork_reader() {
    Child child([this](const Channel& parent) {
      parent.send(std::to_integer<std::uint64_t>(memory_.read(0)));
      return 0;
    });
    seen_ = child.channel().receive();
    exit_code_ = child.wait();
  }

  std::optional<Uffd> uffd_;
  Mapping memory_ = Mapping::anonymous(4096);
  std::uint64_t seen_ = 0;
  int exit_code_ = -1;
};

TEST_F(ForkEventTest, GivesADescriptorThatServesTheChild) {
  Background forker(*uffd_, memory_.range(), [this] { fork_reader(); });
  const auto event = std::get<ForkEvent>(next_message(*uffd_));
  const Uffd of_child = Uffd::adopt(event.child_fd, uffd_->features());
  EXPECT_EQ(next_fault(of_child).address, memory_.page(0));
  EXPECT_EQ(of_child.copy(memory_.page(0), page_of(0x42)).stop, Stop::complete);
  forker.join();
  EXPECT_EQ(seen_, 0x42u);
  EXPECT_EQ(exit_code_, 0);
  EXPECT_FALSE(of_child.target_alive());
  EXPECT_TRUE(uffd_->target_alive());
}

TEST_F(ForkEventTest, StaysQueuedWhileThereIsNoFreeDescriptor) {
  Background forker(*uffd_, memory_.range(), [this] { fork_reader(); });
  ASSERT_TRUE(uffd_->wait_readable(-1).value());
  rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit none{.rlim_cur = 0, .rlim_max = before.rlim_max};
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &none), 0);
  abi::Msg raw;
  const ReadOutcome refused = uffd_->read({&raw, 1});
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_EQ(refused.messages, 0u);
  EXPECT_EQ(refused.os_error, EMFILE);
  const Uffd of_child = Uffd::adopt(std::get<ForkEvent>(next_message(*uffd_)).child_fd, uffd_->features());
  next_fault(of_child);
  EXPECT_EQ(of_child.zero(memory_.range()).stop, Stop::complete);
  forker.join();
  EXPECT_EQ(seen_, 0u);
  EXPECT_EQ(exit_code_, 0);
}

// What a child that no userfaultfd serves gets of a poisoned page, of memory of which nothing was ever
// written.
bool child_has_sigbus(const Mapping& memory) {
  Child child([&](const Channel&) { return test::raises_sigbus(memory.data()) ? 1 : 0; });
  return child.wait() == 1;
}

TEST(PoisonedPage, StaysSoInAChildOfForkUnlessItsMemoryIsShared) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePoison | abi::kFeatureMissingShmem));
  const UniqueFd file = test::memory_file(4096);
  const Mapping anonymous = Mapping::anonymous(4096);
  const Mapping of_file = Mapping::of_file(file.get(), 4096, MAP_PRIVATE);
  const Mapping shared = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  for (const Mapping* memory : {&anonymous, &of_file, &shared}) {
    ASSERT_TRUE(uffd.register_range(memory->range(), kMissing));
    ASSERT_EQ(uffd.poison(memory->range()).stop, Stop::complete);
  }
  EXPECT_TRUE(child_has_sigbus(anonymous));
  EXPECT_TRUE(child_has_sigbus(of_file));
  EXPECT_FALSE(child_has_sigbus(shared));
  for (const Mapping* memory : {&anonymous, &of_file, &shared})
    EXPECT_TRUE(test::raises_sigbus(memory->data()));
}

}  // namespace
}  // namespace uffdkit
