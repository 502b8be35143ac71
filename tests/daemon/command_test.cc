// The command line: uffdkit serve, status and listen, and what they say when they cannot.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>

#include "daemon/fixture.h"
#include "support/program.h"

namespace uffdkit::test {
namespace {

class Command : public ManagerTest {
 protected:
  Finished uffdkit(const std::vector<std::string>& arguments) const {
    return run_program("uffdkit", arguments);
  }
  // The same, with the manager's control socket.
  Finished ask(const ManagerProcess& manager, std::vector<std::string> arguments) const {
    arguments.insert(arguments.end(), {"--control", manager.control()});
    return uffdkit(arguments);
  }
  // A client that has all of its memory, at `socket`.
  int client_exit_code(const std::string& socket) const {
    Child process = client(image_, whole(image_), socket,
                           [](const ClientMemory& memory, const Channel&) { memory.check_all(1, 1); });
    return process.wait();
  }

  const Image image_{directory_ / "image", 256};
  const std::string socket_ = directory_ / "fc.sock";
};

bool exists(const std::string& path) {
  return std::filesystem::exists(std::filesystem::symlink_status(path));
}

// ---- serve -----------------------------------------------------------------------------------------------

TEST_F(Command, ServeNamesItsSocketsWhenItIsReady) {
  const std::string native = directory_ / "native.sock";
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image_.path(), "--listen", native});
  for (const std::string& part :
       {"firecracker=" + socket_, "native=" + native, "control=" + manager.control()})
    EXPECT_NE(manager.ready_line().find(part), std::string::npos) << manager.ready_line();
}

