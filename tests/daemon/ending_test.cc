// How a manager ends: nobody is left with pages missing.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <filesystem>

#include "daemon/fixture.h"
#include "support/sigbus.h"

namespace uffdkit::test {
namespace {

class Ending : public ManagerTest {
 protected:
  // Touches a few pages and gives some back; after a word from the test finds everything right.
  static void go_on_after_the_end(const ClientMemory& memory, const Channel& channel) {
    for (std::size_t page = 0; page < memory.pages(); page += 37) memory.check(page);
    memory.give_back(100, 20, MADV_DONTNEED);
    channel.send(1);
    channel.receive();
    for (std::size_t page = 0; page < memory.pages(); ++page)
      if (page < 100 || page >= 120) {
        memory.check(page);
      } else {
        memory.check_zero(page);
      }
    memory.give_back(0, 1, MADV_DONTNEED);  // nobody has to hear of it any more
    memory.check_zero(0);
  }

  const Image image_{directory_ / "image", 2048};
  const std::string socket_ = directory_ / "fc.sock";
};

TEST_F(Ending, AFirecrackerClientIsCompletedFirstAndGoesOnWithEveryByteRight) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  Child process = client(image_, whole(image_), socket_, go_on_after_the_end);
  process.channel().receive();
  EXPECT_EQ(manager.stop(), 0) << manager.log();
  EXPECT_FALSE(std::filesystem::exists(socket_));
  EXPECT_FALSE(std::filesystem::exists(manager.control()));
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Ending, ManyClientsAreCompletedFromAColdImage) {
  image_.make_cold();
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  Child first = client(image_, whole(image_), socket_, go_on_after_the_end);
  Child second = client(image_, whole(image_), socket_, go_on_after_the_end);
  Child third = client(image_, whole(image_), socket_, go_on_after_the_end);
  for (const Child* process : {&first, &second, &third}) process->channel().receive();
  image_.make_cold();
  EXPECT_EQ(manager.stop(), 0) << manager.log();
  for (Child* process : {&first, &second, &third}) {
    process->channel().send(1);
    EXPECT_EQ(process->wait(), 0);
  }
}

TEST_F(Ending, AClientThatTouchesAndGivesBackMeanwhileFindsEveryByteRight) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  Child process =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        channel.send(1);
        at_once({[&] { memory.check_all(1, 4); },
                 [&] {
                   // Pages that check_all() finds zero in the image anyway.
                   for (std::size_t page = 5; page < memory.pages(); page += 8) {
                     memory.give_back(page, 1, MADV_DONTNEED);
                     memory.check_zero(page);
                   }
                 }});
      });
  process.channel().receive();
  EXPECT_EQ(manager.stop(), 0) << manager.log();
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Ending, WithoutClientsItEndsAtOnceBySigintToo) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  manager.signal(SIGINT);
  EXPECT_EQ(manager.wait(), 0);
}

TEST_F(Ending, ASilentConnectionDoesNotKeepItFromEnding) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  const UniqueFd silent = connect_to(socket_);
  EXPECT_EQ(manager.stop(), 0);
}

TEST_F(Ending, AClientThatCannotBeCompletedInTimeIsKilledAndTheExitCodeTells) {
  ManagerProcess manager(directory_,
                         {"--firecracker", socket_ + "=" + image_.path(), "--drain-seconds", "0"});
  Child process =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        memory.check(1);
        channel.send(1);
        channel.receive();
      });
  process.channel().receive();

  const int exit_code = manager.stop();
  if (exit_code == 0) {
    // It was quicker than the deadline: then the client must live.
    process.channel().send(1);
    EXPECT_EQ(process.wait(), 0);
  } else {
    EXPECT_EQ(exit_code, 1);
    EXPECT_EQ(process.wait(), -SIGKILL);
    EXPECT_TRUE(manager.logged("before the client's memory is complete")) << manager.log();
  }
}

// As a jailer does it for the process that it has confined: what is killed is not whose memory it is.
TEST_F(Ending, MemoryThatAnotherProcessHandedOverHasSigbusAndNoZerosForWhatIsMissing) {
  if (const std::string lacking = poisoning_lacks(); !lacking.empty()) GTEST_SKIP() << lacking;
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image_.path(), "--drain-seconds", "0",
                                      "--store-fault", "stall,from=1M"});
  Child process = program([&](const Channel& channel) {
    const ClientMemory memory(image_, whole(image_));
    Child jailer = program([&](const Channel& own) {
      const UniqueFd connection = memory.hand_over(socket_);
      own.send(1);
      own.receive();
    });
    jailer.channel().receive();
    // The manager's is the only one that is left.
    memory.give_up_descriptor();
    memory.check(1);
    // Three mappings.
    require(::mprotect(memory.bytes(400).data(), 4096, PROT_READ) == 0, "mprotect");
    channel.send(1);
    channel.receive();
    require(jailer.wait() == -SIGKILL, "who handed it over lives");
    memory.check(1);
    for (std::size_t page = 256; page < memory.pages(); page += 3)
      if (!Image::is_hole(page))
        require(raises_sigbus(memory.bytes(page).data()), "page " + std::to_string(page) + " can be read");
  });
  process.channel().receive();
  EXPECT_EQ(manager.stop(), 1) << manager.log();
  EXPECT_TRUE(manager.logged("before the client's memory is complete")) << manager.log();
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

}  // namespace
}  // namespace uffdkit::test
