// What a serving process has given up, and that it serves all the same.
#include "manager/sandbox.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <thread>

#include "daemon/fixture.h"
#include "kernel/own_memory.h"
#include "manager/manager.h"
#include "support/native_connection.h"
#include "support/sanitizers.h"
#include "support/user.h"

namespace uffdkit::test {
namespace {

// The values of this key in the status of all threads of a process.
std::set<std::string> of_threads(pid_t pid, const std::string& key) {
  std::set<std::string> values;
  for (const auto& task : std::filesystem::directory_iterator("/proc/" + std::to_string(pid) + "/task")) {
    std::ifstream status(task.path() / "status");
    for (std::string line; std::getline(status, line);)
      if (line.starts_with(key + ":"))
        values.insert(line.substr(line.find_first_not_of("\t ", key.size() + 1)));
  }
  return values;
}

class Sandbox : public ManagerTest {
 protected:
  void SetUp() override {
    if (kSanitized) GTEST_SKIP() << "needs a build without sanitizers";
    ManagerTest::SetUp();
  }
  const Image image_{directory_ / "image", 64};
  const std::string socket_ = directory_ / "fc.sock";
};

TEST_F(Sandbox, EveryThreadOfAManagerIsInItAndStatusSaysSo) {
  const ManagerProcess manager(directory_, firecracker(socket_, image_));
  Child process = client(image_, whole(image_), socket_,
                         [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
  EXPECT_EQ(process.wait(), 0);
  EXPECT_EQ(of_threads(manager.worker_pid(), "Seccomp"), std::set<std::string>{"2"});
  EXPECT_EQ(of_threads(manager.worker_pid(), "NoNewPrivs"), std::set<std::string>{"1"});
  // CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_KILL, CAP_IPC_LOCK, if it has any.
  if (geteuid() == 0) {
    for (const char* set : {"CapEff", "CapPrm", "CapBnd"})
      EXPECT_EQ(of_threads(manager.worker_pid(), set), std::set<std::string>{"0000000000004026"}) << set;
  }
  EXPECT_EQ(of_threads(manager.worker_pid(), "CapInh"), std::set<std::string>{"0000000000000000"});
  const nlohmann::json sandbox = manager.status().at("sandbox");
  EXPECT_TRUE(sandbox.at("system_calls_filtered")) << sandbox;
  EXPECT_TRUE(sandbox.at("no_new_privileges")) << sandbox;
  EXPECT_TRUE(sandbox.at("closed_to_own_user")) << sandbox;
  if (geteuid() == 0) {
    EXPECT_EQ(sandbox.at("capabilities"),
              (nlohmann::json{"cap_dac_override", "cap_dac_read_search", "cap_kill", "cap_ipc_lock"}))
        << sandbox;
  }
}

TEST_F(Sandbox, CanBeLeftOut) {
  std::vector<std::string> arguments = firecracker(socket_, image_);
  arguments.emplace_back("--no-sandbox");
  const ManagerProcess manager(directory_, arguments);
  EXPECT_EQ(of_threads(manager.worker_pid(), "Seccomp"), of_threads(getpid(), "Seccomp"));
  EXPECT_FALSE(manager.status().at("sandbox").at("system_calls_filtered"));
  EXPECT_FALSE(manager.status().at("sandbox").at("closed_to_own_user"));
}

TEST_F(Sandbox, SocketsAreAddedAndImagesOpenedFromWithin) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to have files of another user";
  const ManagerProcess manager(directory_, {});
  // In a folder and of an image that are another user's alone.
  const TempDir others;
  const Image image(others / "image", 64);
  ASSERT_EQ(chown(image.path().c_str(), kNobody, kNobody), 0);
  ASSERT_EQ(chown(others.path().c_str(), kNobody, kNobody), 0);
  ASSERT_EQ(chmod(others.path().c_str(), 0700), 0);
  const std::string socket = others / "fc.sock";
  const nlohmann::json added = manager.ask(R"({"command":"listen-add","kind":"firecracker","socket":")" +
                                           socket + R"(","image":")" + image.path() + "\"}");
  ASSERT_TRUE(added.at("ok")) << added;
  Child process = client(image, whole(image), socket,
                         [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 1); });
  EXPECT_EQ(process.wait(), 0) << manager.log();
  EXPECT_TRUE(manager.ask(R"({"command":"listen-remove","socket":")" + socket + "\"}").at("ok"));
  EXPECT_FALSE(std::filesystem::exists(socket));
}

