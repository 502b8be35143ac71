// Managers whose processes are killed while clients never rest: every byte is compared, and nobody hangs.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <string>

#include "daemon/fixture.h"
#include "support/turmoil.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPages = 1024;

class Crash : public ManagerTest {
 protected:
  void SetUp() override {
    if (const std::string lacking = Turmoil::lack(Turmoil::Kind::forking); !lacking.empty())
      GTEST_SKIP() << lacking;
  }
  std::vector<std::string> arguments() const {
    return {"--firecracker",         firecracker_ + "=" + image_.path(), "--listen", native_, "--image",
            "image=" + image_.path()};
  }
  // Of all kinds; among the native ones some share the image.
  void start(Turmoil& clients, std::size_t count) {
    for (std::size_t i = 0; i < count; ++i) {
      const Turmoil::Kind kind = i % 3 == 0   ? Turmoil::Kind::forking
                                 : i % 3 == 1 ? Turmoil::Kind::firecracker
                                              : Turmoil::Kind::native;
      AttachOptions options;
      if (i % 2 == 1) options.sharing = AttachOptions::Share::if_possible;
      options.removed_reads_zero = true;
      clients.start({.kind = kind,
                     .socket = kind == Turmoil::Kind::native ? native_ : firecracker_,
                     .image_name = "image",
                     .options = options,
                     .seed = random_()});
    }
  }
  void pause(unsigned most_ms) { usleep(static_cast<useconds_t>(random_() % (1000 * most_ms))); }
  // Kills at random instants, under so many clients.
  void kill_workers(std::size_t clients, int kills, unsigned most_ms) {
    const ManagerProcess manager(directory_, arguments());
    Turmoil turmoil(image_);
    start(turmoil, clients);
    for (int i = 0; i < kills; ++i) {
      pause(most_ms);
      ::kill(manager.worker_pid(), SIGKILL);
      ASSERT_EQ(turmoil.hanging(), "") << manager.log();
    }
    EXPECT_EQ(manager.count("takeovers"), static_cast<std::uint64_t>(kills));
    EXPECT_EQ(turmoil.stop(), 0u) << manager.log();
    EXPECT_GT(turmoil.counts().steps, 0u);
  }

  const Image image_{directory_ / "image", kPages};
  const std::string firecracker_ = directory_ / "firecracker.sock";
  const std::string native_ = directory_ / "native.sock";
  std::mt19937_64 random_{20'261'125};
};

TEST_F(Crash, OneClientOfAWorkerThatIsKilledAgainAndAgainHasEveryByte) {
  kill_workers(1, 200, 10);
}

TEST_F(Crash, EightClientsOfAWorkerThatIsKilledAgainAndAgainHaveEveryByte) {
  kill_workers(8, 100, 20);
}

TEST_F(Crash, SixtyFourClientsOfAWorkerThatIsKilledAgainAndAgainHaveEveryByte) {
  kill_workers(64, 20, 100);
}

TEST_F(Crash, KeeperAndWorkerMayBeKilledInTurn) {
  const ManagerProcess manager(directory_, arguments());
  Turmoil turmoil(image_);
  start(turmoil, 4);
  for (int i = 0; i < 20; ++i) {
    const auto keeper = manager.status().at("keeper").at("pid").get<pid_t>();
    ::kill(keeper, SIGKILL);
    pause(10);
    ::kill(manager.worker_pid(), SIGKILL);
    ASSERT_TRUE(eventually([&] { return manager.status().at("keeper").at("pid") != keeper; }));
  }
  EXPECT_EQ(manager.count("takeovers"), 20u);
  EXPECT_EQ(turmoil.hanging(), "");
  EXPECT_EQ(turmoil.stop(), 0u) << manager.log();
}

TEST_F(Crash, AStandbyThatIsKilledIsReplaced) {
  const ManagerProcess manager(directory_, arguments());
  const auto standby = [&] { return manager.status().at("standby").at("pid").get<pid_t>(); };
  const pid_t first = standby();
  ::kill(first, SIGKILL);
  EXPECT_TRUE(eventually([&] { return standby() != first; }));
  EXPECT_EQ(manager.count("takeovers"), 0u);
}

TEST_F(Crash, AKeeperThatTookOverEndsAsTheFirstOneDoes) {
  ManagerProcess manager(directory_, arguments());
  const pid_t first = manager.pid();
  manager.signal(SIGKILL);
  ASSERT_TRUE(eventually([&] { return manager.status().at("keeper").at("pid") != first; }));
  const auto keeper = manager.status().at("keeper").at("pid").get<pid_t>();
  EXPECT_EQ(manager.status().at("pid"), keeper);
  ASSERT_EQ(::kill(keeper, SIGTERM), 0);
  EXPECT_TRUE(eventually([&] { return !std::filesystem::exists(manager.control()); }));
  EXPECT_FALSE(std::filesystem::exists(native_));
}

