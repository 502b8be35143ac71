// REGISTER and the ioctls that fill, protect and move, on the model.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>

#include "sim/world.h"

namespace uffdkit::sim::test {
namespace {

int call(World& world, unsigned long request, void* args) {
  return world.process.system_calls().ioctl(world.uffd.fd(), request, reinterpret_cast<std::uintptr_t>(args));
}

// ---- the handshake --------------------------------------------------------------------------------------

TEST(SimApi, NothingWorksBeforeIt) {
  Kernel kernel;
  SystemCalls& calls = kernel.spawn().system_calls();
  const int fd = calls.userfaultfd(O_NONBLOCK);
  abi::RangeArgs range{kPage * 100, kPage};
  abi::Msg message;
  EXPECT_EQ(calls.ioctl(fd, abi::kIoctlWake, reinterpret_cast<std::uintptr_t>(&range)), -EINVAL);
  EXPECT_EQ(calls.read(fd, &message, sizeof(message)), -EINVAL);
}

TEST(SimApi, SucceedsOnceAndZeroesItsArgumentsWhenItFails) {
  World world;
  abi::ApiArgs args{.api = abi::kApi, .features = 0, .ioctls = 5};
  EXPECT_EQ(call(world, abi::kIoctlApi, &args), -EINVAL);
  EXPECT_EQ(args.api, 0u);
  EXPECT_EQ(args.ioctls, 0u);
}

TEST(SimApi, ReportsAllFeaturesOfItsVersionWhateverWasEnabled) {
  const auto features = [](Version version) {
    Kernel kernel({.version = version});
    return probe_features(kernel.spawn().system_calls()).value().available.bits;
  };
  EXPECT_EQ(features({6, 18}), 0x1ffffu);
  EXPECT_EQ(features({6, 1}), 0x1fffu);
  EXPECT_EQ(features({5, 11}), 0x1ffu);
}

// ---- REGISTER and UNREGISTER ----------------------------------------------------------------------------

struct Registration {
  Memory memory;
  std::uint64_t modes;
  std::uint64_t ioctls;  // 0: EINVAL
};

TEST(SimRegister, ReportsTheIoctlsOfEachKindOfMemory) {
  constexpr std::uint64_t kM = kMissingMode;
  constexpr std::uint64_t kW = kWpMode;
  constexpr std::uint64_t kN = kMinorMode;
  const std::vector<Registration> table = {
      {Memory::anonymous, kM, 0x13c},
      {Memory::anonymous, kW, 0x17c},
      {Memory::anonymous, kM | kW, 0x17c},
      {Memory::anonymous, kM | kN, 0},
      {Memory::shmem_shared, kM, 0x13c},
      {Memory::shmem_shared, kM | kN, 0x1bc},
      {Memory::shmem_shared, 7, 0x1fc},
      {Memory::shmem_private, kN, 0x1bc},
      {Memory::hugetlb_shared, kM, 0x10c},
      {Memory::hugetlb_shared, kM | kW, 0x14c},
      {Memory::hugetlb_private, kN, 0x18c},
      {Memory::hugetlb_private, 7, 0x1cc},
      {Memory::file_shared, kM, 0},
      {Memory::file_private, kW, 0},
      {Memory::anonymous, 0, 0},
      {Memory::anonymous, 8, 0},
  };
  for (const Registration& entry : table) {
    World world;
    const Address start = world.area(entry.memory, 1);
    const auto range = pages(start, 1, page_size(entry.memory).bytes().value);
    const auto result = world.uffd.register_range(range, RegisterModes(entry.modes));
    EXPECT_EQ(result ? result->bits : 0, entry.ioctls) << to_string(entry.memory) << " " << entry.modes;
    if (!result) {
      EXPECT_EQ(result.error().os_error(), EINVAL);
    }
  }
}

TEST(SimRegister, AsynchronousProtectionAloneWorksOnRegularFiles) {
  World world(abi::kFeatureWpAsync);
  const Address start = world.area(Memory::file_shared, 1);
  EXPECT_EQ(world.uffd.register_range(pages(start, 1), kWriteProtect).value().bits, 0x17cu);
  EXPECT_FALSE(world.uffd.register_range(pages(start, 1), kMissing | kWriteProtect));
}

TEST(SimRegister, OlderVersionsKnowFewerKindsOfFaults) {
  const auto can = [](Version version, Memory memory, RegisterModes modes) {
    World world(0, {.version = version});
    const Address start = world.area(memory, 1);
    return world.uffd.register_range(pages(start, 1, page_size(memory).bytes().value), modes).has_value();
  };
  EXPECT_TRUE(can({5, 11}, Memory::anonymous, kWriteProtect));
  EXPECT_FALSE(can({5, 18}, Memory::shmem_shared, kWriteProtect));
  EXPECT_TRUE(can({5, 19}, Memory::shmem_shared, kWriteProtect));
  EXPECT_FALSE(can({5, 12}, Memory::hugetlb_shared, kMinor));
  EXPECT_TRUE(can({5, 13}, Memory::hugetlb_shared, kMinor));
  EXPECT_FALSE(can({5, 13}, Memory::shmem_shared, kMinor));
  EXPECT_TRUE(can({5, 14}, Memory::shmem_shared, kMinor));
}

TEST(SimRegister, SkipsHolesButNotEmptiness) {
  World world;
  const Address start = world.area(Memory::anonymous, 4);
  Thread& thread = world.process.spawn_thread();
  thread.unmap(pages(start, 2));
  world.kernel.run();
  EXPECT_TRUE(world.uffd.register_range(pages(start, 4), kMissing));
  EXPECT_EQ(world.uffd.register_range(pages(start, 2), kMissing).error().os_error(), EINVAL);
}

TEST(SimRegister, OneUnfitAreaKeepsAllFromBeingRegistered) {
  World world;
  const Address start = world.area(Memory::anonymous, 1);
  ASSERT_TRUE(
      world.process.map({.memory = Memory::file_private, .length = ByteCount(kPage), .fixed = at(start, 1)}));
  EXPECT_EQ(world.uffd.register_range(pages(start, 2), kMissing).error().os_error(), EINVAL);
  EXPECT_EQ(byte_of(world.read(start)), 0);
}

TEST(SimRegister, AnothersRangeIsBusy) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  auto other = Uffd::create({}, world.process.system_calls());
  EXPECT_EQ(other->register_range(pages(start, 1), kMissing).error().os_error(), EBUSY);
}

TEST(SimRegister, MemoryThatCanNeverBeWrittenIsRefused) {
  World world;
  const Address start = world.process
                            .map({.memory = Memory::shmem_shared,
                                  .length = ByteCount(kPage),
                                  .writable = false,
                                  .read_only_descriptor = true})
                            .value();
  EXPECT_EQ(world.uffd.register_range(pages(start, 1), kMissing).error().os_error(), EPERM);
}

TEST(SimRegister, ASubsetOfTheModesChangesNothing) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode | kWpMode);
  ASSERT_EQ(world.copy(start, 1, kPage, Wake::yes, Protect::yes).stop, Stop::complete);
  EXPECT_EQ(world.uffd.register_range(pages(start, 1), kMissing).value().bits, 0x13cu);
  EXPECT_TRUE(asleep(world.write(start)));
}

