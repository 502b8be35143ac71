// The life of a fault on the model.
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>

#include "sim/world.h"

namespace uffdkit::sim::test {
namespace {

TEST(SimFault, AMissingPagePutsItsReaderToSleepUntilItIsCopied) {
  World world;
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& reader = world.read(page);
  EXPECT_EQ(reader.state(), Thread::State::fault_sleep);
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].event, abi::kEventPagefault);
  EXPECT_EQ(messages[0].arg.pagefault.address, page.value);
  EXPECT_EQ(messages[0].arg.pagefault.flags, 0u);
  EXPECT_EQ(world.copy(page, 0x5a).stop, Stop::complete);
  EXPECT_EQ(byte_of(reader), 0x5a);
}

TEST(SimFault, EveryThreadOnAPageHasAMessageOfItsOwnAndOneCopyWakesThemAll) {
  World world(abi::kFeatureThreadId);
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& first = world.read(page);
  Thread& second = world.read(page);
  Thread& third = world.write(at(page, 0, 8));
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 3u);
  EXPECT_EQ(messages[0].arg.pagefault.ptid, static_cast<std::uint32_t>(first.tid()));
  EXPECT_EQ(messages[1].arg.pagefault.ptid, static_cast<std::uint32_t>(second.tid()));
  EXPECT_EQ(messages[2].arg.pagefault.flags, abi::kPagefaultWrite);
  world.copy(page, 7);
  EXPECT_EQ(byte_of(first), 7);
  EXPECT_EQ(byte_of(second), 7);
  EXPECT_EQ(byte_of(third), 1);
}

TEST(SimFault, AWakeWithoutAPageGivesAFreshMessage) {
  World world;
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& reader = world.read(page);
  ASSERT_EQ(world.messages().size(), 1u);
  ASSERT_TRUE(world.uffd.wake(pages(page, 1)));
  world.kernel.run();
  EXPECT_TRUE(asleep(reader));
  EXPECT_EQ(world.messages().size(), 1u);
}

TEST(SimFault, AMessageIsNotSentTwice) {
  World world;
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  world.read(page);
  EXPECT_EQ(world.messages().size(), 1u);
  EXPECT_EQ(world.messages().size(), 0u);
}

TEST(SimFault, AddressesAreThoseOfThePageUnlessExactOnesAreAskedFor) {
  for (const std::uint64_t features : {std::uint64_t{0}, abi::kFeatureExactAddress}) {
    World world(features);
    const Address page = world.area(Memory::anonymous, 1, kMissingMode);
    world.read(at(page, 0, 123));
    const auto messages = world.messages();
    ASSERT_EQ(messages.size(), 1u);
    EXPECT_EQ(messages[0].arg.pagefault.address, page.value + (features != 0 ? 123 : 0));
  }
}

TEST(SimFault, AnAddressOnHugePagesIsThatOfTheHugePage) {
  World world;
  const Address start = world.area(Memory::hugetlb_shared, 2, kMissingMode);
  world.read(start + ByteCount(kHuge + 5 * kPage));
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].arg.pagefault.address, start.value + kHuge);
}

TEST(SimFault, MprotectComesBeforeUserfaultfd) {
  World world;
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  thread.protect(pages(page, 1), false, false);
  world.kernel.run();
  Thread& reader = world.read(page);
  ASSERT_TRUE(reader.last());
  EXPECT_EQ(reader.last()->kind, Completion::Kind::sigsegv);
  EXPECT_EQ(reader.last()->result, SEGV_ACCERR);
  EXPECT_TRUE(world.messages().empty());
}

TEST(SimFault, ASignalInUserModeGivesADuplicateMessage) {
  World world;
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& reader = world.read(page);
  EXPECT_EQ(world.messages().size(), 1u);
  reader.signal();
  ASSERT_TRUE(world.kernel.run());
  EXPECT_TRUE(asleep(reader));
  EXPECT_EQ(world.messages().size(), 1u);
}

