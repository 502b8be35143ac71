// Working sets: what a manager records beside an image, and what the next one brings of it.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "daemon/fixture.h"
#include "support/program.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPages = 1024;

using Strings = std::vector<std::string>;

class WorkingSets : public ManagerTest {
 protected:
  // Serves the image to a client that runs `work`, by a manager that ends afterwards; what it logged.
  std::string serve(const std::string& image, const Strings& options,
                    const std::function<void(const ClientMemory&)>& work) {
    Strings arguments = {"--firecracker", socket_ + "=" + image};
    arguments.insert(arguments.end(), options.begin(), options.end());
    ManagerProcess manager(directory_, arguments);
    {
      Child process = client(image_, whole(image_), socket_,
                             [&](const ClientMemory& memory, const Channel&) { work(memory); });
      EXPECT_EQ(process.wait(), 0) << manager.log();
    }
    EXPECT_EQ(manager.stop(), 0);
    return manager.log();
  }
  std::string record(const std::string& image, const std::vector<std::size_t>& pages) {
    return serve(image, {"--record"}, [&](const ClientMemory& memory) {
      for (const std::size_t page : pages) memory.check(page);
    });
  }
  static nlohmann::json info(const std::string& image) {
    const Finished done = run_program("uffdkit", {"image", "info", "--json", image});
    EXPECT_EQ(done.exit_code, 0) << done.err;
    return nlohmann::json::parse(done.out, nullptr, false).value("working_set", nlohmann::json());
  }
  // A manager that serves the image goes on until the client has been brought `pages` pages uncalled for;
  // the client touches nothing before.
  void expect_brought(const std::string& image, std::uint64_t pages) {
    ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image});
    Child process =
        client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
          channel.receive();
          memory.check_all(2, 1);
        });
    const auto brought = [&] {
      const nlohmann::json sessions = manager.status().at("sessions");
      return !sessions.empty() && sessions[0].contains("prefetch") &&
             sessions[0].at("prefetch").at("pages").get<std::uint64_t>() >= pages;
    };
    EXPECT_TRUE(eventually(brought)) << manager.status().dump(2);
    process.channel().send(1);
    EXPECT_EQ(process.wait(), 0) << manager.log();
    EXPECT_EQ(manager.stop(), 0);
  }
  // A client that reports when it has touched a page, and goes over its memory when it is told to.
  Child touching_twice() {
    return client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
      memory.check(900);
      channel.send(1);
      channel.receive();
      memory.check_all(2, 1);
    });
  }
  std::string compressed() {
    const std::string path = directory_ / "compressed";
    EXPECT_EQ(run_program("uffdkit", {"image", "create", "--raw", image_.path(), path}).exit_code, 0);
    return path;
  }
  std::string file() const { return image_.path() + ".ws"; }

  const Image image_{directory_ / "image", kPages};
  const std::string socket_ = directory_ / "fc.sock";
};

TEST_F(WorkingSets, ARecordingHasThePagesThatWereAskedFor) {
  record(image_.path(), {900, 3, 4, 77});
  const nlohmann::json set = info(image_.path());
  EXPECT_EQ(set.at("pages"), 4);
  EXPECT_EQ(set.at("memory_pages"), kPages);
  EXPECT_EQ(set.at("recordings"), 1);
  struct stat status;
  ASSERT_EQ(::stat(file().c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0600u);
}

TEST_F(WorkingSets, TwoRecordingsAreMerged) {
  record(image_.path(), {900, 3, 4, 77});
  const std::string log = record(image_.path(), {77, 5});
  const nlohmann::json set = info(image_.path());
  EXPECT_EQ(set.at("pages"), 5) << log;
  EXPECT_EQ(set.at("recordings"), 2);
}

TEST_F(WorkingSets, NothingIsLeftBesideTheImageButTheFile) {
  record(image_.path(), {900, 3});
  record(image_.path(), {900, 4});
  for (const auto& entry : std::filesystem::directory_iterator(std::filesystem::path(file()).parent_path()))
    EXPECT_NE(entry.path().filename().string().substr(0, 1), ".") << entry.path();
}

TEST_F(WorkingSets, TheNextSessionIsBroughtWhatWasRecorded) {
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < kPages; page += 3) pages.push_back((page * 7) % kPages);
  record(image_.path(), pages);
  // A few are left out on purpose.
  expect_brought(image_.path(), pages.size() * 9 / 10);
}