TEST(SimRegister, GrowthInPlaceIsRegisteredAndANewMappingIsNot) {
  World world;
  const Address start = world.area(Memory::anonymous, 2, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  thread.remap({.from = pages(start, 2), .new_length = ByteCount(3 * kPage)});
  world.kernel.run();
  ASSERT_EQ(result_of(thread), static_cast<std::int64_t>(start.value));
  EXPECT_TRUE(asleep(world.read(at(start, 2))));
  ASSERT_TRUE(world.process.map({.length = ByteCount(kPage), .fixed = at(start, 3)}));
  EXPECT_EQ(byte_of(world.read(at(start, 3))), 0);
}

TEST(SimUnregister, WakesThreadsInMissingFaultsOnly) {
  World world;
  const Address missing = world.area(Memory::anonymous, 1, kMissingMode);
  const Address armed = world.area(Memory::anonymous, 1, kWpMode);
  world.write(armed);
  ASSERT_EQ(world.uffd.protect(pages(armed, 1)).stop, Stop::complete);
  Thread& reader = world.read(missing);
  Thread& writer = world.write(armed, 5);
  for (const Address page : {missing, armed}) {
    abi::RangeArgs args{page.value, kPage};
    EXPECT_EQ(call(world, abi::kIoctlUnregister, &args), 0);
  }
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 0);
  EXPECT_TRUE(asleep(writer));
  ASSERT_TRUE(world.uffd.wake(pages(armed, 1)));
  world.kernel.run();
  EXPECT_EQ(byte_of(writer), 5);
}

