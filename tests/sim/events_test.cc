// The life of an event, and what becomes of a userfaultfd when one side is gone, on the model.
#include <gtest/gtest.h>

#include "sim/world.h"

namespace uffdkit::sim::test {
namespace {

// ---- events ---------------------------------------------------------------------------------------------

TEST(SimEvent, MadviseSleepsUntilItsEventIsReadAndThePagesAreThereMeanwhile) {
  World world(abi::kFeatureEventRemove);
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  world.copy(start, 7);
  Thread& remover = world.process.spawn_thread();
  remover.advise(pages(start, 1), Advice::dont_need);
  world.kernel.run();
  EXPECT_EQ(remover.state(), Thread::State::event_sleep);
  EXPECT_EQ(byte_of(world.read(start)), 7);
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].event, abi::kEventRemove);
  EXPECT_EQ(messages[0].arg.remove.start, start.value);
  EXPECT_EQ(messages[0].arg.remove.end, start.value + kPage);
  EXPECT_EQ(result_of(remover), 0);
  EXPECT_TRUE(asleep(world.read(start)));
}

TEST(SimEvent, FreeIsRemoveToo) {
  World world(abi::kFeatureEventRemove);
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  thread.advise(pages(start, 1), Advice::free);
  world.kernel.run();
  EXPECT_EQ(world.messages().at(0).event, abi::kEventRemove);
}

TEST(SimEvent, NothingCanBeFilledUntilTheThreadHasRunAgain) {
  World world(abi::kFeatureEventRemove);
  const Address start = world.area(Memory::anonymous, 2, kMissingMode | kWpMode);
  Thread& remover = world.process.spawn_thread();
  remover.advise(pages(start, 1), Advice::dont_need);
  world.kernel.run();
  const std::vector<std::byte> bytes(kPage, std::byte{1});
  const auto all_refused = [&] {
    const AddressRange page = pages(at(start, 1), 1);
    return world.uffd.copy(page.start, bytes).stop == Stop::changing &&
           world.uffd.zero(page).stop == Stop::changing && world.uffd.poison(page).stop == Stop::changing &&
           world.uffd.resume(page).stop == Stop::changing &&
           world.uffd.protect(page).stop == Stop::changing &&
           world.uffd.move(page.start, pages(start, 1)).stop == Stop::changing;
  };
  EXPECT_TRUE(all_refused());
  EXPECT_TRUE(world.uffd.register_range(pages(start, 2), kMissing | kWriteProtect));
  EXPECT_TRUE(world.uffd.wake(pages(start, 2)));
  // Reading the event makes the thread runnable; the memory is at rest when it has run.
  std::array<abi::Msg, 1> message;
  ASSERT_EQ(world.uffd.read(message).messages, 1u);
  EXPECT_TRUE(all_refused());
  world.kernel.run();
  EXPECT_EQ(world.uffd.copy(at(start, 1), bytes).stop, Stop::complete);
}

TEST(SimEvent, TheOutFieldTellsOfChangeSinceLinux616) {
  for (const Version version : {Version{6, 15}, Version{6, 16}}) {
    World world(abi::kFeatureEventRemove, {.version = version});
    const Address start = world.area(Memory::anonymous, 1, kMissingMode);
    Thread& remover = world.process.spawn_thread();
    remover.advise(pages(start, 1), Advice::dont_need);
    world.kernel.run();
    abi::FillArgs args{.range = {start.value, kPage}, .mode = 0, .done = 777};
    EXPECT_EQ(world.process.system_calls().ioctl(world.uffd.fd(), abi::kIoctlZeropage,
                                                 reinterpret_cast<std::uintptr_t>(&args)),
              -EAGAIN);
    EXPECT_EQ(args.done, version < Version(6, 16) ? 777 : -EAGAIN);
  }
}

TEST(SimEvent, MunmapTellsOfTheWholeRangeAfterTheDeed) {
  World world(abi::kFeatureEventUnmap);
  const Address start = world.area(Memory::anonymous, 4, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  thread.unmap(pages(at(start, 1), 2));
  world.kernel.run();
  EXPECT_EQ(thread.state(), Thread::State::event_sleep);
  EXPECT_EQ(world.read(at(start, 1)).last()->kind, Completion::Kind::sigsegv);
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].event, abi::kEventUnmap);
  EXPECT_EQ(messages[0].arg.remove.start, start.value + kPage);
  EXPECT_EQ(messages[0].arg.remove.end, start.value + 3 * kPage);
}

