// Managers whose processes are killed while clients never rest: every byte is compared, and nobody hangs.
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <functional>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "daemon/fixture.h"
#include "support/paths.h"
#include "support/program.h"
#include "support/sanitizers.h"
#include "support/turmoil.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPages = 1024;
// How often a worker is killed, and for how much longer it lives before where it is sanitized: one needs that
// to come as far.
constexpr int kKills = kSanitized ? 25 : 200;
constexpr unsigned kSlowness = kSanitized ? 8 : 1;

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
      // A program on trial may keep all of them waiting for 10 s.
      options.limits.answer = std::chrono::seconds(30);
      clients.start({.kind = kind,
                     .socket = kind == Turmoil::Kind::native ? native_ : firecracker_,
                     .image_name = "image",
                     .options = options,
                     .seed = random_()});
    }
  }
  void pause(unsigned most_ms) { usleep(static_cast<useconds_t>(random_() % (1000 * most_ms * kSlowness))); }
  // Kills at random instants, under so many clients.
  void kill_workers(std::size_t clients, unsigned most_ms) {
    const ManagerProcess manager(directory_, arguments());
    Turmoil turmoil(image_);
    start(turmoil, clients);
    for (int i = 0; i < kKills; ++i) {
      pause(most_ms);
      ::kill(manager.worker_pid(), SIGKILL);
      // On a slow machine taking over may last longer than what is between two kills; then some client is
      // never the one that is served. It is, when a worker lives for longer.
      EXPECT_TRUE(eventually([&] { return turmoil.hanging(std::chrono::seconds(5)).empty(); }))
          << turmoil.hanging() << "\n"
          << manager.log();
    }
    EXPECT_EQ(manager.count("takeovers"), static_cast<std::uint64_t>(kKills));
    EXPECT_EQ(turmoil.stop(), 0u) << manager.log();
    EXPECT_GT(turmoil.counts().steps, 0u);
  }

  const Image image_{directory_ / "image", kPages};
  const std::string firecracker_ = directory_ / "firecracker.sock";
  const std::string native_ = directory_ / "native.sock";
  std::mt19937_64 random_{20'261'125};
};

TEST_F(Crash, OneClientOfAWorkerThatIsKilledAgainAndAgainHasEveryByte) {
  kill_workers(1, 10);
}

TEST_F(Crash, EightClientsOfAWorkerThatIsKilledAgainAndAgainHaveEveryByte) {
  kill_workers(8, 20);
}

TEST_F(Crash, SixtyFourClientsOfAWorkerThatIsKilledAgainAndAgainHaveEveryByte) {
  kill_workers(64, 60);
}

// Each kind of client does the same each time, under a worker that ends at its n-th marked step
// (base/step.h), for every n. Several tests, so that they run beside each other: each has one n of so many.
constexpr std::uint64_t kTestsOfSteps = 8;

class CrashAtEveryStep : public Crash,
                         public testing::WithParamInterface<std::tuple<std::uint64_t, std::uint64_t>> {
 protected:
  enum class Came : std::uint8_t { not_ready, to_the_step, not_so_far };

  // Worker `worker` ends at its step `step`, while clients of each kind come and go under it.
  Came end_at(std::uint64_t worker, std::uint64_t step) {
    const TempDir directory;
    const std::string firecracker = directory / "firecracker.sock";
    const std::string native = directory / "native.sock";
    std::unique_ptr<ManagerProcess> manager;
    try {
      manager = std::make_unique<ManagerProcess>(
          directory,
          std::vector<std::string>{"--firecracker", firecracker + "=" + image_.path(), "--listen", native,
                                   "--image", "image=" + image_.path(), "--workers", "1"},
          ManagerProcess::Setting{
              .environment = {"UFFDKIT_CRASH_AT=" + std::to_string(worker) + ":" + std::to_string(step)},
              .program = built("uffdkit-steps")});
    } catch (const std::runtime_error&) {
      return Came::not_ready;  // and so all of it has ended, and nobody is served
    }
    Turmoil turmoil(image_);
    for (const Turmoil::Kind kind :
         {Turmoil::Kind::forking, Turmoil::Kind::firecracker, Turmoil::Kind::native}) {
      AttachOptions options;
      if (step % 2 == 0) options.sharing = AttachOptions::Share::if_possible;
      options.removed_reads_zero = true;
      turmoil.start({.kind = kind,
                     .socket = kind == Turmoil::Kind::native ? native : firecracker,
                     .image_name = "image",
                     .options = options,
                     .seed = step,
                     .steps = 24,
                     .lives = 1});
    }
    // The first one ends in the middle of it, so that there is something to take up.
    if (worker == 2) {
      EXPECT_TRUE(eventually([&] { return turmoil.counts().steps >= 12; }));
      ::kill(manager->worker_pid(), SIGKILL);
    }
    EXPECT_EQ(turmoil.wait(), 0u) << "worker " << worker << ", step " << step << "\n" << manager->log();
    return manager->count("takeovers") >= worker ? Came::to_the_step : Came::not_so_far;
  }
};