TEST_F(WorkingSets, TheSameOfACompressedImage) {
  const std::string image = compressed();
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < kPages; page += 3) pages.push_back((page * 7) % kPages);
  record(image, pages);
  EXPECT_EQ(info(image).at("pages"), pages.size());
  expect_brought(image, pages.size() * 9 / 10);
}

TEST_F(WorkingSets, WhoHasRecordedACompressedImageIsToldHowToStoreIt) {
  const std::string image = compressed();
  const std::string log = record(image, {900, 3});
  EXPECT_TRUE(log.contains("uffdkit image store-set " + image + "\n")) << log;
  EXPECT_FALSE(record(image_.path(), {900, 3}).contains("store-set"));
}

TEST_F(WorkingSets, OneThatIsStoredForItselfIsBroughtFromThere) {
  const std::string image = compressed();
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < kPages; page += 3) pages.push_back((page * 7) % kPages);
  record(image, pages);
  const Finished made = run_program("uffdkit", {"image", "store-set", "--json", image});
  ASSERT_EQ(made.exit_code, 0) << made.err;
  // Pages of zeros need no room.
  EXPECT_GT(nlohmann::json::parse(made.out).at("stored_pages"), pages.size() / 2);
  EXPECT_EQ(info(image).at("stored_bytes"), std::filesystem::file_size(image + ".ws.img"));
  expect_brought(image, pages.size() * 9 / 10);
  EXPECT_EQ(run_program("uffdkit", {"image", "verify", image + ".ws.img"}).exit_code, 0);
}

TEST_F(WorkingSets, ASessionOfAnImageWhoseSetIsStoredForItselfIsTakenUp) {
  const std::string image = compressed();
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < kPages; page += 3) pages.push_back(page);
  record(image, pages);
  ASSERT_EQ(run_program("uffdkit", {"image", "store-set", image}).exit_code, 0);
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image});
  Child process = touching_twice();
  process.channel().receive();
  ::kill(manager.worker_pid(), SIGKILL);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager.log();
  EXPECT_EQ(manager.stop(), 0);
}

TEST_F(WorkingSets, OneOfARawFileIsStoredForAnImageOfTheSameMemoryAndBecomesItsOwn) {
  const std::string image = compressed();
  record(image_.path(), {900, 3, 4, 77});
  const Finished made = run_program("uffdkit", {"image", "store-set", "--working-set", file(), image});
  ASSERT_EQ(made.exit_code, 0) << made.err;
  EXPECT_EQ(info(image).at("pages"), 4);
  EXPECT_TRUE(info(image).contains("stored_bytes"));
}

TEST_F(WorkingSets, NoneIsStoredThatIsNotTheImagesOwn) {
  const std::string image = compressed();
  const auto refusal = [&](const Strings& arguments) {
    Strings all = {"image", "store-set"};
    all.insert(all.end(), arguments.begin(), arguments.end());
    const Finished done = run_program("uffdkit", all);
    EXPECT_EQ(done.exit_code, 1);
    EXPECT_FALSE(std::filesystem::exists(image + ".ws.img"));
    return done.err;
  };
  EXPECT_NE(refusal({image}).find("serve --record"), std::string::npos);
  EXPECT_NE(refusal({image_.path()}).find("raw memory"), std::string::npos);
  const Image other(directory_ / "other", kPages, 2);
  serve(other.path(), {"--record"}, [](const ClientMemory& memory) { memory.check_zero(5); });
  EXPECT_NE(refusal({"--working-set", other.path() + ".ws", image}).find("was recorded of another image"),
            std::string::npos);
  record(image_.path(), {900, 3});
  std::ofstream(image + ".ws") << "somebody's";
  EXPECT_NE(refusal({"--working-set", file(), image}).find("--force"), std::string::npos);
  EXPECT_EQ(
      run_program("uffdkit", {"image", "store-set", "--force", "--working-set", file(), image}).exit_code, 0);
  EXPECT_EQ(info(image).at("pages"), 2);
}