TEST(SimEvent, MremapTellsOfTheMoveThenOfThePlaceLeftBehind) {
  World world(abi::kFeatureEventRemap | abi::kFeatureEventUnmap);
  const Address start = world.area(Memory::anonymous, 2, kMissingMode);
  world.copy(start, 3);
  Thread& thread = world.process.spawn_thread();
  const Address target = start + ByteCount(64 * kPage);
  thread.remap({.from = pages(start, 2), .new_length = ByteCount(2 * kPage), .may_move = true, .to = target});
  world.kernel.run();
  auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].event, abi::kEventRemap);
  EXPECT_EQ(messages[0].arg.remap.from, start.value);
  EXPECT_EQ(messages[0].arg.remap.to, target.value);
  EXPECT_EQ(messages[0].arg.remap.len, 2 * kPage);
  messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].event, abi::kEventUnmap);
  EXPECT_EQ(byte_of(world.read(target)), 3);
  EXPECT_TRUE(asleep(world.read(at(target, 1))));
}

TEST(SimEvent, MremapWithoutTheFeatureDropsTheRegistrationSilently) {
  World world;
  const Address start = world.area(Memory::anonymous, 2, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  const Address target = start + ByteCount(64 * kPage);
  thread.remap({.from = pages(start, 2), .new_length = ByteCount(2 * kPage), .may_move = true, .to = target});
  world.kernel.run();
  EXPECT_TRUE(world.messages().empty());
  EXPECT_EQ(byte_of(world.read(target)), 0);
}

TEST(SimEvent, MremapThatGrowsTellsTheOldLengthOfMemoryWhoseNewPartIsRegisteredToo) {
  World world(abi::kFeatureEventRemap);
  const Address start = world.area(Memory::anonymous, 2, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  const Address target = start + ByteCount(64 * kPage);
  thread.remap({.from = pages(start, 2), .new_length = ByteCount(4 * kPage), .may_move = true, .to = target});
  world.kernel.run();
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  EXPECT_EQ(messages[0].arg.remap.len, 2 * kPage);
  EXPECT_TRUE(asleep(world.read(at(target, 3))));
}

TEST(SimEvent, MovingAPageNextToItsOwnAreaWithoutTheFeatureUnregistersTheWholeArea) {
  World world;
  const Address start = world.area(Memory::anonymous, 4, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  thread.remap(
      {.from = pages(start, 1), .new_length = ByteCount(kPage), .may_move = true, .to = at(start, 4)});
  world.kernel.run();
  EXPECT_EQ(byte_of(world.read(at(start, 2))), 0);
}

TEST(SimEvent, ShmemDontneedGivesNoNewMissingFaultButRemoveDoes) {
  World world;
  const Address start = world.area(Memory::shmem_shared, 1, kMissingMode);
  world.copy(start, 5);
  Thread& thread = world.process.spawn_thread();
  thread.advise(pages(start, 1), Advice::dont_need);
  world.kernel.run();
  EXPECT_EQ(byte_of(world.read(start)), 5);
  thread.advise(pages(start, 1), Advice::remove);
  world.kernel.run();
  EXPECT_TRUE(asleep(world.read(start)));
}

// ---- fork -----------------------------------------------------------------------------------------------

TEST(SimFork, ReturnsWhenItsEventIsReadAndTheReaderGetsTheChildsUserfaultfd) {
  World world(abi::kFeatureEventFork);
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& forker = world.process.spawn_thread();
  forker.fork();
  world.kernel.run();
  EXPECT_EQ(forker.state(), Thread::State::event_sleep);
  const auto messages = world.messages();
  ASSERT_EQ(messages.size(), 1u);
  ASSERT_EQ(messages[0].event, abi::kEventFork);
  Process* child = forker.last()->child;
  ASSERT_NE(child, nullptr);
  Uffd of_child =
      Uffd::adopt(static_cast<int>(messages[0].arg.fork.ufd), Features(), world.process.system_calls());
  Thread& reader = *child->threads().front();
  reader.access({.address = start});
  world.kernel.run();
  EXPECT_TRUE(asleep(reader));
  EXPECT_TRUE(world.messages().empty());
  const std::vector<std::byte> bytes(kPage, std::byte{6});
  EXPECT_EQ(of_child.copy(start, bytes).stop, Stop::complete);
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 6);
  EXPECT_FALSE(world.process.present(start));
}

TEST(SimFork, WithoutTheFeatureTheChildIsOnItsOwn) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& forker = world.process.spawn_thread();
  forker.fork();
  world.kernel.run();
  Thread& reader = *forker.last()->child->threads().front();
  reader.access({.address = start});
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 0);
}

