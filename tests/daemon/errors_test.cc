// Pages that cannot be read answer with SIGBUS, are reported, and harm nobody else.
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <fstream>

#include "daemon/fixture.h"
#include "support/program.h"
#include "support/sigbus.h"
#include "support/wall.h"

namespace uffdkit::test {
namespace {

class Errors : public ManagerTest {
 protected:
  // What is lost stays lost here, so trying again would only take time.
  static std::vector<std::string> without_retries(std::vector<std::string> arguments) {
    arguments.insert(arguments.end(), {"--read-retries", "0"});
    return arguments;
  }
  void SetUp() override {
    ManagerTest::SetUp();
    if (const std::string lacking = poisoning_lacks(); !lacking.empty()) GTEST_SKIP() << lacking;
  }

  const Image image_{directory_ / "image", 256};
  const std::string socket_ = directory_ / "fc.sock";
  ManagerProcess manager_{directory_, without_retries(firecracker(socket_, image_))};
};

TEST_F(Errors, PagesThatAnImageHasLostRaiseSigbusAndTheOthersAreServed) {
  Child process = client(image_, whole(image_), socket_, [&](const ClientMemory& memory, const Channel&) {
    for (std::size_t page = 96; page < 120; ++page) memory.check(page);
    image_.cut(100);
    for (std::size_t page = 0; page < 256; ++page) {
      // Where the image was a hole nothing had to be read; and what came with a neighbour stays.
      const bool came = page < 100 || (page < 128 && page / 16 * 16 <= 119);
      if (came || Image::is_hole(page)) {
        memory.check(page);
      } else {
        require(raises_sigbus(memory.bytes(page).data()), "page " + std::to_string(page) + " can be read");
        require(raises_sigbus(memory.bytes(page).data()),
                "page " + std::to_string(page) + " can be read again");
      }
    }
  });
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

TEST_F(Errors, APageErrorIsLoggedWithImageAndOffsetAndCounted) {
  Child process =
      client(image_, whole(image_), socket_, [&](const ClientMemory& memory, const Channel& channel) {
        memory.check(0);
        image_.cut(100);
        require(raises_sigbus(memory.bytes(160).data()), "page 160 can be read");
        channel.send(1);
        channel.receive();
        memory.check(50);
      });
  process.channel().receive();
  EXPECT_TRUE(eventually([&] { return manager_.logged("read " + image_.path() + " at offset 655360"); }))
      << manager_.log();
  EXPECT_TRUE(eventually([&] { return manager_.total("pages_poisoned") == 1; })) << manager_.status();
  EXPECT_EQ(manager_.total("read_errors"), 1u);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Errors, AnErrorOfOneImageDoesNotReachTheClientsOfAnother) {
  const TempDir directory;
  const Image other(directory / "other", 256, 9);
  const std::string a = directory / "a.sock";
  const std::string b = directory / "b.sock";
  ManagerProcess manager(directory, without_retries({"--firecracker", a + "=" + image_.path(),
                                                     "--firecracker", b + "=" + other.path()}));
  Child failing = client(image_, whole(image_), a, [&](const ClientMemory& memory, const Channel& channel) {
    memory.check(0);
    image_.cut(1);
    require(raises_sigbus(memory.bytes(16).data()), "page 16 can be read");
    channel.send(1);
    channel.receive();
  });
  failing.channel().receive();
  Child fine = client(other, whole(other), b,
                      [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
  EXPECT_EQ(fine.wait(), 0);
}

TEST_F(Errors, ASystemCallOnALostPageFailsAndTheClientLivesOn) {
  Child process = client(image_, whole(image_), socket_, [&](const ClientMemory& memory, const Channel&) {
    memory.check(0);
    image_.cut(16);
    int ends[2];
    require(pipe(ends) == 0, "pipe");
    require(write(ends[1], memory.bytes(33).data(), 4096) == -1, "a lost page was written");
    require(write(ends[1], memory.bytes(7).data(), 4096) == 4096, "another page was not written");
  });
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

// These arguments, and a fault of the manager's images.
std::vector<std::string> with_fault(std::vector<std::string> arguments, const std::string& fault) {
  arguments.insert(arguments.end(), {"--store-fault", fault});
  return arguments;
}

TEST_F(Errors, ReadsThatFailAreTriedAgainUntilTheySucceedAndCounted) {
  const TempDir directory;
  const std::string socket = directory / "fc.sock";
  ManagerProcess manager(directory, with_fault(firecracker(socket, image_), "error,times=2"));
  Child process = client(image_, {.regions = {{.pages = 32}}}, socket,
                         [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
  EXPECT_EQ(process.wait(), 0) << manager.log();
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
  EXPECT_GE(manager.total("read_retries"), 1u);
  EXPECT_EQ(manager.total("read_errors"), 0u);
}

TEST_F(Errors, WithOnErrorKillTheClientThatTouchesALostPageDiesAndNoOther) {
  const TempDir directory;
  const std::string socket = directory / "fc.sock";
  auto arguments = with_fault(firecracker(socket, image_), "error,from=64K,to=68K");
  arguments.insert(arguments.end(), {"--on-error", "kill", "--read-retries", "1"});
  ManagerProcess manager(directory, arguments);
  Child fine = client(image_, {.regions = {{.pages = 64}}}, socket,
                      [](const ClientMemory& memory, const Channel& channel) {
                        memory.check(0);
                        channel.send(1);
                        channel.receive();
                        memory.check(1);
                        memory.check(17);
                      });
  fine.channel().receive();
  Child failing = client(image_, {.regions = {{.pages = 64}}}, socket,
                         [](const ClientMemory& memory, const Channel&) { memory.check(16); });
  EXPECT_EQ(failing.wait(), -SIGKILL) << manager.log();
  EXPECT_TRUE(eventually([&] { return manager.logged(image_.path() + " at offset 65536"); }))
      << manager.log();
  fine.channel().send(1);
  EXPECT_EQ(fine.wait(), 0) << manager.log();
}

TEST_F(Errors, AFaultThatWaitsForLongIsToldWithItsPageItsImageAndTheReason) {
  const TempDir directory;
  const std::string socket = directory / "fc.sock";
  const std::string path = directory / "wall";
  Wall wall(path);
  auto arguments = with_fault(firecracker(socket, image_), "stall,from=64K,to=128K,while=" + path);
  arguments.insert(arguments.end(), {"--watchdog-seconds", "0.05"});
  const ManagerProcess manager(directory, arguments);
  Child stuck = client(image_, whole(image_), socket, [](const ClientMemory& memory, const Channel& channel) {
    channel.send(std::bit_cast<std::uintptr_t>(memory.bytes(19).data()));
    memory.check(19);
  });
  const std::string address = fmt::format("{:#x}", stuck.channel().receive());
  EXPECT_TRUE(eventually([&] {
    return manager.logged("the page at " + address + ", at offset 77824 of " + image_.path()) &&
           manager.logged("its read from the image has not come back");
  })) << manager.log();
  const nlohmann::json oldest = manager.status().at("sessions").at(0).at("oldest_pending");
  EXPECT_EQ(oldest.at("address"), address);
  EXPECT_EQ(oldest.at("offset"), 77824);
  EXPECT_EQ(oldest.at("why"), "reading");
  EXPECT_EQ(oldest.at("late"), true);
  EXPECT_EQ(manager.count("late_faults"), 1u);
  const Finished status = run_program("uffdkit", {"status", "--control", manager.control()});
  EXPECT_NE(status.out.find("the page at " + address), std::string::npos) << status.out;
  wall.take_down();
  EXPECT_EQ(stuck.wait(), 0);
}

// The state of a process, as /proc shows it: 'T' if it is stopped.
char state_of(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/stat");
  std::string text;
  std::getline(file, text);
  return text.at(text.rfind(')') + 2);
}

// A manager that stops who touches page 16, while the file `broken` is there.
class Pause : public Errors {
 protected:
  std::vector<std::string> arguments() const {
    auto list =
        without_retries(with_fault(firecracker(paused_, image_), "error,from=64K,to=68K,while=" + broken_));
    list.insert(list.end(), {"--on-error", "pause"});
    return list;
  }
  // A client that says when it is about to touch page 16.
  Child touch_16(const std::function<void(const ClientMemory&)>& then = [](const ClientMemory&) {}) const {
    return client(image_, {.regions = {{.pages = 64}}}, paused_,
                  [&](const ClientMemory& memory, const Channel& channel) {
                    memory.check(0);
                    channel.send(1);
                    memory.check(16);
                    then(memory);
                  });
  }
  static bool is_paused(const ManagerProcess& manager) {
    const nlohmann::json status = manager.status();
    return std::ranges::any_of(status.at("sessions"),
                               [](const auto& session) { return session.at("paused") == true; });
  }
  static Finished resume(const ManagerProcess& manager, std::uint64_t session) {
    return run_program("uffdkit", {"resume", "--control", manager.control(), std::to_string(session)});
  }

  const TempDir own_;
  const std::string paused_ = own_ / "fc.sock";
  const std::string broken_ = own_ / "broken";
  const UniqueFd made_{open(broken_.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600)};
};

TEST_F(Pause, AClientIsStoppedOverALostPageUntilAnOperatorSaysThatItMayGoOn) {
  const ManagerProcess manager(own_, arguments());
  Child stopped = touch_16([](const ClientMemory& memory) { memory.check_all(1, 1); });
  EXPECT_TRUE(eventually([&] { return is_paused(manager) && state_of(stopped.pid()) == 'T'; }))
      << manager.log();
  EXPECT_TRUE(eventually([&] { return manager.logged("its client was stopped"); })) << manager.log();
  const Finished status = run_program("uffdkit", {"status", "--control", manager.control()});
  EXPECT_NE(status.out.find("'uffdkit resume 1' lets it go on"), std::string::npos) << status.out;
  // Others are served.
  Child fine = client(image_, {.regions = {{.pages = 16}}}, paused_,
                      [](const ClientMemory& memory, const Channel&) { memory.check_all(1, 1); });
  EXPECT_EQ(fine.wait(), 0) << manager.log();
  // Too early: it is stopped again.
  ASSERT_EQ(resume(manager, 1).exit_code, 0);
  EXPECT_TRUE(eventually([&] { return manager.total("read_errors") == 2 && is_paused(manager); }));
  EXPECT_TRUE(eventually([&] { return state_of(stopped.pid()) == 'T'; }));
  ASSERT_EQ(unlink(broken_.c_str()), 0);
  ASSERT_EQ(resume(manager, 1).exit_code, 0);
  EXPECT_EQ(stopped.wait(), 0) << manager.log();
  EXPECT_EQ(manager.total("pages_poisoned"), 0u);
}

TEST_F(Pause, AtTheManagersEndAStoppedClientGoesOnWithoutThePage) {
  ManagerProcess manager(own_, arguments());
  Child stopped = touch_16();
  EXPECT_TRUE(eventually([&] { return is_paused(manager) && state_of(stopped.pid()) == 'T'; }))
      << manager.log();
  EXPECT_EQ(manager.stop(), 0) << manager.log();
  EXPECT_EQ(stopped.wait(), -SIGBUS);
}

TEST_F(Pause, AStoppedClientCanBeKilled) {
  const ManagerProcess manager(own_, arguments());
  Child stopped = touch_16();
  EXPECT_TRUE(eventually([&] { return is_paused(manager); })) << manager.log();
  stopped.kill();
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; })) << manager.log();
  const Finished late = resume(manager, 1);
  EXPECT_EQ(late.exit_code, 1);
  EXPECT_NE(late.err.find("there is no session 1"), std::string::npos) << late.err;
}

TEST_F(Errors, OfReadsThatFailNowAndThenNoByteArrivesWrong) {
  const TempDir directory;
  const std::string socket = directory / "fc.sock";
  auto arguments = with_fault(firecracker(socket, image_), "error,rate=0.1,seed=5");
  arguments = with_fault(arguments, "short,rate=0.05,seed=6");
  arguments = with_fault(arguments, "delay,rate=0.05,seed=7,ms=3");
  ManagerProcess manager(directory, arguments);
  Child process = client(image_, whole(image_), socket,
                         [](const ClientMemory& memory, const Channel&) { memory.check_all(4, 3); });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_F(Errors, AStoreThatDoesNotAnswerHoldsUpNoClientOfAnotherAndGoesOnWhenItAnswers) {
  const TempDir directory;
  const Image other(directory / "other", 256, 9);
  const std::string a = directory / "a.sock";
  const std::string b = directory / "b.sock";
  const std::string path = directory / "wall";
  const auto stall = "stall,image=" + image_.path() + ",while=" + path;
  ManagerProcess manager(
      directory,
      with_fault({"--firecracker", a + "=" + image_.path(), "--firecracker", b + "=" + other.path()}, stall));
  Wall wall(path);
  Child stuck = client(image_, whole(image_), a,
                       [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
  EXPECT_TRUE(eventually([&] { return manager.total("fetches") > 0; }));
  Child fine = client(other, whole(other), b,
                      [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
  EXPECT_EQ(fine.wait(), 0) << manager.log();
  wall.take_down();
  EXPECT_EQ(stuck.wait(), 0) << manager.log();
}

}  // namespace
}  // namespace uffdkit::test