TEST_P(CrashAtEveryStep, ClientsHaveEveryByte) {
  const auto [worker, first] = GetParam();
  constexpr std::uint64_t kStepsMax = 5000;
  std::uint64_t reached = 0;
  std::uint64_t not_ready = 0;
  // How many steps there are is not always the same.
  std::uint64_t step = first;
  for (int not_so_far = 0; step <= kStepsMax && not_so_far < 2 && !HasFailure(); step += kTestsOfSteps) {
    switch (end_at(worker, step)) {
      case Came::not_ready:
        ++not_ready;
        break;
      case Came::to_the_step:
        ++reached;
        break;
      case Came::not_so_far:
        ++not_so_far;
        break;
    }
  }
  RecordProperty("steps", static_cast<int>(step));
  EXPECT_LE(not_ready, 1u);
  EXPECT_GT(reached, 5u);
  EXPECT_LE(step, kStepsMax);
}

INSTANTIATE_TEST_SUITE_P(Workers, CrashAtEveryStep,
                         testing::Combine(testing::Values(1, 2),
                                          testing::Range<std::uint64_t>(1, kTestsOfSteps + 1)));

class Drain : public Crash {
 protected:
  static Finished drain(const ManagerProcess& manager) {
    return run_program("uffdkit", {"drain", "--control", manager.control()});
  }
};

TEST_F(Drain, ClientsNeedNoManagerAfterwards) {
  ManagerProcess manager(directory_, arguments());
  image_.make_cold();
  Child process = client(image_, whole(image_), firecracker_, after_one_page(check_all_pages));
  process.channel().receive();
  const Finished drained = drain(manager);
  EXPECT_EQ(drained.exit_code, 0) << drained.err;
  EXPECT_EQ(drained.out, "1 sessions completed and released\n");
  EXPECT_EQ(manager.sessions(), 0u);
  manager.kill();
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Drain, IsAskedForAgainWhenAnotherWorkerTakesOver) {
  // Each read lasts for 20 ms, so that it is not done before.
  std::vector<std::string> slow = arguments();
  slow.insert(slow.end(), {"--store-fault", "delay,ms=20", "--fault-around", "1"});
  ManagerProcess manager(directory_, slow);
  Child process = client(image_, whole(image_), firecracker_, after_one_page(check_all_pages));
  process.channel().receive();
  Child killer([&](const Channel&) {
    const bool begun = eventually([&] { return manager.count("draining") > 0; });
    ::kill(manager.worker_pid(), SIGKILL);
    return begun ? 0 : 1;
  });
  const Finished drained = drain(manager);
  EXPECT_EQ(killer.wait(), 0);
  EXPECT_EQ(drained.exit_code, 0) << drained.err;
  EXPECT_EQ(manager.count("takeovers"), 1u);
  EXPECT_EQ(manager.sessions(), 0u);
  manager.kill();
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Drain, AClientThatCannotBeCompletedIsServedOn) {
  const ManagerProcess manager(directory_, arguments());
  Child process =
      client(image_, whole(image_), firecracker_,
             after_one_page([](const ClientMemory& memory, const Channel&) { memory.check(100); }));
  process.channel().receive();
  image_.make_cold();
  image_.cut(kPages / 2);
  const Finished drained = drain(manager);
  EXPECT_EQ(drained.exit_code, 1);
  EXPECT_NE(drained.err.find("1 sessions could not be completed"), std::string::npos) << drained.err;
  EXPECT_EQ(manager.sessions(), 1u);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Drain, WithoutClientsThereIsNothingToDo) {
  const ManagerProcess manager(directory_, arguments());
  const Finished drained = drain(manager);
  EXPECT_EQ(drained.exit_code, 0) << drained.err;
  EXPECT_EQ(drained.out, "0 sessions completed and released\n");
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
  const Child process = client(image_, whole(image_), firecracker_,
                               after_one_page([](const ClientMemory& memory, const Channel& channel) {
                                 check_all_pages(memory, channel);
                                 channel.send(2);
                                 channel.receive();
                               }));
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

TEST_F(Crash, UpgradeSaysWhenTheNewProgramServes) {
  const ManagerProcess manager(directory_, arguments());
  const Finished upgraded = run_program("uffdkit", {"upgrade", "--control", manager.control()});
  EXPECT_EQ(upgraded.exit_code, 0) << upgraded.err;
  EXPECT_EQ(manager.count("upgrades"), 1u);
  EXPECT_NE(upgraded.out.find(std::to_string(manager.worker_pid())), std::string::npos) << upgraded.out;
}

TEST_F(Crash, AnUpgradePutsTheNewBinaryInThePlaceOfAllProcesses) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs root, to see what a process runs";
  const std::string program = directory_ / "uffdkit";
  std::filesystem::copy_file(built("uffdkit"), program);
  const ManagerProcess manager(directory_, arguments(), {.program = program});
  const auto runs_it = [&](const char* process) {
    const auto pid = manager.status().at(process).at("pid").get<pid_t>();
    return std::filesystem::equivalent("/proc/" + std::to_string(pid) + "/exe", program);
  };
  const auto run_it = [&] { return runs_it("keeper") && runs_it("worker") && runs_it("standby"); };
  EXPECT_TRUE(run_it());
  std::filesystem::copy_file(built("uffdkit"), directory_ / "new");
  std::filesystem::rename(directory_ / "new", program);
  EXPECT_FALSE(runs_it("keeper") || runs_it("worker") || runs_it("standby"));
  EXPECT_EQ(run_program("uffdkit", {"upgrade", "--control", manager.control()}).exit_code, 0);
  EXPECT_TRUE(eventually(run_it));
}