TEST(SimFault, ASignalDuringASystemCallMakesItSpinWithEndlessMessages) {
  World world;
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& caller = world.access({.address = page, .kernel_mode = true});
  EXPECT_EQ(world.messages().size(), 1u);
  caller.signal();
  std::array<abi::Msg, 1> message;
  for (int i = 0; i < 100; ++i) {
    EXPECT_FALSE(world.kernel.run(10));
    EXPECT_EQ(world.uffd.read(message).messages, 1u);
  }
  world.copy(page, 9);
  EXPECT_EQ(byte_of(caller), 9);
}

TEST(SimFault, AUserModeOnlyUserfaultfdFailsSystemCallsInsteadOfServingThem) {
  World world(0, {.device = {.exists = false}}, false);

  Uffd user_only = [&] {
    SystemCalls& calls = world.process.system_calls();
    const int fd = calls.userfaultfd(O_NONBLOCK | abi::kUserModeOnly);
    abi::ApiArgs args{.api = abi::kApi, .features = 0, .ioctls = 0};
    EXPECT_EQ(calls.ioctl(fd, abi::kIoctlApi, reinterpret_cast<std::uintptr_t>(&args)), 0);
    return Uffd::adopt(fd, Features(), calls);
  }();
  const Address page = world.area(Memory::anonymous, 1);
  ASSERT_TRUE(user_only.register_range(pages(page, 1), kMissing));
  Thread& caller = world.access({.address = page, .kernel_mode = true});
  EXPECT_EQ(result_of(caller), -EFAULT);
  EXPECT_TRUE(asleep(world.read(page)));
}

TEST(SimFault, TheSigbusFeatureSendsSignalsAndNoMessages) {
  World world(abi::kFeatureSigbus);
  const Address page = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& reader = world.read(at(page, 0, 77));
  ASSERT_TRUE(reader.last());
  EXPECT_EQ(*reader.last(),
            (Completion{.kind = Completion::Kind::sigbus, .result = BUS_ADRERR, .address = at(page, 0, 77)}));
  EXPECT_EQ(result_of(world.access({.address = page, .kernel_mode = true})), -EFAULT);
  EXPECT_TRUE(world.messages().empty());
  EXPECT_EQ(world.copy(page, 3).stop, Stop::complete);
  EXPECT_EQ(byte_of(world.read(page)), 3);
}

TEST(SimFault, AMinorFaultComesForAPageOfTheCacheAndContinueMapsIt) {
  World world;
  const ObjectPtr file = world.kernel.make_shmem(ByteCount(2 * kPage));
  const std::array<std::byte, 1> byte{std::byte{0x21}};
  file->write(0, byte);
  const Address start = world.area(Memory::shmem_shared, 2, kMinorMode, file);
  Thread& writer = world.write(start, 0x22);
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].arg.pagefault.flags, abi::kPagefaultMinor | abi::kPagefaultWrite);
  EXPECT_EQ(world.uffd.resume(pages(start, 1)).stop, Stop::complete);
  world.kernel.run();
  EXPECT_EQ(byte_of(writer), 0x22);
  // A hole is filled by the kernel without a word: only missing faults would tell of it.
  EXPECT_EQ(byte_of(world.read(at(start, 1))), 0);
}

TEST(SimFault, ABeyondTheEndOfItsFileIsAnOrdinarySigbus) {
  World world;
  const ObjectPtr file = world.kernel.make_shmem(ByteCount(kPage));
  const Address start = world.area(Memory::shmem_shared, 2, kMissingMode, file);
  Thread& writer = world.write(at(start, 1));
  ASSERT_TRUE(writer.last());
  EXPECT_EQ(writer.last()->kind, Completion::Kind::sigbus);
  EXPECT_TRUE(world.messages().empty());
}

TEST(SimFault, AReadMapsWhatTheCacheHasAroundItWithoutAskingForMissingPages) {
  World world;
  const ObjectPtr file = world.kernel.make_shmem(ByteCount(4 * kPage));
  const std::array<std::byte, 1> byte{std::byte{1}};
  for (const std::uint64_t page : {0u, 1u, 3u}) file->write(page * kPage, byte);
  const Address start = world.area(Memory::shmem_private, 4, kMissingMode, file);
  EXPECT_EQ(byte_of(world.read(start)), 1);
  EXPECT_TRUE(world.process.present(at(start, 1)));
  EXPECT_FALSE(world.process.present(at(start, 2)));
  EXPECT_TRUE(world.process.present(at(start, 3)));
}