TEST_F(WorkingSets, WhatIsThereAndIsNoStoredSetIsReplacedOnlyIfThatIsWanted) {
  const std::string image = compressed();
  record(image, {900, 3});
  std::filesystem::copy(image, image + ".ws.img");
  const Finished refused = run_program("uffdkit", {"image", "store-set", image});
  EXPECT_EQ(refused.exit_code, 1);
  EXPECT_NE(refused.err.find("--force"), std::string::npos) << refused.err;
  EXPECT_EQ(run_program("uffdkit", {"image", "store-set", "--force", image}).exit_code, 0);
  EXPECT_EQ(run_program("uffdkit", {"image", "store-set", image}).exit_code, 0);
}

TEST_F(WorkingSets, OneThatIsStoredAndDamagedIsNamedAndTheImageServed) {
  const std::string image = compressed();
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < kPages; page += 3) pages.push_back(page);
  record(image, pages);
  ASSERT_EQ(run_program("uffdkit", {"image", "store-set", image}).exit_code, 0);
  const UniqueFd fd(::open((image + ".ws.img").c_str(), O_WRONLY | O_CLOEXEC));
  ASSERT_EQ(::pwrite(fd.get(), "damage", 6, 100), 6);
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image});
  for (int time = 0; time < 2; ++time) {
    Child process = client(image_, whole(image_), socket_,
                           [](const ClientMemory& memory, const Channel&) { memory.check_all(1, 1); });
    EXPECT_EQ(process.wait(), 0) << manager.log();
  }
  EXPECT_EQ(manager.stop(), 0);
  // By the session that comes next.
  EXPECT_NE(manager.log().find(image + ".ws.img"), std::string::npos) << manager.log();
}

TEST_F(WorkingSets, WhatCameOfARunIsShown) {
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < 800; ++page) pages.push_back(page);
  record(image_.path(), pages);
  expect_brought(image_.path(), 700);
  const nlohmann::json set = info(image_.path());
  EXPECT_EQ(set.at("pages"), 800);
  ASSERT_EQ(set.at("runs").size(), 1u);
  const nlohmann::json& run = set.at("runs")[0];
  EXPECT_GE(run.at("brought"), 700);
  // The client has touched all of them.
  EXPECT_EQ(run.at("left_out_used"), run.at("left_out"));
  EXPECT_GE(run.at("missed"), 1);
  EXPECT_LT(run.at("coverage"), 1.0);
}

TEST_F(WorkingSets, ARecordingGoesOnUnderTheNextWorker) {
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image_.path(), "--record"});
  {
    Child process =
        client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
          for (const std::size_t page : {900u, 3u}) memory.check(page);
          channel.send(1);
          channel.receive();
          for (const std::size_t page : {4u, 77u}) memory.check(page);
        });
    process.channel().receive();
    // What a worker is about when it dies, it has not written down.
    ASSERT_TRUE(
        eventually([&] { return manager.total("pages_copied") + manager.total("pages_zeroed") == 2; }));
    ::kill(manager.worker_pid(), SIGKILL);
    process.channel().send(1);
    EXPECT_EQ(process.wait(), 0) << manager.log();
  }
  EXPECT_EQ(manager.stop(), 0);
  EXPECT_EQ(info(image_.path()).at("pages"), 4) << manager.log();
}