TEST_F(Sandbox, AClientOfAnotherUserCanBeKilledFromWithin) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become another user";
  std::vector<std::string> arguments = firecracker(socket_, image_);
  arguments.insert(arguments.end(), {"--allow", "anyone=*", "--store-fault", "error,from=0,to=256K",
                                     "--on-error", "kill", "--read-retries", "0"});
  ManagerProcess manager(directory_, arguments);
  ASSERT_EQ(chmod(directory_.path().c_str(), 0711), 0);
  ASSERT_EQ(chmod(socket_.c_str(), 0666), 0);
  Child process = program([&](const Channel&) {
    const ClientMemory memory(image_, whole(image_));
    become(kNobody);
    const UniqueFd connection = memory.hand_over(socket_);
    for (std::size_t page = 0; page < 64; ++page) (void)memory.bytes(page)[0];
    memory.check_all(1, 1);
  });
  EXPECT_EQ(process.wait(), -SIGKILL) << manager.log();
}

// ---- the filter itself, in a process of the test's own ----------------------------------------------------

class Filtered : public testing::Test {
 protected:
  void SetUp() override {
    if (kSanitized) GTEST_SKIP() << "needs a build without sanitizers";
  }
  // What comes of `call` in a process that serves. Its exit code, or minus the signal that ended it.
  static int in_the_sandbox(const std::function<int()>& call) {
    Child process([&](const Channel&) {
      if (!drop_privileges() || !filter_system_calls()) return 90;
      return call();
    });
    return process.wait();
  }
  // The errno of a call, in the place of an exit code.
  static int error_of(long result) { return result >= 0 ? 0 : errno; }
};

TEST_F(Filtered, WhatServingTakesGoesOn) {
  EXPECT_EQ(in_the_sandbox([] {
              std::thread([] { (void)std::vector<char>(1 << 20); }).join();
              const UniqueFd file(open("/proc/self/status", O_RDONLY | O_CLOEXEC));
              return file ? 0 : errno;
            }),
            0);
}

TEST_F(Filtered, NothingIsExecuted) {
  EXPECT_EQ(in_the_sandbox([] { return execl("/bin/true", "true", nullptr); }), -SIGSYS);
}

TEST_F(Filtered, NoProcessIsMade) {
  EXPECT_EQ(in_the_sandbox([] {
              const long pid = syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr);
              if (pid == 0) _exit(0);
              return error_of(pid);
            }),
            ENOSYS);
}

TEST_F(Filtered, NoUserfaultfdIsMadeAndNoOtherProcessIsReadOrWritten) {
  EXPECT_EQ(in_the_sandbox([] { return error_of(syscall(SYS_userfaultfd, O_CLOEXEC)); }), -SIGSYS);
  EXPECT_EQ(in_the_sandbox([] {
              const UniqueFd device(open("/dev/userfaultfd", O_RDONLY | O_CLOEXEC));
              return device ? error_of(ioctl(device.get(), abi::kIocNew, O_CLOEXEC)) : ENOSYS;
            }),
            ENOSYS);
  for (const long call : {SYS_process_vm_writev, SYS_process_vm_readv, SYS_ptrace, SYS_pidfd_getfd})
    EXPECT_EQ(in_the_sandbox([call] { return error_of(syscall(call, 0, 0, 0, 0, 0, 0)); }), -SIGSYS) << call;
}