TEST(SimFault, HugePagesThatAreRegisteredAgainWithoutProtectionMakeTheirWriterSpin) {
  World world;
  const Address start = world.area(Memory::hugetlb_shared, 1, kMissingMode | kWpMode);
  ASSERT_EQ(world.copy(start, 1, kHuge, Wake::yes, Protect::yes).stop, Stop::complete);
  ASSERT_TRUE(world.uffd.register_range(pages(start, 1, kHuge), kMinor));
  Thread& writer = world.process.spawn_thread();
  writer.access({.address = start, .write = true});
  EXPECT_FALSE(world.kernel.run(1000));
  EXPECT_EQ(writer.state(), Thread::State::runnable);
}

// ---- poll and read --------------------------------------------------------------------------------------

TEST(SimRead, FaultsComeBeforeEventsEvenIfTheEventWasFirst) {
  World world(abi::kFeatureEventRemove);
  const Address start = world.area(Memory::anonymous, 2, kMissingMode);
  Thread& remover = world.process.spawn_thread();
  remover.advise(pages(start, 1), Advice::dont_need);
  world.kernel.run();
  world.read(at(start, 1));
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 2u);
  EXPECT_EQ(messages[0].event, abi::kEventPagefault);
  EXPECT_EQ(messages[1].event, abi::kEventRemove);
}

TEST(SimRead, NeedsRoomForAMessage) {
  World world;
  std::array<std::byte, 31> small;
  EXPECT_EQ(world.process.system_calls().read(world.uffd.fd(), small.data(), small.size()), -EINVAL);
  EXPECT_EQ(world.process.system_calls().read(world.uffd.fd(), small.data(), 0), -EINVAL);
}

TEST(SimRead, AnEmptyNonBlockingDescriptorSaysEagain) {
  World world;
  abi::Msg message;
  EXPECT_EQ(world.process.system_calls().read(world.uffd.fd(), &message, sizeof(message)), -EAGAIN);
}

TEST(SimRead, ABlockingReadLetsThreadsRunUntilThereIsAMessage) {
  Kernel kernel;
  Process& process = kernel.spawn();
  auto uffd = Uffd::create({.non_blocking = false}, process.system_calls());
  ASSERT_TRUE(uffd);
  const Address page = process.map({.length = ByteCount(kPage)}).value();
  ASSERT_TRUE(uffd->register_range(pages(page, 1), kMissing));
  process.spawn_thread().access({.address = page});
  abi::Msg message;
  EXPECT_EQ(process.system_calls().read(uffd->fd(), &message, sizeof(message)), 32);
  EXPECT_EQ(process.system_calls().read(uffd->fd(), &message, sizeof(message)), -EDEADLK);
}

TEST(SimRead, PollRefusesABlockingDescriptorAndOneThatIsNotEnabled) {
  Kernel kernel;
  SystemCalls& calls = kernel.spawn().system_calls();
  const int fd = calls.userfaultfd(O_NONBLOCK);
  EXPECT_EQ(calls.poll_readable(fd, 0), POLLERR);
  auto blocking = Uffd::create({.non_blocking = false}, calls);
  EXPECT_EQ(calls.poll_readable(blocking->fd(), 0), POLLERR);
}

TEST(SimRead, TheSameSeedGivesTheSameOrderOfMessages) {
  const auto order = [](std::uint64_t seed) {
    World world(abi::kFeatureThreadId, {.seed = seed});
    const Address start = world.area(Memory::anonymous, 8, kMissingMode);
    for (std::uint64_t page = 0; page < 8; ++page)
      world.process.spawn_thread().access({.address = at(start, page)});
    world.kernel.run();
    std::vector<std::uint64_t> addresses;
    for (const abi::Msg& message : world.messages())
      addresses.push_back(message.arg.pagefault.address - start.value);
    return addresses;
  };
  EXPECT_EQ(order(1), order(1));
  EXPECT_NE(order(1), order(2));
}

}  // namespace
}  // namespace uffdkit::sim::test