TEST(SimUnregister, AnothersRangeIsRefusedSinceLinux617) {
  for (const Version version : {Version{6, 16}, Version{6, 17}}) {
    World world(0, {.version = version});
    const Address start = world.area(Memory::anonymous, 1, kMissingMode);
    auto other = Uffd::create({}, world.process.system_calls());
    EXPECT_EQ(other->unregister_range(pages(start, 1)).has_value(), version < Version(6, 17));
  }
}

// ---- COPY and its kin -----------------------------------------------------------------------------------

TEST(SimCopy, APresentPageIsRefusedAndNobodyIsWoken) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& reader = world.read(start);
  EXPECT_EQ(world.copy(start, 1, kPage, Wake::no).stop, Stop::complete);
  EXPECT_TRUE(asleep(reader));
  EXPECT_EQ(world.copy(start, 2).stop, Stop::present);
  EXPECT_TRUE(asleep(reader));
  ASSERT_TRUE(world.uffd.wake(pages(start, 1)));
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 1);
}

TEST(SimCopy, StopsHalfWayAndHidesTheReasonUntilItGoesOn) {
  World world;
  const Address start = world.area(Memory::anonymous, 4, kMissingMode);
  ASSERT_EQ(world.copy(at(start, 2), 9).stop, Stop::complete);
  Thread& first = world.read(start);
  Thread& last = world.read(at(start, 3));
  const Outcome outcome = world.copy(start, 1, 4 * kPage);
  EXPECT_EQ(outcome.stop, Stop::cut_short);
  EXPECT_EQ(outcome.done, ByteCount(2 * kPage));
  EXPECT_EQ(byte_of(first), 1);
  EXPECT_TRUE(asleep(last));
  EXPECT_EQ(world.copy(at(start, 2), 1, 2 * kPage).stop, Stop::present);
}

TEST(SimCopy, ASourceThatCannotBeReadIsBadMemory) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  void* unreadable = mmap(nullptr, kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  const std::span source(static_cast<const std::byte*>(unreadable), kPage);
  EXPECT_EQ(world.uffd.copy(start, source).stop, Stop::bad_memory);
  munmap(unreadable, kPage);
}

TEST(SimCopy, TheRangeMustLieInOneArea) {
  World world;
  const Address start = world.area(Memory::anonymous, 2, 0);
  ASSERT_TRUE(world.uffd.register_range(pages(start, 1), kMissing));
  ASSERT_TRUE(world.uffd.register_range(pages(at(start, 1), 1), kMissing | kWriteProtect));
  EXPECT_EQ(world.copy(start, 1, 2 * kPage).stop, Stop::not_ready);
  ASSERT_TRUE(world.uffd.register_range(pages(start, 1), kMissing | kWriteProtect));
  EXPECT_EQ(world.copy(start, 1, 2 * kPage).stop, Stop::complete);
}

TEST(SimCopy, WhoseRangeItIsIsNotAsked) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  auto other = Uffd::create({}, world.process.system_calls());
  const std::vector<std::byte> bytes(kPage, std::byte{4});
  EXPECT_EQ(other->copy(start, bytes).stop, Stop::complete);
  EXPECT_EQ(byte_of(world.read(start)), 4);
}

TEST(SimCopy, IntoAPrivateMappingOfAFileLeavesTheFileAlone) {
  World world;
  const ObjectPtr file = world.kernel.make_shmem(ByteCount(kPage));
  const std::array<std::byte, 1> byte{std::byte{1}};
  file->write(0, byte);
  const Address start = world.area(Memory::shmem_private, 1, kMissingMode, file);
  EXPECT_EQ(world.copy(start, 2).stop, Stop::complete);
  EXPECT_EQ(byte_of(world.read(start)), 2);
  std::array<std::byte, 1> seen{};
  file->read(0, seen);
  EXPECT_EQ(seen, byte);
}