TEST_F(Command, ServeTellsSystemdThatItIsReady) {
  const std::string path = directory_ / "notify.sock";
  const UniqueFd notify(socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
  ASSERT_EQ(bind(notify.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address), 0);
  ManagerProcess manager(directory_, firecracker(socket_, image_),
                         {.environment = {"NOTIFY_SOCKET=" + path}});
  const timeval patience{.tv_sec = 30, .tv_usec = 0};
  ASSERT_EQ(setsockopt(notify.get(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof patience), 0);
  const auto next = [&] {
    std::array<char, 256> text;
    const ssize_t bytes = recv(notify.get(), text.data(), text.size(), 0);
    return std::string(text.data(), bytes < 0 ? 0 : static_cast<std::size_t>(bytes));
  };
  EXPECT_EQ(next(), "READY=1");
  EXPECT_EQ(manager.stop(), 0);
  EXPECT_EQ(next(), "STOPPING=1");
}

TEST_F(Command, SocketsOfServeAreItsUsersOnly) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  for (const std::string& path : {socket_, manager.control()}) {
    struct stat status;
    ASSERT_EQ(stat(path.c_str(), &status), 0);
    EXPECT_EQ(status.st_mode & 07777u, 0600u) << path;
  }
}

TEST_F(Command, ServeWithAWrongCommandLineExitsWith2) {
  const std::vector<std::vector<std::string>> wrong = {
      {"serve"},
      {"serve", "--unknown"},
      {"serve", "--firecracker"},
      {"serve", "--control", "x", "--fault-around", "3"},
      {"serve", "--control", "x", "--workers", "-1"},
      {"serve", "--control", "x", "--handshake-seconds", "0"},
      {"listen"},
      {"listen", "add"},
      {"status", "extra"},
      {"unknown"},
      {}};
  for (const auto& arguments : wrong) {
    const Finished run = uffdkit(arguments);
    EXPECT_EQ(run.exit_code, 2) << testing::PrintToString(arguments) << run.out << run.err;
    EXPECT_NE(run.err, "") << testing::PrintToString(arguments);
    EXPECT_EQ(run.out, "") << testing::PrintToString(arguments);
  }
}

TEST_F(Command, ASubcommandThatThereIsNotIsNamedWithThoseThatThereAre) {
  Finished run = uffdkit({"sevre", "--control", "x"});
  EXPECT_EQ(run.exit_code, 2);
  for (const char* part : {"sevre", "serve", "status", "listen", "doctor", "uffdkit --help"})
    EXPECT_NE(run.err.find(part), std::string::npos) << run.err;
  run = uffdkit({"listen", "ad", socket_});
  EXPECT_EQ(run.exit_code, 2);
  for (const char* part : {"'ad'", "add", "remove", "list", "uffdkit listen --help"})
    EXPECT_NE(run.err.find(part), std::string::npos) << run.err;
}

TEST_F(Command, AnErrorOfServeSaysOnALineOfItsOwnWhatToDo) {
  const std::string missing = directory_ / "missing";
  const std::vector<std::vector<std::string>> wrong = {
      {"--firecracker", socket_ + "=" + missing},
      {"--listen", socket_, "--image", "a=" + missing},
      {"--listen", socket_, "--images", missing},
      {"--listen", socket_, "--images", image_.path()},
      {"--listen", socket_, "--image", "a=" + image_.path(), "--image", "a=" + image_.path()},
      {"--listen", missing + "/socket"},
      {"--listen", ""}};
  for (std::vector<std::string> arguments : wrong) {
    arguments.insert(arguments.begin(), "serve");
    const Finished run = uffdkit(arguments);
    EXPECT_EQ(run.exit_code, 1) << testing::PrintToString(arguments);
    EXPECT_GE(std::ranges::count(run.err, '\n'), 2) << run.err;
  }
}

TEST_F(Command, ServeWithASocketThatHasNoImageSaysWhatIsMeant) {
  for (const std::string text : {"only-a-socket", "=image", "socket="}) {
    const Finished run = uffdkit({"serve", "--firecracker", text});
    EXPECT_EQ(run.exit_code, 2) << text;
    EXPECT_NE(run.err.find("SOCKET=IMAGE"), std::string::npos) << run.err;
  }
}

TEST_F(Command, ServeOfAnImageThatIsNotThereExitsWith1AndNamesIt) {
  const std::string missing = directory_ / "missing";
  const Finished run = uffdkit({"serve", "--firecracker", socket_ + "=" + missing});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_NE(run.err.find(missing), std::string::npos) << run.err;
  EXPECT_FALSE(exists(socket_));
}

TEST_F(Command, ServeOfWhatIsNoImageExitsWith1AndSaysWhatToGive) {
  const std::string empty = directory_ / "empty";
  const UniqueFd file(open(empty.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600));
  for (const std::string& path : {empty, directory_.path().string()}) {
    const Finished run = uffdkit({"serve", "--firecracker", socket_ + "=" + path});
    EXPECT_EQ(run.exit_code, 1);
    EXPECT_NE(run.err.find("give the file that holds the memory image"), std::string::npos) << run.err;
  }
}

TEST_F(Command, ServeAtASocketInNoDirectoryExitsWith1) {
  const Finished run = uffdkit({"serve", "--firecracker", directory_ / "none/s" + ("=" + image_.path())});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_NE(run.err.find("/none"), std::string::npos) << run.err;
}

TEST_F(Command, ASecondManagerAtTheSameSocketIsRefusedAndTheFirstServesOn) {
  ManagerProcess first(directory_, firecracker(socket_, image_));
  const Finished second = uffdkit({"serve", "--firecracker", socket_ + "=" + image_.path()});
  EXPECT_EQ(second.exit_code, 1);
  EXPECT_NE(second.err.find(socket_), std::string::npos) << second.err;
  EXPECT_EQ(client_exit_code(socket_), 0);
}

TEST_F(Command, TheSocketsOfAManagerThatDiedAreReplaced) {
  {
    ManagerProcess dead(directory_, firecracker(socket_, image_));
    dead.kill();
  }
  ASSERT_TRUE(exists(socket_));
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  EXPECT_EQ(client_exit_code(socket_), 0);
  EXPECT_EQ(manager.stop(), 0);
  EXPECT_FALSE(exists(socket_));
  EXPECT_FALSE(exists(manager.control()));
}

TEST_F(Command, AFileThatIsNoSocketIsNotReplaced) {
  const Finished run = uffdkit({"serve", "--firecracker", image_.path() + "=" + image_.path()});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_EQ(std::filesystem::file_size(image_.path()), image_.pages() * 4096);
}

// ---- status ----------------------------------------------------------------------------------------------

TEST_F(Command, StatusCountsWhatASessionWasServed) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  Child process =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        memory.check_all(1, 1);
        memory.give_back(0, 3, MADV_DONTNEED);
        memory.check_zero(1);
        channel.send(1);
        channel.receive();
      });
  process.channel().receive();
  // A page is counted just after its reader has it.
  ASSERT_TRUE(eventually([&] {
    return manager.total("pages_copied") + manager.total("pages_zeroed") >= 257 &&
           manager.status().at("sessions").at(0).at("pending") == 0;
  }));
  const Finished run = ask(manager, {"status", "--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const auto status = nlohmann::json::parse(run.out);
  EXPECT_EQ(status.at("pid").get<pid_t>(), manager.pid());
  EXPECT_FALSE(status.at("ending").get<bool>());
  EXPECT_EQ(status.at("listeners").size(), 1u);
  EXPECT_EQ(status.at("clients_refused").get<int>(), 0);
  ASSERT_EQ(status.at("sessions").size(), 1u);
  const auto& session = status.at("sessions")[0];
  EXPECT_EQ(session.at("pid").get<pid_t>(), process.pid());
  EXPECT_EQ(session.at("uid").get<uid_t>(), geteuid());
  EXPECT_EQ(session.at("kind").get<std::string>(), "firecracker");
  EXPECT_EQ(session.at("image").get<std::string>(), image_.path());
  EXPECT_EQ(session.at("memory_bytes").get<std::size_t>(), image_.pages() * 4096);
  EXPECT_EQ(session.at("regions").get<int>(), 1);
  EXPECT_EQ(session.at("pending").get<int>(), 0);
  EXPECT_EQ(session.at("oldest_pending_us").get<int>(), 0);
  EXPECT_EQ(session.at("pages_poisoned").get<int>(), 0);
  EXPECT_EQ(session.at("pages_removed").get<int>(), 3);
  EXPECT_EQ(session.at("events").get<int>(), 1);
  EXPECT_GE(session.at("faults").get<int>(), 256 / 16);
  // Every page once, and what was touched again of those that were given back.
  const int filled = session.at("pages_copied").get<int>() + session.at("pages_zeroed").get<int>();
  EXPECT_GE(filled, 257);
  EXPECT_LE(filled, 259);
  EXPECT_EQ(status.at("total").at("faults"), session.at("faults"));
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Command, TotalsOfStatusNeverFallWhenSessionsEnd) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  std::uint64_t copied = 0;
  for (std::uint64_t ended = 1; ended <= 20; ++ended) {
    Child process = client(image_, whole(image_), socket_,
                           [](const ClientMemory& memory, const Channel&) { memory.check_all(1, 1); });
    ASSERT_TRUE(eventually([&] {
      const nlohmann::json status = manager.status();
      const std::uint64_t now = status.at("total").value("pages_copied", std::uint64_t{0});
      EXPECT_GE(now, copied);
      copied = now;
      return status.at("sessions_ended") == ended;
    }));
  }
}