TEST_F(Crash, WithoutAKeeperAnUpgradeIsRefused) {
  std::vector<std::string> alone = arguments();
  alone.emplace_back("--no-keeper");
  const ManagerProcess manager(directory_, alone);
  const Finished upgraded = run_program("uffdkit", {"upgrade", "--control", manager.control()});
  EXPECT_EQ(upgraded.exit_code, 1);
  EXPECT_NE(upgraded.err.find("no keeper"), std::string::npos) << upgraded.err;
}

// Programs that are put in the place of the running one, and do not come to serve.
class BadUpgrade : public Crash, public testing::WithParamInterface<const char*> {};

TEST_P(BadUpgrade, IsUndoneAndTheOldProgramGoesOn) {
  const std::string program = directory_ / "uffdkit";
  std::filesystem::copy_file(built("uffdkit"), program);
  const ManagerProcess manager(directory_, arguments(),
                               {.environment = {"STEPS=" + built("uffdkit-steps")}, .program = program});
  Turmoil turmoil(image_);
  start(turmoil, 3);
  std::filesystem::remove(program);
  std::ofstream(program) << GetParam();
  ASSERT_EQ(::chmod(program.c_str(), 0755), 0);
  const Finished upgraded = run_program("uffdkit", {"upgrade", "--control", manager.control()});
  EXPECT_EQ(upgraded.exit_code, 1);
  EXPECT_NE(upgraded.err.find("the old one goes on"), std::string::npos) << upgraded.err;
  EXPECT_EQ(manager.count("upgrades"), 0u);
  EXPECT_EQ(manager.count("upgrades_failed"), 1u);
  EXPECT_EQ(turmoil.hanging(), "");
  // And can be replaced still.
  std::filesystem::remove(program);
  std::filesystem::copy_file(built("uffdkit"), program);
  EXPECT_EQ(run_program("uffdkit", {"upgrade", "--control", manager.control()}).exit_code, 0);
  EXPECT_EQ(manager.count("upgrades"), 1u);
  EXPECT_EQ(turmoil.stop(), 0u) << manager.log();
}

INSTANTIATE_TEST_SUITE_P(Programs, BadUpgrade,
                         testing::Values("#!/bin/sh\nexit 3\n", "#!/bin/sh\nexec sleep 100\n", "no program",
                                         // Serves nothing, as it is told to end at its first step.
                                         "#!/bin/sh\nexport UFFDKIT_CRASH_AT=2:1\nexec \"$STEPS\" \"$@\"\n"));

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
      client(image_, whole(image_), firecracker_, after_one_page([](const ClientMemory&, const Channel&) {}));
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