TEST(SimFork, AHoleOfAFileThatAnUnservedChildReadsIsZeroForItsParentToo) {
  World world;
  const Address start = world.area(Memory::shmem_private, 1, kMissingMode);
  Thread& forker = world.process.spawn_thread();
  forker.fork();
  world.kernel.run();
  Thread& reader = *forker.last()->child->threads().front();
  reader.access({.address = start});
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 0);
  EXPECT_EQ(byte_of(world.read(start)), 0);
  EXPECT_TRUE(world.messages().empty());
}

TEST(SimFork, AnInheritedDescriptorKeepsTheParentsThreadsWaiting) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& forker = world.process.spawn_thread();
  forker.fork();
  world.kernel.run();
  Thread& reader = world.read(start);
  const int fd = world.uffd.release();
  world.process.system_calls().close(fd);
  world.kernel.run();
  EXPECT_TRUE(asleep(reader));
  forker.last()->child->system_calls().close(fd);
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 0);
}

TEST(SimFork, ProtectionPersistsInTheChildOnlyWithTheFeature) {
  for (const std::uint64_t features : {std::uint64_t{0}, abi::kFeatureEventFork}) {
    World world(features);
    const Address start = world.area(Memory::anonymous, 1, kWpMode);
    world.write(start);
    ASSERT_EQ(world.uffd.protect(pages(start, 1)).stop, Stop::complete);
    Thread& forker = world.process.spawn_thread();
    forker.fork();
    world.kernel.run();
    world.messages();
    EXPECT_EQ(forker.last()->child->write_protected(start), features != 0);
  }
}

TEST(SimFork, AReaderWithoutAFreeDescriptorLeavesTheEventQueued) {
  World world(abi::kFeatureEventFork, {.descriptors_max = 2});
  world.area(Memory::anonymous, 1, kMissingMode);
  Thread& forker = world.process.spawn_thread();
  forker.fork();
  world.kernel.run();
  SystemCalls& calls = world.process.system_calls();
  const int taken = calls.duplicate(world.uffd.fd());
  abi::Msg message;
  EXPECT_EQ(calls.read(world.uffd.fd(), &message, sizeof(message)), -EMFILE);
  EXPECT_TRUE(asleep(forker));
  calls.close(taken);
  EXPECT_EQ(world.messages().size(), 1u);
}

TEST(SimFork, AParentThatDiesBeforeTheReadHasNoChild) {
  World world(abi::kFeatureEventFork);
  Process& daemon = world.kernel.spawn();
  const int fd = world.process.pass_descriptor(world.uffd.fd(), daemon);
  world.area(Memory::anonymous, 1, kMissingMode);
  world.process.spawn_thread().fork();
  world.kernel.run();
  world.process.kill();
  abi::Msg message;
  EXPECT_EQ(daemon.system_calls().read(fd, &message, sizeof(message)), -EAGAIN);
  EXPECT_TRUE(world.kernel.violations().empty());
}

// ---- the end of either side -----------------------------------------------------------------------------

TEST(SimEnd, ClosingTheLastDescriptorGivesSleepersZeroPages) {
  World world;
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& reader = world.read(start);
  SystemCalls& calls = world.process.system_calls();
  const int other = calls.duplicate(world.uffd.fd());
  calls.close(world.uffd.release());
  world.kernel.run();
  EXPECT_TRUE(asleep(reader));
  calls.close(other);
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 0);
}

TEST(SimEnd, ClosingFlushesEvents) {
  World world(abi::kFeatureEventUnmap);
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Thread& thread = world.process.spawn_thread();
  thread.unmap(pages(start, 1));
  world.kernel.run();
  world.process.system_calls().close(world.uffd.release());
  world.kernel.run();
  EXPECT_EQ(result_of(thread), 0);
}