TEST_F(Command, StatusIsATableForPeople) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  Child process =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        memory.check(1);
        channel.send(1);
        channel.receive();
      });
  process.channel().receive();
  const Finished run = ask(manager, {"status"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  for (const std::string& part :
       {"manager pid " + std::to_string(manager.pid()), "listens firecracker " + socket_,
        std::string("sessions 1"), std::to_string(process.pid()), std::string("1.0 MiB")})
    EXPECT_NE(run.out.find(part), std::string::npos) << run.out;
}

TEST_F(Command, StatusOfNoManagerExitsWith1AndSaysWhatToDo) {
  const Finished run = uffdkit({"status", "--control", directory_ / "nobody.sock"});
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_EQ(run.out, "");
  EXPECT_NE(run.err.find("start the manager with --control"), std::string::npos) << run.err;
}

TEST_F(Command, GarbageOnTheControlSocketIsAnsweredWithAnError) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  for (const std::string line :
       {"garbage", R"({"command":"no such"})", R"({"command":"listen-add"})", "[]"}) {
    const nlohmann::json answer = manager.ask(line);
    EXPECT_FALSE(answer.at("ok").get<bool>()) << line;
    EXPECT_NE(answer.at("error").get<std::string>(), "") << line;
  }
  EXPECT_EQ(client_exit_code(socket_), 0);
}

// ---- listen ----------------------------------------------------------------------------------------------