TEST_F(WorkingSets, ASessionThatIsTakenUpIsBroughtWhatWasRecorded) {
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < 800; page += 2) pages.push_back(page);
  record(image_.path(), pages);
  const std::string aside = directory_ / "aside";
  std::filesystem::rename(file(), aside);
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image_.path()});
  Child process = touching_twice();
  process.channel().receive();
  // From now on there is one, which the next worker finds.
  std::filesystem::rename(aside, file());
  ::kill(manager.worker_pid(), SIGKILL);
  const auto brought = [&] {
    const nlohmann::json sessions = manager.status().at("sessions");
    return !sessions.empty() && sessions[0].contains("prefetch") &&
           sessions[0].at("prefetch").at("pages").get<std::uint64_t>() >= 350;
  };
  EXPECT_TRUE(eventually(brought)) << manager.status().dump(2);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager.log();
  EXPECT_EQ(manager.stop(), 0);
}

TEST_F(WorkingSets, NothingIsBroughtWhereTheOptionSaysSo) {
  record(image_.path(), {900, 3, 4, 77});
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image_.path(), "--no-prefetch"});
  Child process =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        memory.check(500);
        channel.send(1);
        channel.receive();
      });
  process.channel().receive();
  EXPECT_FALSE(manager.status().at("sessions")[0].contains("prefetch"));
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(WorkingSets, InTheBackgroundAllSessionsGetAllWithinOneBudget) {
  ManagerProcess manager(directory_, {"--firecracker", socket_ + "=" + image_.path(), "--background", "full",
                                      "--background-rate", "32M"});
  const auto touch_nothing = [](const ClientMemory& memory, const Channel& channel) {
    channel.receive();
    memory.check_all(1, 1);
  };
  Child first = client(image_, whole(image_), socket_, touch_nothing);
  Child second = client(image_, whole(image_), socket_, touch_nothing);
  const auto complete = [&] {
    const nlohmann::json sessions = manager.status().at("sessions");
    return sessions.size() == 2 && std::ranges::all_of(sessions, [&](const nlohmann::json& session) {
             // An eighth of the image is holes, which are left out.
             return session.at("pages_background") >= kPages * 8 / 10;
           });
  };
  EXPECT_TRUE(eventually(complete)) << manager.status().dump(2);
  for (Child* process : {&first, &second}) {
    process->channel().send(1);
    EXPECT_EQ(process->wait(), 0) << manager.log();
  }
}

TEST_F(WorkingSets, OneOfAnotherImageIsNotUsedAndIsReplacedByARecording) {
  const Image other(directory_ / "other", kPages, 2);
  serve(other.path(), {"--record"}, [](const ClientMemory& memory) { memory.check_zero(5); });
  std::filesystem::rename(other.path() + ".ws", file());
  const std::string log =
      serve(image_.path(), {}, [](const ClientMemory& memory) { memory.check_all(1, 1); });
  EXPECT_NE(log.find("was recorded of another image"), std::string::npos) << log;
  record(image_.path(), {900, 3, 4, 77});
  EXPECT_EQ(info(image_.path()).at("pages"), 4);
}

TEST_F(WorkingSets, ADamagedOneIsNamedAndTheImageServed) {
  record(image_.path(), {900, 3, 4, 77});
  const int fd = ::open(file().c_str(), O_WRONLY | O_CLOEXEC);
  ASSERT_EQ(::pwrite(fd, "x", 1, 512), 1);
  ::close(fd);
  const std::string log =
      serve(image_.path(), {}, [](const ClientMemory& memory) { memory.check_all(1, 1); });
  EXPECT_NE(log.find(file()), std::string::npos) << log;
  EXPECT_NE(log.find("checksum"), std::string::npos) << log;
  const Finished shown = run_program("uffdkit", {"image", "info", image_.path()});
  EXPECT_EQ(shown.exit_code, 0);
  EXPECT_NE(shown.err.find("checksum"), std::string::npos) << shown.err;
}

TEST_F(WorkingSets, ALinkInItsPlaceIsNotFollowed) {
  record(image_.path(), {900, 3});
  std::filesystem::rename(file(), directory_ / "elsewhere");
  std::filesystem::create_symlink(directory_ / "elsewhere", file());
  const std::string log = record(image_.path(), {4});
  EXPECT_NE(log.find("is lost"), std::string::npos) << log;
  EXPECT_TRUE(std::filesystem::is_symlink(file()));
}

}  // namespace
}  // namespace uffdkit::test