TEST(SimCopy, AnEmptyPoolOfHugePagesSaysPresent) {
  World world(0, {.huge_pages = 1});
  const ObjectPtr file = world.kernel.make_hugetlb(ByteCount(kHuge));
  const Address start = world.area(Memory::hugetlb_private, 1, kMissingMode, file);
  const std::array<std::byte, 1> byte{};
  // The only page is reserved for the mapping, so that the file cannot have it.
  EXPECT_EQ(file->write(0, byte), -ENOSPC);
  EXPECT_EQ(world.copy(start, 1, kHuge).stop, Stop::complete);
  Thread& thread = world.process.spawn_thread();
  thread.fork();
  world.kernel.run();
  EXPECT_EQ(world.copy(start, 1, kHuge).stop, Stop::present);
}

TEST(SimZero, MapsZerosButNotOnHugePages) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  EXPECT_EQ(world.uffd.zero(pages(start, 1)).stop, Stop::complete);
  EXPECT_EQ(world.uffd.zero(pages(start, 1)).stop, Stop::present);
  EXPECT_EQ(byte_of(world.write(start, 8)), 8);
  EXPECT_TRUE(world.messages().empty());
  const Address huge = world.area(Memory::hugetlb_shared, 1, kMissingMode);
  EXPECT_EQ(world.uffd.zero(pages(huge, 1, kHuge)).stop, Stop::invalid);
}

TEST(SimContinue, NeedsAPageInTheCache) {
  World world;
  const Address start = world.area(Memory::shmem_shared, 1, kMissingMode | kMinorMode);
  EXPECT_EQ(world.uffd.resume(pages(start, 1)).stop, Stop::bad_memory);
}

TEST(SimPoison, GivesSigbusUntilItIsCopiedOver) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& reader = world.read(start);
  EXPECT_EQ(world.uffd.poison(pages(start, 1)).stop, Stop::complete);
  world.kernel.run();
  ASSERT_TRUE(reader.last());
  EXPECT_EQ(reader.last()->kind, Completion::Kind::sigbus);
  EXPECT_EQ(result_of(world.access({.address = start, .kernel_mode = true})), -EFAULT);
  EXPECT_EQ(world.uffd.poison(pages(start, 1)).stop, Stop::present);
  EXPECT_EQ(world.copy(start, 6).stop, Stop::complete);
  EXPECT_EQ(byte_of(world.read(start)), 6);
}

// ---- WRITEPROTECT ---------------------------------------------------------------------------------------

TEST(SimProtect, AWriteToAnArmedPageSleepsAndAReadDoesNot) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kWpMode);
  world.write(start, 1);
  ASSERT_EQ(world.uffd.protect(pages(start, 1)).stop, Stop::complete);
  EXPECT_EQ(byte_of(world.read(start)), 1);
  Thread& writer = world.write(start, 2);
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].arg.pagefault.flags, abi::kPagefaultWp | abi::kPagefaultWrite);
  ASSERT_EQ(world.uffd.unprotect(pages(start, 1)).stop, Stop::complete);
  world.kernel.run();
  EXPECT_EQ(byte_of(writer), 2);
}

TEST(SimProtect, EmptyAnonymousPagesAreSkippedUnlessAskedFor) {
  for (const std::uint64_t features : {std::uint64_t{0}, abi::kFeatureWpUnpopulated}) {
    World world(features);
    const Address start = world.area(Memory::anonymous, 1, kWpMode);
    ASSERT_EQ(world.uffd.protect(pages(start, 1)).stop, Stop::complete);
    EXPECT_EQ(asleep(world.write(start)), features != 0);
  }
}

TEST(SimProtect, AnArmedEmptyPageIsMissingFirst) {
  World world(abi::kFeatureWpUnpopulated);
  const Address start = world.area(Memory::anonymous, 1, kMissingMode | kWpMode);
  ASSERT_EQ(world.uffd.protect(pages(start, 1)).stop, Stop::complete);
  Thread& writer = world.write(start);
  auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].arg.pagefault.flags, abi::kPagefaultWrite);
  EXPECT_EQ(world.uffd.zero(pages(start, 1)).stop, Stop::present);
  EXPECT_EQ(world.copy(start, 3, kPage, Wake::yes, Protect::yes).stop, Stop::complete);
  messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].arg.pagefault.flags, abi::kPagefaultWp | abi::kPagefaultWrite);
  EXPECT_TRUE(asleep(writer));
}