TEST(SimEnd, ADeadTargetIsSilentAndAnswersEsrchAndEnomem) {
  for (const bool by_exec : {false, true}) {
    World world;
    const Address start = world.area(Memory::anonymous, 1, kMissingMode);
    Process& daemon = world.kernel.spawn();
    const int fd = world.process.pass_descriptor(world.uffd.fd(), daemon);
    const Uffd passed = Uffd::adopt(fd, Features(), daemon.system_calls());
    world.read(start);
    if (by_exec)
      world.process.exec();
    else
      world.process.kill();
    EXPECT_FALSE(passed.wait_readable(0).value());
    EXPECT_EQ(passed.zero(pages(start, 1)).stop, Stop::gone);
    EXPECT_EQ(passed.protect(pages(start, 1)).stop, Stop::gone);
    EXPECT_EQ(passed.register_range(pages(start, 1), kMissing).error().os_error(), ENOMEM);
    EXPECT_EQ(passed.unregister_range(pages(start, 1)).error().os_error(), ENOMEM);
    EXPECT_TRUE(passed.wake(pages(start, 1)));
    EXPECT_FALSE(passed.target_alive());
  }
}

TEST(SimEnd, TheDaemonsDeathFreesTheClientUnlessItKeptADescriptor) {
  for (const bool kept : {false, true}) {
    World world;
    const Address start = world.area(Memory::anonymous, 1, kMissingMode);
    Process& daemon = world.kernel.spawn();
    world.process.pass_descriptor(world.uffd.fd(), daemon);
    if (!kept) world.process.system_calls().close(world.uffd.release());
    Thread& reader = world.read(start);
    daemon.kill();
    world.kernel.run();
    EXPECT_EQ(asleep(reader), kept);
  }
}

TEST(SimEnd, AReceivedDescriptorShowsItsFeaturesAndServesItsCreator) {
  World world(abi::kFeatureEventUnmap);
  const Address start = world.area(Memory::anonymous, 1, kMissingMode);
  Process& daemon = world.kernel.spawn();
  const int fd = world.process.pass_descriptor(world.uffd.fd(), daemon);
  auto received = Uffd::receive(fd, daemon.system_calls());
  ASSERT_TRUE(received) << received.error().text();
  EXPECT_EQ(received->features(), Features(abi::kFeatureEventUnmap));
  Thread& reader = world.read(start);
  EXPECT_EQ(received->zero(pages(start, 1)).stop, Stop::complete);
  world.kernel.run();
  EXPECT_EQ(byte_of(reader), 0);
}

TEST(SimInvariants, HoldThroughARunWithManyTurnsBetweenCalls) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    World world(abi::kFeatureEventRemove, {.seed = seed, .turns_before_calls = 3});
    const Address start = world.area(Memory::anonymous, 8, kMissingMode | kWpMode);
    std::vector<Thread*> threads;
    for (std::uint64_t page = 0; page < 8; ++page) {
      threads.push_back(&world.process.spawn_thread());
      threads.back()->access({.address = at(start, page), .write = page % 2 == 0, .value = std::byte{9}});
    }
    threads.push_back(&world.process.spawn_thread());
    threads.back()->advise(pages(start, 8), Advice::dont_need);
    const std::vector<std::byte> bytes(kPage, std::byte{1});
    // A page that cannot be filled now, because the memory is changing, has to be kept: nobody asks again.
    std::vector<Address> waiting;
    while (world.uffd.wait_readable(1000).value() || !waiting.empty()) {
      std::array<abi::Msg, 4> messages;
      const std::size_t count = world.uffd.read(messages).messages;
      for (const abi::Msg& message : std::span(messages).first(count))
        if (message.event == abi::kEventPagefault) waiting.emplace_back(message.arg.pagefault.address);
      std::erase_if(waiting, [&](Address page) {
        const Stop stop = world.uffd.copy(page, bytes).stop;
        if (stop == Stop::present) {
          EXPECT_TRUE(world.uffd.wake(pages(page, 1)));
        }
        return stop != Stop::changing;
      });
      EXPECT_TRUE(world.kernel.violations().empty()) << "seed " << seed;
    }
    for (const Thread* thread : threads) EXPECT_EQ(thread->state(), Thread::State::idle) << "seed " << seed;
  }
}

}  // namespace
}  // namespace uffdkit::sim::test