TEST_F(Crash, AnEndThatHasBegunIsGoneOnWith) {
  ManagerProcess manager(directory_, arguments());
  const Child process =
      client(image_, whole(image_), firecracker_, [](const ClientMemory& memory, const Channel& channel) {
        memory.check(0);
        channel.send(1);
        channel.receive();
        memory.check_all(2, 1);
        channel.send(2);
        channel.receive();
      });
  process.channel().receive();
  const pid_t worker = manager.worker_pid();
  image_.make_cold();
  manager.signal(SIGTERM);
  ::kill(worker, SIGKILL);
  EXPECT_EQ(manager.wait(), 0) << manager.log();
  // All of it is there without anybody.
  process.channel().send(1);
  EXPECT_EQ(process.channel().receive(), 2u);
}

TEST_F(Crash, ClientsNoticeAnUpgradeAsLittle) {
  const ManagerProcess manager(directory_, arguments());
  Turmoil turmoil(image_);
  start(turmoil, 4);
  for (std::uint64_t upgrades = 1; upgrades <= 5; ++upgrades) {
    pause(50);
    manager.signal(SIGHUP);
    ASSERT_TRUE(eventually([&] { return manager.count("upgrades") == upgrades; })) << manager.log();
  }
  EXPECT_EQ(manager.status().at("keeper").at("pid"), manager.pid());
  EXPECT_EQ(turmoil.hanging(), "");
  EXPECT_EQ(turmoil.stop(), 0u) << manager.log();
}

TEST_F(Crash, AProgramThatDoesNotStartIsFollowedByTheOldOne) {
  const std::string program = directory_ / "uffdkit";
  std::filesystem::copy_file(UFFDKIT_BINARY_DIR "/uffdkit", program);
  const ManagerProcess manager(directory_, arguments(), {.program = program});
  Turmoil turmoil(image_);
  start(turmoil, 3);
  std::filesystem::remove(program);
  std::ofstream(program) << "#!/bin/sh\nexit 3\n";
  ASSERT_EQ(::chmod(program.c_str(), 0755), 0);
  manager.signal(SIGHUP);
  ASSERT_TRUE(eventually([&] { return manager.count("takeovers") == 1; })) << manager.log();
  EXPECT_EQ(manager.count("upgrades"), 0u);
  EXPECT_TRUE(eventually([&] { return manager.status().at("keeper").at("pid") != manager.pid(); }));
  pause(50);
  EXPECT_EQ(turmoil.hanging(), "");
  EXPECT_EQ(turmoil.stop(), 0u) << manager.log();
}

TEST_F(Crash, ASocketThatWasAddedIsListenedAtAfterwards) {
  const ManagerProcess manager(directory_, arguments());
  const std::string added = directory_ / "added.sock";
  const nlohmann::json request = {
      {"command", "listen-add"}, {"kind", "firecracker"}, {"socket", added}, {"image", image_.path()}};
  ASSERT_TRUE(manager.ask(request.dump()).at("ok").get<bool>());
  const auto before = manager.status().at("listeners");
  ::kill(manager.worker_pid(), SIGKILL);
  ASSERT_TRUE(eventually([&] { return manager.count("takeovers") == 1; }));
  EXPECT_EQ(manager.status().at("listeners"), before);
  Child process = client(image_, whole(image_), added,
                         [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Crash, TakingOverLeavesNothingOpen) {
  const ManagerProcess manager(directory_, arguments());
  Child process =
      client(image_, whole(image_), firecracker_, [](const ClientMemory& memory, const Channel& channel) {
        memory.check(0);
        channel.send(1);
        channel.receive();
      });
  process.channel().receive();
  ASSERT_TRUE(eventually([&] { return manager.sessions() == 1; }));
  const Footprint before = manager.footprint();
  for (std::uint64_t kills = 1; kills <= 20; ++kills) {
    ::kill(manager.worker_pid(), SIGKILL);
    ASSERT_TRUE(eventually([&] { return manager.count("takeovers") == kills; }));
  }
  EXPECT_EQ(manager.sessions(), 1u);
  EXPECT_TRUE(eventually([&] { return manager.footprint().within(before); }))
      << manager.footprint() << " after " << before;
}

}  // namespace
}  // namespace uffdkit::test
