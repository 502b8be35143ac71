// Clients come, go and die in any way, many at once; each is served, and none leaves anything behind.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <list>
#include <nlohmann/json.hpp>
#include <optional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "daemon/fixture.h"
#include "support/native_connection.h"
#include "support/wall.h"

namespace uffdkit::test {
namespace {

class Clients : public ManagerTest {
 protected:
  bool nothing_is_left(const Footprint& before) const {
    return eventually([&] { return manager_.sessions() == 0 && manager_.footprint().within(before); });
  }
  // What the manager has before any client; the first one may make it start what stays.
  Footprint footprint_before() const {
    Child first = client(image_, whole(image_), socket_,
                         [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
    EXPECT_EQ(first.wait(), 0);
    EXPECT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
    return manager_.footprint();
  }

  const Image image_{directory_ / "image", 512};
  const std::string socket_ = directory_ / "fc.sock";
  ManagerProcess manager_{directory_, firecracker(socket_, image_)};
};

void touch_for_ever(const ClientMemory& memory, const Channel& channel) {
  const auto touch = [&](std::uint64_t seed) {
    std::mt19937_64 random(seed);
    while (true) {
      const std::size_t page = random() % memory.pages();
      (void)*static_cast<volatile std::byte*>(memory.bytes(page).data());
      if (random() % 4 == 0) memory.give_back(page, 1, MADV_DONTNEED);
    }
  };
  channel.send(1);
  at_once({[&] { touch(1); }, [&] { touch(2); }});
}

TEST_F(Clients, OneThatExitsLeavesNothingBehind) {
  const Footprint before = footprint_before();
  for (int times = 0; times < 5; ++times) {
    Child process = client(image_, whole(image_), socket_,
                           [](const ClientMemory& memory, const Channel&) { memory.check(3); });
    EXPECT_EQ(process.wait(), 0);
  }
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
}

TEST_F(Clients, OneThatIsKilledWhileItTouchesAndGivesBackLeavesNothingBehind) {
  const Footprint before = footprint_before();
  for (int delay_us = 0; delay_us < 2000; delay_us += 200) {
    Child process = client(image_, whole(image_), socket_, touch_for_ever);
    process.channel().receive();
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    process.kill();
  }
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
  EXPECT_EQ(manager_.count("clients_refused"), 0u) << manager_.log();
}

TEST_F(Clients, OneThatIsKilledAsSoonAsItHasSpokenLeavesNothingBehind) {
  const Footprint before = footprint_before();
  for (int times = 0; times < 20; ++times) {
    Child process =
        client(image_, whole(image_), socket_, [](const ClientMemory&, const Channel&) { raise(SIGKILL); });
    EXPECT_EQ(process.wait(), -SIGKILL);
  }
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
}

TEST_F(Clients, OneThatExecutesAnotherProgramLeavesNothingBehind) {
  const Footprint before = footprint_before();
  Child process = client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel&) {
    memory.check(3);
    execlp("sleep", "sleep", "60", nullptr);
  });
  process.channel().wait_closed();
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
  EXPECT_EQ(kill(process.pid(), 0), 0) << "the program has ended";
}

TEST_F(Clients, OnesThatExitAreKilledOrExecuteAtAnyStageLeaveNothingBehind) {
  const TempDir directory;
  const std::string wall = directory / "wall";
  const std::string native = directory / "native.sock";
  const std::string socket = directory / "fc.sock";
  const std::vector<std::string> options = {
      "--firecracker", socket + "=" + image_.path(),
      "--listen",      native,
      "--image",       "guest=" + image_.path(),
      "--store-fault", "stall,image=" + image_.path() + ",while=" + wall};
  const ManagerProcess manager(directory, options);
  // Left behind by every end, as by exit: what the work holds is not let go of.
  const auto memory = [&] { return new ClientMemory(image_, whole(image_)); };
  const auto touch_on_a_thread = [](const std::byte* page) {
    std::thread([page] { (void)*static_cast<const volatile std::byte*>(page); }).detach();
  };
  const auto pending = [&] {
    const nlohmann::json status = manager.status();
    return std::ranges::any_of(status.at("sessions"),
                               [](const auto& session) { return session.at("pending") == 1; });
  };
  const auto attach_it = [&](AttachOptions::Share sharing) {
    AttachOptions attach_options{};
    attach_options.sharing = sharing;
    return new RemoteMapping(take(attach(native, "guest", attach_options)));
  };
  struct Stage {
    std::string name;
    std::function<void()> reach;
    bool stalls = false;
  };
  const std::vector<Stage> stages = {
      {"connected", [&] { connect_to(socket).release(); }},
      {"half of the handshake is sent",
       [&] {
         const ClientMemory& all = *memory();
         const int fd = all.uffd().fd();
         send_with_fds(connect_to(socket).release(), all.handshake().dump().substr(0, 20), {&fd, 1});
       }},
      {"the handshake is sent without a userfaultfd",
       [&] { send_with_fds(connect_to(socket).release(), memory()->handshake().dump(), {}); }},
      {"the handshake is sent", [&] { memory()->hand_over(socket).release(); }},
      {"all is there",
       [&] {
         const ClientMemory& all = *memory();
         all.hand_over(socket).release();
         all.check_all(2, 1);
       }},
      {"a page is being fetched",
       [&] {
         const ClientMemory& all = *memory();
         all.hand_over(socket).release();
         touch_on_a_thread(all.bytes(1).data());
         require(eventually(pending), "nothing is fetched");
         all.give_back(1, 100, MADV_DONTNEED);
       },
       true},
      {"a native connection is made", [&] { connect_to(native).release(); }},
      {"a native client is attached", [&] { attach_it(AttachOptions::Share::never); }},
      {"a native client has a page fetched",
       [&] {
         touch_on_a_thread(attach_it(AttachOptions::Share::never)->data() + 4096);
         require(eventually(pending), "nothing is fetched");
       },
       true},
      {"a native client is detached",
       [&] {
         RemoteMapping& all = *attach_it(AttachOptions::Share::never);
         (void)*static_cast<const volatile std::byte*>(all.data());
         require(all.detach(DetachWay::release).has_value(), "it cannot be detached");
       }},
      {"a clone has a page fetched",
       [&] {
         touch_on_a_thread(attach_it(AttachOptions::Share::if_possible)->data() + 4096);
         require(eventually(pending), "nothing is fetched");
       },
       true},
  };
  const std::vector<std::function<void()>> ends = {[] { _exit(0); }, [] { raise(SIGKILL); },
                                                   [] { execlp("true", "true", nullptr); }};
  std::optional<Footprint> before;
  // At first only to make the manager start what stays.
  for (const bool counts : {false, true})
    for (const Stage& stage : stages)
      for (const std::function<void()>& end : ends) {
        SCOPED_TRACE(stage.name);
        if (counts && !before) {
          ASSERT_TRUE(eventually([&] { return manager.sessions() == 0; }));
          before = manager.footprint();
        }
        std::optional<Wall> stands;
        if (stage.stalls) stands.emplace(wall);
        Child process = program([&](const Channel&) {
          stage.reach();
          end();
        });
        const int code = process.wait();
        EXPECT_TRUE(code == 0 || code == -SIGKILL) << code;
        if (stands) stands->take_down();
        if (!counts) continue;
        EXPECT_TRUE(eventually([&] {
          return manager.sessions() == 0 && manager.footprint().within(*before);
        })) << *before
            << " became " << manager.footprint() << "\n"
            << manager.log();
      }
}

TEST_F(Clients, MemoryIsServedOnWhenTheProcessThatHandedItOverIsGone) {
  Child process = program([&](const Channel&) {
    const ClientMemory memory(image_, whole(image_));
    const pid_t messenger = fork();
    if (messenger == 0) {
      const UniqueFd connection = memory.hand_over(socket_);
      _exit(0);
    }
    int status = 0;
    require(waitpid(messenger, &status, 0) == messenger && status == 0, "the messenger failed");
    // Whether the manager hears of the death first or of the fault, it must serve.
    memory.check_all(2, 5);
  });
  EXPECT_EQ(process.wait(), 0) << manager_.log();
  EXPECT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
}

TEST_F(Clients, ManyAreServedAtOnceFromOneSocket) {
  const Footprint before = footprint_before();
  std::list<Child> processes;
  for (std::uint64_t seed = 0; seed < 24; ++seed)
    processes.emplace_back([&](const Channel& channel) {
      alarm(60);
      const ClientMemory memory(image_, whole(image_));
      channel.send(1);
      channel.receive();
      const UniqueFd connection = memory.hand_over(socket_);
      memory.check_all(2, seed);
      channel.send(2);
      channel.receive();
      return 0;
    });
  for (const Child& process : processes) process.channel().receive();
  for (const Child& process : processes) process.channel().send(1);
  for (const Child& process : processes) EXPECT_EQ(process.channel().receive(), 2u);
  EXPECT_EQ(manager_.sessions(), processes.size());
  for (const Child& process : processes) process.channel().send(3);
  for (Child& process : processes) EXPECT_EQ(process.wait(), 0);
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
}

TEST_F(Clients, ManyAreServedOneAfterAnother) {
  const Footprint before = footprint_before();
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    Child process = client(image_, whole(image_), socket_,
                           [&](const ClientMemory& memory, const Channel&) { memory.check_all(1, seed); });
    ASSERT_EQ(process.wait(), 0);
  }
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
  EXPECT_EQ(manager_.count("sessions_ended"), 21u);
}

TEST_F(Clients, TwoSocketsServeTwoImages) {
  const TempDir directory;
  const Image other(directory / "other", 300, 77);
  const std::string a = directory / "a.sock";
  const std::string b = directory / "b.sock";
  ManagerProcess manager(directory,
                         {"--firecracker", a + "=" + image_.path(), "--firecracker", b + "=" + other.path()});
  const auto check = [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 3); };
  Child first = client(image_, whole(image_), a, check);
  Child second = client(other, whole(other), b, check);
  EXPECT_EQ(first.wait(), 0);
  EXPECT_EQ(second.wait(), 0);
}

TEST_F(Clients, ADeadOneAndAFloodOfGivingBackDoNotHoldUpAQuietOne) {
  Child flooding = client(image_, whole(image_), socket_, touch_for_ever);
  flooding.channel().receive();
  Child stopped = client(image_, whole(image_), socket_, touch_for_ever);
  stopped.channel().receive();
  ASSERT_EQ(kill(stopped.pid(), SIGSTOP), 0);
  Child quiet = client(image_, whole(image_), socket_,
                       [](const ClientMemory& memory, const Channel&) { memory.check_all(1, 9); });
  EXPECT_EQ(quiet.wait(), 0);
}

}  // namespace
}  // namespace uffdkit::test