TEST_F(Command, ASocketCanBeAddedListedAndRemovedAtRunTime) {
  ManagerProcess manager(directory_, {});
  EXPECT_EQ(ask(manager, {"listen", "add", socket_, "--firecracker", image_.path()}).exit_code, 0);
  const Finished list = ask(manager, {"listen", "list"});
  EXPECT_EQ(list.exit_code, 0);
  EXPECT_NE(list.out.find(socket_ + "=" + image_.path()), std::string::npos) << list.out;
  const auto json = nlohmann::json::parse(ask(manager, {"listen", "list", "--json"}).out);
  EXPECT_EQ(json, nlohmann::json::parse(R"([{"kind":"firecracker","socket":")" + socket_ + R"(","image":")" +
                                        image_.path() + R"("}])"));

  Child process =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        memory.check(1);
        channel.send(1);
        channel.receive();
        memory.check_all(1, 1);
      });
  process.channel().receive();
  EXPECT_EQ(ask(manager, {"listen", "remove", socket_}).exit_code, 0);
  EXPECT_FALSE(exists(socket_));
  EXPECT_EQ(ask(manager, {"listen", "list"}).out, "");
  // Its session goes on.
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Command, ASocketCanBeAddedAndRemovedAgainAndAgain) {
  ManagerProcess manager(directory_, {});
  const Footprint before = manager.footprint();
  for (int times = 0; times < 5; ++times) {
    EXPECT_EQ(ask(manager, {"listen", "add", socket_, "--firecracker", image_.path()}).exit_code, 0);
    EXPECT_EQ(client_exit_code(socket_), 0);
    EXPECT_EQ(ask(manager, {"listen", "remove", socket_}).exit_code, 0);
  }
  EXPECT_TRUE(eventually([&] { return manager.footprint().within(before); }))
      << before << " became " << manager.footprint();
}

TEST_F(Command, ASocketThatCannotBeMadeYetHoldsUpNobody) {
  ManagerProcess manager(directory_, {});
  const TempDir locked;
  const UniqueFd lock(open(locked.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  ASSERT_EQ(flock(lock.get(), LOCK_EX), 0);
  const UniqueFd asking = connect_to(manager.control());
  // The two are answered in order; another connection does not wait for them.
  send_with_fds(asking.get(),
                R"({"command":"listen-add","kind":"native","socket":")" + (locked / "a.sock") + "\"}\n" +
                    R"({"command":"listen-list"})" + "\n",
                {});
  EXPECT_TRUE(manager.status().at("listeners").empty());
  ASSERT_EQ(flock(lock.get(), LOCK_UN), 0);
  std::string answers;
  std::array<char, 4096> buffer;
  while (std::ranges::count(answers, '\n') < 2) {
    const ssize_t bytes = [&] {
      pollfd entry{.fd = asking.get(), .events = POLLIN, .revents = 0};
      poll(&entry, 1, -1);
      return read(asking.get(), buffer.data(), buffer.size());
    }();
    ASSERT_GT(bytes, 0);
    answers.append(buffer.data(), static_cast<std::size_t>(bytes));
  }
  EXPECT_TRUE(answers.starts_with("{\"ok\":true}\n")) << answers;
  EXPECT_NE(answers.find("a.sock", answers.find('\n')), std::string::npos) << answers;
}

TEST_F(Command, ListenSaysWhyItCannotAndExitsWith1) {
  ManagerProcess manager(directory_, firecracker(socket_, image_));
  const std::string other = directory_ / "other.sock";
  struct Wrong {
    std::vector<std::string> arguments;
    std::string said;
  };
  const std::vector<Wrong> wrong = {
      {{"listen", "add", socket_}, "choose another socket"},
      {{"listen", "add", manager.control()}, "choose another socket"},
      {{"listen", "add", other, "--firecracker", directory_ / "missing"}, "missing"},
      {{"listen", "add", image_.path()}, image_.path()},
      {{"listen", "add", std::string(200, 'x')}, "107"},
      {{"listen", "remove", other}, "'uffdkit listen list' shows the sockets"},
  };
  for (const Wrong& each : wrong) {
    const Finished run = ask(manager, each.arguments);
    EXPECT_EQ(run.exit_code, 1) << testing::PrintToString(each.arguments);
    EXPECT_NE(run.err.find(each.said), std::string::npos) << run.err;
  }
  EXPECT_EQ(client_exit_code(socket_), 0);
}

}  // namespace
}  // namespace uffdkit::test
