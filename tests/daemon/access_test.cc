// Who is let in, and to which images: clients of other users at a manager's sockets.
#include <poll.h>
#include <sys/stat.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <bit>
#include <filesystem>

#include "daemon/fixture.h"
#include "engine/session_state.h"
#include "support/native_connection.h"
#include "support/program.h"
#include "support/user.h"
#include "wire/unix_socket.h"

namespace uffdkit::test {
namespace {

using native::ErrorCode;

// Users and groups that nobody else is.
constexpr uid_t kGuest = 61001;
constexpr uid_t kOther = 61002;
constexpr gid_t kTeam = 61003;

class Access : public ManagerTest {
 protected:
  void SetUp() override {
    if (geteuid() != 0) GTEST_SKIP() << "needs root, to become other users";
    ManagerTest::SetUp();
    std::filesystem::create_directory(images_ / "deep");
    for (const char* name : {"open", "secret", "deep/image"})
      std::filesystem::copy_file(image_.path(), images_ / name);
    // Everybody reaches the sockets, and nothing else there.
    chmod(directory_.path().c_str(), 0711);
  }

  // A manager whose sockets everybody may connect to, as far as their modes go.
  ManagerProcess open_to_all(const std::vector<std::string>& rules) const {
    std::vector<std::string> arguments = {"--listen",      socket_,
                                          "--images",      images_.path().string(),
                                          "--firecracker", firecracker_ + "=" + image_.path()};
    arguments.insert(arguments.end(), rules.begin(), rules.end());
    return ManagerProcess(directory_, arguments);
  }
  void open_sockets(const ManagerProcess& manager) const {
    for (const std::string& socket : {socket_, firecracker_, manager.control()})
      ASSERT_EQ(chmod(socket.c_str(), 0666), 0);
  }
  // Runs as this user; the memory is made before, by root.
  void run_as(uid_t user, const std::vector<gid_t>& groups, const std::function<void()>& work) const {
    Child process = program([&](const Channel&) {
      become(user, groups);
      work();
    });
    EXPECT_EQ(process.wait(), 0);
  }
  static native::Attach attach_request(const ClientMemory& memory, const std::string& image) {
    return {
        .request = {.image = image,
                    .regions = {{.memory = {Address(std::bit_cast<std::uintptr_t>(memory.bytes(0).data())),
                                            ByteCount(memory.pages() * 4096)},
                                 .offset = {},
                                 .page_size = kPage4K}}},
        .uffd = duplicate(memory.uffd().fd())};
  }
  // The other end closes the connection without a word.
  static void wait_closed(int socket) {
    pollfd entry{.fd = socket, .events = POLLIN, .revents = 0};
    require(poll(&entry, 1, 30'000) == 1, "the connection was not closed");
    char byte;
    require(read(socket, &byte, 1) <= 0, "the manager says something");
  }

  const Image image_{directory_ / "image", 64};
  const TempDir images_;
  const std::string socket_ = directory_ / "native.sock";
  const std::string firecracker_ = directory_ / "fc.sock";
};

TEST_F(Access, EverySocketIsForItsOwnerOnly) {
  const ManagerProcess manager = open_to_all({});
  for (const std::string& socket : {socket_, firecracker_, manager.control()}) {
    struct stat info;
    ASSERT_EQ(lstat(socket.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 07777, 0600u) << socket;
  }
  const std::string added = directory_ / "added.sock";
  manager.ask(R"({"command":"listen-add","kind":"native","socket":")" + added + "\"}");
  struct stat info;
  ASSERT_EQ(lstat(added.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 07777, 0600u);
}

TEST_F(Access, WithoutARuleAnotherUserIsTurnedAwayAtEverySocketWithTheReason) {
  const ManagerProcess manager = open_to_all({});
  open_sockets(manager);
  run_as(kGuest, {}, [&] {
    const auto attached = attach(socket_, "open", {.kernel_faults = false});
    require(!attached, "attached");
    require(attached.error().text().find("user 61001 may have no image") != std::string::npos,
            attached.error().text());
    wait_closed(connect_to(firecracker_).get());
  });
  const Finished status = run_program("uffdkit", {"status", "--control", manager.control()}, kGuest);
  EXPECT_EQ(status.exit_code, 1);
  EXPECT_NE(status.err.find("user 61001 may not control this manager"), std::string::npos) << status.err;
  EXPECT_EQ(manager.count("clients_refused"), 3u) << manager.log();
  EXPECT_TRUE(manager.logged("uid 61001: user 61001 may not have the image " + image_.path()))
      << manager.log();
  EXPECT_TRUE(manager.logged("user 61001 may not control this manager")) << manager.log();
}

TEST_F(Access, AUserIsServedTheImagesOfItsRulesAndToldNothingOfOthers) {
  const ManagerProcess manager = open_to_all({"--allow", "user:61001=open", "--allow", "user:61002=*"});
  open_sockets(manager);
  run_as(kGuest, {}, [&] {
    const auto memory = take(attach(socket_, "open", {.kernel_faults = false}));
    for (std::size_t page = 0; page < 64; ++page)
      require(image_.holds(page, std::span<const std::byte, 4096>(memory.data() + page * 4096, 4096)),
              "a page is wrong");
    NativeConnection connection(socket_);
    for (const char* name : {"secret", "deep/image", "nowhere"}) {
      // Whether there is one is not told either.
      require(connection.is_refused(native::ImageInfo{.image = name}, ErrorCode::not_permitted), name);
      require(connection.is_refused(native::ShareImage{.image = name}, ErrorCode::not_permitted), name);
    }
    // It takes another way to the file than its rule says.
    for (const char* name : {"deep/../secret", "./open", "deep//image", "open/../secret"})
      require(connection.is_refused(native::ImageInfo{.image = name}, ErrorCode::not_permitted), name);
  });
  run_as(kOther, {}, [&] {
    NativeConnection connection(socket_);
    require(std::holds_alternative<native::ImageSize>(connection.ask(native::ImageInfo{.image = "secret"})),
            "it may not have everything");
    require(connection.is_refused(native::ImageInfo{.image = "nowhere"}, ErrorCode::no_such_image), "");
    for (const char* name : {"deep/../secret", "./open", "deep//image", "/open", "open/", ".."})
      require(connection.is_refused(native::ImageInfo{.image = name}, ErrorCode::no_such_image), name);
  });
}

TEST_F(Access, APatternDoesNotReachOutByDots) {
  const ManagerProcess manager = open_to_all({"--allow", "user:61001=deep/*"});
  open_sockets(manager);
  run_as(kGuest, {}, [&] {
    NativeConnection connection(socket_);
    require(
        std::holds_alternative<native::ImageSize>(connection.ask(native::ImageInfo{.image = "deep/image"})),
        "it may not have its own");
    for (const char* name : {"deep/../secret", "deep/./../open", "deep//../secret"})
      require(connection.is_refused(native::ImageInfo{.image = name}, ErrorCode::no_such_image), name);
  });
}

TEST_F(Access, AGroupMayBeOneOfSeveral) {
  const ManagerProcess manager = open_to_all({"--allow", "group:61003=open"});
  open_sockets(manager);
  run_as(kGuest, {4, kTeam}, [&] { take(attach(socket_, "open", {.kernel_faults = false})); });
  run_as(kGuest, {4}, [&] { require(!attach(socket_, "open", {.kernel_faults = false}), "attached"); });
}

TEST_F(Access, AFirecrackerClientMustBeAllowedTheImageOfItsSocket) {
  const ManagerProcess manager = open_to_all({"--allow", "user:61001=" + image_.path()});
  open_sockets(manager);
  const auto hand_over = [&](uid_t user, const std::string& socket, bool served) {
    Child process = program([&](const Channel&) {
      const ClientMemory memory(image_, whole(image_));
      become(user);
      if (served) {
        const UniqueFd connection = memory.hand_over(socket);
        memory.check_all(1, 1);
      } else {
        // It may be ended before anything can be said.
        wait_closed(connect_to(socket).get());
      }
    });
    EXPECT_EQ(process.wait(), 0) << manager.log();
  };
  hand_over(kGuest, firecracker_, true);
  hand_over(kOther, firecracker_, false);
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
  // Of the image at a socket that is added, they are told there.
  const std::string added = directory_ / "added.sock";
  const Finished run =
      run_program("uffdkit", {"listen", "add", "--control", manager.control(), "--firecracker",
                              images_ / "secret", "--allow", "user:61002,group:root", added});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  ASSERT_EQ(chmod(added.c_str(), 0666), 0);
  hand_over(kGuest, added, false);
  hand_over(kOther, added, true);
}

TEST_F(Access, ControlIsARightOfItsOwn) {
  const ManagerProcess manager = open_to_all({"--allow-control", "user:61001", "--allow", "user:61002=*"});
  open_sockets(manager);
  EXPECT_EQ(run_program("uffdkit", {"status", "--control", manager.control()}, kGuest).exit_code, 0);
  EXPECT_EQ(run_program("uffdkit", {"status", "--control", manager.control()}, kOther).exit_code, 1);
  run_as(kGuest, {},
         [&] { require(!attach(socket_, "open", {.kernel_faults = false}), "it may have an image"); });
  run_as(kOther, {}, [&] { take(attach(socket_, "open", {.kernel_faults = false})); });
}

TEST_F(Access, ASessionIsResumedOnlyByOneWhoMayHaveItsImage) {
  const ManagerProcess manager = open_to_all({"--allow", "user:61001=open", "--allow", "user:61002=secret"});
  open_sockets(manager);
  // The state file of a session of one image, in the hands of a user who may have another.
  Child process = program([&](const Channel&) {
    const ClientMemory memory(image_, whole(image_));
    NativeConnection own(socket_);
    auto attached = std::get<native::Attached>(own.ask(attach_request(memory, "secret")));
    become(kGuest);
    NativeConnection connection(socket_);
    const auto resume = [&](int state_file) {
      return native::Resume{.session = attached.session,
                            .uffd = duplicate(memory.uffd().fd()),
                            .state_file = duplicate(state_file)};
    };
    require(connection.is_refused(resume(attached.state_file.get()), ErrorCode::not_permitted),
            "the session is resumed");
    // One that this manager does not know, made for the purpose: it names the image that it is to be.
    const SessionState forged = take(SessionState::create("secret"));
    require(connection.is_refused(resume(forged.fd()), ErrorCode::not_permitted), "a forged one is resumed");
    memory.check_all(1, 1);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_F(Access, ARuleThatMakesNoSenseStopsTheStart) {
  for (const char* rule : {"bob", "user:=x", "user:no such user=x", "users:1=x"}) {
    const Finished run =
        run_program("uffdkit", {"serve", "--control", directory_ / "unused.sock", "--allow", rule});
    EXPECT_NE(run.exit_code, 0) << rule;
    EXPECT_NE(run.err, "") << rule;
    EXPECT_FALSE(std::filesystem::exists(directory_ / "unused.sock"));
  }
}

}  // namespace
}  // namespace uffdkit::test