TEST(SimProtect, AsynchronousProtectionRecordsAWriteWithoutAMessage) {
  World world(abi::kFeatureWpAsync);
  const Address start = world.area(Memory::anonymous, 1, kWpMode);
  ASSERT_EQ(world.uffd.protect(pages(start, 1)).stop, Stop::complete);
  EXPECT_TRUE(world.process.write_protected(start));
  EXPECT_EQ(byte_of(world.write(start, 4)), 4);
  EXPECT_FALSE(world.process.write_protected(start));
  EXPECT_TRUE(world.messages().empty());
}

TEST(SimProtect, DontneedForgetsAnonymousPagesAndRemembersThoseAboveACache) {
  for (const Memory memory : {Memory::anonymous, Memory::shmem_shared}) {
    World world;
    const Address start = world.area(memory, 1, kWpMode);
    world.write(start);
    ASSERT_EQ(world.uffd.protect(pages(start, 1)).stop, Stop::complete);
    Thread& thread = world.process.spawn_thread();
    thread.advise(pages(start, 1), Advice::dont_need);
    world.kernel.run();
    EXPECT_EQ(world.process.write_protected(start), memory == Memory::shmem_shared);
  }
}

// ---- MOVE -----------------------------------------------------------------------------------------------

TEST(SimMove, TakesThePageAlongAndLeavesAHole) {
  World world;
  const Address dst = world.area(Memory::anonymous, 1, kMissingMode);
  const Address src = world.area(Memory::anonymous, 1);
  world.write(src, 0x33);
  Thread& reader = world.read(dst);
  EXPECT_EQ(world.uffd.move(dst, pages(src, 1)).stop, Stop::complete);
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 0x33);
  EXPECT_FALSE(world.process.present(src));
}

TEST(SimMove, AnotherProcessIsRefused) {
  World world;
  const Address dst = world.area(Memory::anonymous, 1, kMissingMode);
  const Address src = world.area(Memory::anonymous, 1);
  world.write(src);
  Process& daemon = world.kernel.spawn();
  const int fd = world.process.pass_descriptor(world.uffd.fd(), daemon);
  const Uffd passed = Uffd::adopt(fd, Features(), daemon.system_calls());
  EXPECT_EQ(passed.move(dst, pages(src, 1)).stop, Stop::invalid);
  EXPECT_EQ(passed.zero(pages(dst, 1)).stop, Stop::complete);
}

TEST(SimMove, APageThatForkSharedIsBusyUntilItIsWritten) {
  World world;
  const Address dst = world.area(Memory::anonymous, 1, kMissingMode);
  const Address src = world.area(Memory::anonymous, 1);
  world.write(src);
  Thread& thread = world.process.spawn_thread();
  thread.fork();
  world.kernel.run();
  thread.last()->child->kill();
  EXPECT_EQ(world.uffd.move(dst, pages(src, 1)).stop, Stop::busy);
  world.write(src, 5);
  EXPECT_EQ(world.uffd.move(dst, pages(src, 1)).stop, Stop::complete);
}

TEST(SimMove, LosesTheProtectionOfThePage) {
  World world;
  const Address dst = world.area(Memory::anonymous, 1, kMissingMode | kWpMode);
  const Address src = world.area(Memory::anonymous, 1, kWpMode);
  world.write(src);
  ASSERT_EQ(world.uffd.protect(pages(src, 1)).stop, Stop::complete);
  ASSERT_EQ(world.uffd.move(dst, pages(src, 1)).stop, Stop::complete);
  EXPECT_FALSE(world.process.write_protected(dst));
}

TEST(SimMove, AHoleEndsItUnlessHolesAreAllowed) {
  World world;
  const Address dst = world.area(Memory::anonymous, 1, kMissingMode);
  const Address src = world.area(Memory::anonymous, 1);
  EXPECT_EQ(world.uffd.move(dst, pages(src, 1)).stop, Stop::not_ready);
  EXPECT_EQ(world.uffd.move(dst, pages(src, 1), Wake::yes, SourceHoles::allow).stop, Stop::complete);
  EXPECT_FALSE(world.process.present(dst));
}

}  // namespace
}  // namespace uffdkit::sim::test