TEST_F(Filtered, NoNetworkIsReached) {
  EXPECT_EQ(in_the_sandbox([] { return error_of(socket(AF_INET, SOCK_STREAM, 0)); }), ENOSYS);
  EXPECT_EQ(in_the_sandbox([] { return error_of(socket(AF_NETLINK, SOCK_RAW, 0)); }), ENOSYS);
  EXPECT_EQ(in_the_sandbox([] { return error_of(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)); }), 0);
}

TEST_F(Filtered, NoMemoryIsMadeCode) {
  EXPECT_EQ(in_the_sandbox([] {
              const void* memory =
                  mmap(nullptr, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
              return memory == MAP_FAILED ? errno : 0;
            }),
            ENOSYS);
  EXPECT_EQ(in_the_sandbox([] {
              void* memory = mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
              return error_of(mprotect(memory, 4096, PROT_READ | PROT_EXEC));
            }),
            ENOSYS);
}

TEST_F(Filtered, OfRequestsToDescriptorsOnlyThoseOfServingAreMade) {
  EXPECT_EQ(in_the_sandbox([] {
              char byte = 'x';
              return error_of(ioctl(0, TIOCSTI, &byte));
            }),
            ENOSYS);
  EXPECT_EQ(in_the_sandbox([] { return error_of(ioctl(-1, abi::kIoctlCopy, nullptr)); }), EBADF);
  EXPECT_EQ(in_the_sandbox([] { return error_of(ioctl(-1, abi::kIoctlApi, nullptr)); }), ENOSYS);
}

TEST_F(Filtered, ClientsAreEndedAndStoppedAndSentNothingElse) {
  EXPECT_EQ(in_the_sandbox([] { return error_of(syscall(SYS_pidfd_send_signal, -1, SIGKILL, nullptr, 0)); }),
            EBADF);
  EXPECT_EQ(in_the_sandbox([] { return error_of(syscall(SYS_pidfd_send_signal, -1, SIGUSR1, nullptr, 0)); }),
            ENOSYS);
  EXPECT_EQ(in_the_sandbox([] { return error_of(kill(getppid(), SIGUSR1)); }), ENOSYS);
}

// ---- a manager of this process's own ----------------------------------------------------------------------

TEST_F(Sandbox, AUserfaultfdOfTheManagersOwnMemoryIsRefusedAndCostsNothing) {
  Child process = program([&](const Channel&) {
    const std::string native = directory_ / "native.sock";
    const std::unique_ptr<Manager> manager = take(Manager::create({}));
    succeed(manager->add_image("guest", image_.path()));
    succeed(manager->listen_native(native));
    succeed(manager->listen_firecracker(socket_, image_.path()));
    std::jthread serving([&] { manager->run(); });
    {
      const ClientMemory memory(image_, whole(image_));
      NativeConnection connection(native);
      const nlohmann::json handshake = memory.handshake();
      const AddressRange range{Address(handshake[0].at("base_host_virt_addr").get<std::uint64_t>()),
                               ByteCount(memory.pages() * 4096)};
      native::Attach request{
          .request = {.image = "guest", .regions = {{.memory = range, .offset = {}, .page_size = kPage4K}}},
          .uffd = duplicate(memory.uffd().fd())};
      const native::Answer answer = connection.ask(std::move(request));
      const auto* refused = std::get_if<native::Refused>(&answer);
      require(refused != nullptr && refused->code == native::ErrorCode::bad_descriptor, "it is served");
      require(refused->message.find("manager's own memory") != std::string::npos, refused->message);
      const SessionState state = take(SessionState::create("guest"));
      require(connection.is_refused(native::Resume{.session = native::SessionId(1),
                                                   .uffd = duplicate(memory.uffd().fd()),
                                                   .state_file = duplicate(state.fd())},
                                    native::ErrorCode::bad_descriptor),
              "it is taken up");
      // Nobody has filled anything there, nor reads it: it is missing still.
      require(memory.uffd().zero({range.start, ByteCount(4096)}).stop == Stop::complete, "it was filled");
    }
    manager->stop();
  });
  EXPECT_EQ(process.wait(), 0);
}

}  // namespace
}  // namespace uffdkit::test
