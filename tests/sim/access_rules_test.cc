// Who may create which userfaultfd: one table, on the model and, as root, on the running kernel.
#include <fcntl.h>
#include <fmt/format.h>
#include <grp.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <sys/xattr.h>
#include <uffdkit/sim.h>
#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <functional>

#include "support/temp_dir.h"

namespace uffdkit::sim::test {
namespace {

constexpr unsigned kUser = 54321;
constexpr unsigned kGroup = 54322;

struct Rule {
  const char* name;
  Credentials who;
  bool sysctl = false;
  DeviceNode device = {};
  // errno of each way in the order of CreateWay; 0: it works.
  int device_way;
  int system_call;
  int device_user_mode;
  int user_mode;
  int fork_events;  // errno of UFFDIO_API with EVENT_FORK, on a descriptor of whichever way works
};

Credentials root() {
  return {};
}
Credentials root_without_ptrace() {
  return {.cap_sys_ptrace = false};
}
Credentials root_of_child_namespace() {
  return {.uid = kUser, .gids = {kGroup}, .initial_user_namespace = false};
}
Credentials user_with_ptrace() {
  return {.uid = kUser, .gids = {kGroup}, .cap_sys_ptrace = true, .cap_dac_override = false};
}
DeviceNode node(unsigned owner, unsigned group, unsigned mode) {
  return {.owner = owner, .group = group, .mode = mode};
}

std::vector<Rule> rules() {
  const Credentials anybody = user(kUser, {kGroup});
  return {
      {"root", root(), false, {}, 0, 0, 0, 0, 0},
      {"root without CAP_SYS_PTRACE", root_without_ptrace(), false, {}, 0, EPERM, 0, 0, EPERM},
      {"root without CAP_SYS_PTRACE, sysctl on", root_without_ptrace(), true, {}, 0, 0, 0, 0, EPERM},
      {"a user", anybody, false, {}, EACCES, EPERM, EACCES, 0, EPERM},
      {"a user, sysctl on", anybody, true, {}, EACCES, 0, EACCES, 0, EPERM},
      {"a user with CAP_SYS_PTRACE", user_with_ptrace(), false, {}, EACCES, 0, EACCES, 0, 0},
      {"a user, device open to all", anybody, false, node(0, 0, 0666), 0, EPERM, 0, 0, EPERM},
      {"a user, device writable only", anybody, false, node(0, 0, 0622), EACCES, EPERM, EACCES, 0, EPERM},
      {"a user in the device's group", anybody, false, node(0, kGroup, 0660), 0, EPERM, 0, 0, EPERM},
      {"a user in the device's group, which may not", anybody, false, node(0, kGroup, 0606), EACCES, EPERM,
       EACCES, 0, EPERM},
      {"the device's owner", anybody, false, node(kUser, 0, 0600), 0, EPERM, 0, 0, EPERM},
      {"the device's owner, who may not", anybody, false, node(kUser, 0, 0066), EACCES, EPERM, EACCES, 0,
       EPERM},
      {"no device", root(), false, {.exists = false}, ENOENT, 0, ENOENT, 0, 0},
      {"root of a child user namespace",
       root_of_child_namespace(),
       false,
       {},
       EACCES,
       EPERM,
       EACCES,
       0,
       EPERM},
      {"a user whom an ACL names",
       anybody,
       false,
       {.mode = 0660, .acl_users = {{kUser, 6}}},
       0,
       EPERM,
       0,
       0,
       EPERM},
      {"a user whom an ACL names, and its mask refuses",
       anybody,
       false,
       {.mode = 0600, .acl_users = {{kUser, 6}}},
       EACCES,
       EPERM,
       EACCES,
       0,
       EPERM},
      {"a user in a group that an ACL names",
       anybody,
       false,
       {.mode = 0660, .acl_groups = {{kGroup, 4}}},
       0,
       EPERM,
       0,
       0,
       EPERM},
      {"a user in a group that an ACL refuses, whatever others may",
       anybody,
       false,
       {.mode = 0664, .acl_groups = {{kGroup, 0}}},
       EACCES,
       EPERM,
       EACCES,
       0,
       EPERM},
  };
}

struct Answers {
  std::array<int, 4> ways;
  int fork_events;
  // What one is told who asks for a userfaultfd that sees faults inside the kernel; empty if there is one.
  std::array<char, 4096> told;
};

Answers ask(SystemCalls& system) {
  Answers answers{};
  const std::vector<CreateAttempt> attempts = try_create_ways(system);
  for (std::size_t i = 0; i < answers.ways.size(); ++i) answers.ways[i] = attempts[i].os_error;
  // User mode only is open to all, and the rule for fork events is the same everywhere.
  const int fd = system.userfaultfd(O_CLOEXEC | abi::kUserModeOnly);
  abi::ApiArgs args{.api = abi::kApi, .features = abi::kFeatureEventFork, .ioctls = 0};
  answers.fork_events = -system.ioctl(fd, abi::kIoctlApi, reinterpret_cast<std::uintptr_t>(&args));
  system.close(fd);
  if (const Result<Uffd> made = Uffd::create({}, system); !made)
    made.error().text().copy(answers.told.data(), answers.told.size() - 1);
  return answers;
}

// Who is refused hears of every way, why it was refused, and what would open it.
void expect_told(const Rule& rule, const std::string& told) {
  if (rule.device_way == 0 || rule.system_call == 0) {
    EXPECT_EQ(told, "") << rule.name;
    return;
  }
  const auto tells = [&](const std::string& text) {
    EXPECT_NE(told.find(text), std::string::npos)
        << rule.name << " is not told '" << text << "', but: " << told;
  };
  tells("\n  /dev/userfaultfd: ");
  tells("\n  userfaultfd system call: not permitted: no CAP_SYS_PTRACE in the initial user namespace");
  if (rule.device_way == EACCES) tells("setfacl");
  tells("setcap cap_sys_ptrace+ep");
  tells("vm.unprivileged_userfaultfd=1");
  // And what it costs to do without.
  tells("UFFD_USER_MODE_ONLY");
  tells("EFAULT");
}

void expect(const Rule& rule, const Answers& answers) {
  EXPECT_EQ(answers.ways[0], rule.device_way) << rule.name << ": device";
  EXPECT_EQ(answers.ways[1], rule.system_call) << rule.name << ": system call";
  EXPECT_EQ(answers.ways[2], rule.device_user_mode) << rule.name << ": device, user mode only";
  EXPECT_EQ(answers.ways[3], rule.user_mode) << rule.name << ": system call, user mode only";
  EXPECT_EQ(answers.fork_events, rule.fork_events) << rule.name << ": fork events";
  expect_told(rule, answers.told.data());
}

TEST(SimAccessRules, AreAsTheTableSays) {
  for (const Rule& rule : rules()) {
    Kernel kernel({.unprivileged_userfaultfd = rule.sysctl, .device = rule.device});
    expect(rule, ask(kernel.spawn(rule.who).system_calls()));
  }
}

TEST(SimAccessRules, AnAclOpensTheDeviceToAUserAndTheMaskClosesItAgain) {
  DeviceNode device{.mode = 0660, .acl_users = {{kUser, 6}}};
  const auto may_open = [&] {
    Kernel kernel({.device = device});
    return kernel.spawn(user(kUser, {kGroup})).system_calls().open(abi::kDevicePath, O_RDONLY) >= 0;
  };
  EXPECT_TRUE(may_open());
  device.mode = 0600;
  EXPECT_FALSE(may_open());
  device = {.mode = 0660, .acl_groups = {{kGroup, 4}}};
  EXPECT_TRUE(may_open());
  // A group that matches and refuses is the last word, whatever others may.
  device = {.mode = 0664, .acl_groups = {{kGroup, 0}}};
  EXPECT_FALSE(may_open());
}

TEST(SimAccessRules, AStrangerWithAWrongFlagHearsThatItIsNotPermitted) {
  Kernel kernel;
  EXPECT_EQ(kernel.spawn(user(kUser, {})).system_calls().userfaultfd(64), -EPERM);
  EXPECT_EQ(kernel.spawn().system_calls().userfaultfd(64), -EINVAL);
}

TEST(SimAccessRules, ThereIsNoDeviceBeforeLinux61) {
  Kernel kernel({.version = {6, 0}});
  EXPECT_EQ(kernel.spawn().system_calls().open(abi::kDevicePath, O_RDONLY), -ENOENT);
}

// ---- the same for real ----------------------------------------------------------------------------------

constexpr char kSysctl[] = "/proc/sys/vm/unprivileged_userfaultfd";

// Sets the machine's sysctl and puts it back, also when this process is killed: a child of its own does that
// when the pipe between them ends. Only one test at a time, in any process: the lock is on the file.
class Sysctl {
 public:
  Sysctl() : lock_(open(kSysctl, O_RDONLY | O_CLOEXEC)) {
    flock(lock_.get(), LOCK_EX);
    char before = '0';
    std::ifstream(kSysctl) >> before;
    std::array<int, 2> ends;
    if (pipe2(ends.data(), O_CLOEXEC) != 0) return;
    const UniqueFd from(ends[0]);
    end_.reset(ends[1]);
    keeper_ = fork();
    if (keeper_ != 0) return;
    end_.reset();
    // Signals that end a whole test run come to its process group.
    setsid();
    char none = 0;
    while (read(from.get(), &none, 1) < 0 && errno == EINTR) {
    }
    const UniqueFd file(open(kSysctl, O_WRONLY | O_CLOEXEC));
    _exit(write(file.get(), &before, 1) == 1 ? 0 : 1);
  }
  ~Sysctl() {
    end_.reset();
    if (keeper_ > 0) waitpid(keeper_, nullptr, 0);
  }
  Sysctl(const Sysctl&) = delete;
  Sysctl& operator=(const Sysctl&) = delete;

  // Whether it will be put back.
  explicit operator bool() const { return keeper_ > 0; }
  void set(bool on) { std::ofstream(kSysctl) << (on ? '1' : '0'); }

 private:
  UniqueFd lock_;  // shared with the child: held until it has ended
  UniqueFd end_;
  pid_t keeper_ = -1;
};

// The ACL of a node, as acl(5) orders its entries, in the form of the extended attribute. Source:
// include/uapi/linux/posix_acl_xattr.h.
std::vector<std::byte> acl_attribute(const DeviceNode& device) {
  struct Entry {
    std::uint16_t tag;
    std::uint16_t permissions;
    std::uint32_t id;
  };
  constexpr std::uint32_t kVersion = 2;
  constexpr std::uint32_t kNoId = UINT32_MAX;
  const auto bits = [&](unsigned shift) { return static_cast<std::uint16_t>(device.mode >> shift & 7); };
  std::vector<Entry> entries{{0x01, bits(6), kNoId}};
  for (const AclEntry& user : device.acl_users)
    entries.push_back({0x02, static_cast<std::uint16_t>(user.permissions), user.id});
  entries.push_back({0x04, static_cast<std::uint16_t>(device.acl_owning_group), kNoId});
  for (const AclEntry& group : device.acl_groups)
    entries.push_back({0x08, static_cast<std::uint16_t>(group.permissions), group.id});
  entries.push_back({0x10, bits(3), kNoId});
  entries.push_back({0x20, bits(0), kNoId});
  std::vector<std::byte> attribute(sizeof(kVersion) + entries.size() * sizeof(Entry));
  std::memcpy(attribute.data(), &kVersion, sizeof(kVersion));
  std::memcpy(attribute.data() + sizeof(kVersion), entries.data(), entries.size() * sizeof(Entry));
  return attribute;
}

// A device node of the rule's own, seen by this process alone: it is mounted over the machine's in a private
// mount namespace.
int show_device(const DeviceNode& device, unsigned minor_number, const std::string& path) {
  if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0) return -1;
  if (!device.exists) return mount("none", "/dev", "tmpfs", 0, nullptr);
  if (mknod(path.c_str(), S_IFCHR | 0600, makedev(10, minor_number)) != 0) return -1;
  if (chown(path.c_str(), device.owner, device.group) != 0) return -1;
  if (chmod(path.c_str(), device.mode) != 0) return -1;
  if (!device.acl_users.empty() || !device.acl_groups.empty()) {
    const std::vector<std::byte> acl = acl_attribute(device);
    if (setxattr(path.c_str(), "system.posix_acl_access", acl.data(), acl.size(), 0) != 0) return -1;
  }
  return mount(path.c_str(), abi::kDevicePath, nullptr, MS_BIND, nullptr);
}

struct CapabilityHeader {
  std::uint32_t version = 0x20080522;
  int pid = 0;
};
struct CapabilityData {
  std::uint32_t effective;
  std::uint32_t permitted;
  std::uint32_t inheritable;
};
constexpr unsigned kCapDacOverride = 1;
constexpr unsigned kCapDacReadSearch = 2;
constexpr unsigned kCapSysPtrace = 19;

bool drop_capabilities(const Credentials& who) {
  CapabilityHeader header;
  std::array<CapabilityData, 2> data{};
  if (syscall(SYS_capget, &header, data.data()) != 0) return false;
  std::uint32_t dropped = 0;
  if (!who.cap_sys_ptrace) dropped |= 1u << kCapSysPtrace;
  if (!who.cap_dac_override) dropped |= 1u << kCapDacOverride | 1u << kCapDacReadSearch;
  for (std::uint32_t* set : {&data[0].effective, &data[0].permitted, &data[0].inheritable}) *set &= ~dropped;
  // A change of user cleared the effective ones; those that are left are wanted.
  data[0].effective = data[0].permitted;
  data[1].effective = data[1].permitted;
  return syscall(SYS_capset, &header, data.data()) == 0;
}

bool become(const Credentials& who) {
  std::vector<gid_t> groups(who.gids.begin(), who.gids.end());
  if (setgroups(groups.size(), groups.data()) != 0) return false;
  if (who.uid != 0) {
    if (who.initial_user_namespace && prctl(PR_SET_KEEPCAPS, 1) != 0) return false;
    if (setresgid(groups.front(), groups.front(), groups.front()) != 0) return false;
    if (setresuid(who.uid, who.uid, who.uid) != 0) return false;
  }
  if (who.initial_user_namespace) return drop_capabilities(who);
  // Root of a namespace of its own, with all capabilities there.
  if (prctl(PR_SET_DUMPABLE, 1) != 0 || unshare(CLONE_NEWUSER) != 0) return false;
  std::ofstream("/proc/self/setgroups") << "deny";
  std::ofstream("/proc/self/uid_map") << fmt::format("0 {} 1", who.uid);
  std::ofstream("/proc/self/gid_map") << fmt::format("0 {} 1", groups.front());
  return getuid() == 0;
}

constexpr int kCannotSetUp = 200;

// The answers of a child that lives under the rule; nothing if it could not be set up.
std::optional<Answers> ask_for_real(const Rule& rule, unsigned minor_number, const std::string& device_path) {
  std::array<int, 2> ends;
  if (pipe2(ends.data(), O_CLOEXEC) != 0) return std::nullopt;
  const UniqueFd from(ends[0]);
  UniqueFd to(ends[1]);
  const pid_t child = fork();
  if (child == 0) {
    if (show_device(rule.device, minor_number, device_path) != 0 || !become(rule.who)) _exit(kCannotSetUp);
    const Answers answers = ask(linux_system_calls());
    _exit(write(to.get(), &answers, sizeof(answers)) == sizeof(answers) ? 0 : kCannotSetUp);
  }
  to.reset();
  Answers answers{};
  const ssize_t got = read(from.get(), &answers, sizeof(answers));
  int status = 0;
  waitpid(child, &status, 0);
  if (got != sizeof(answers)) return std::nullopt;
  return answers;
}

TEST(AccessRules, OfTheRunningKernelAreAsTheTableSays) {
  if (getuid() != 0) GTEST_SKIP() << "needs root, to become others";
  struct stat device{};
  if (stat(abi::kDevicePath, &device) != 0) GTEST_SKIP() << "needs /dev/userfaultfd (Linux 6.1)";
  if (access(kSysctl, W_OK) != 0) GTEST_SKIP() << "needs a writable " << kSysctl;
  Sysctl sysctl;
  ASSERT_TRUE(sysctl) << "cannot start the process that puts the setting back";
  // Others must be able to walk to the node.
  const uffdkit::test::TempDir directory;
  ASSERT_EQ(chmod(directory.path().c_str(), 0755), 0);
  int number = 0;
  for (const Rule& rule : rules()) {
    sysctl.set(rule.sysctl);
    const auto answers =
        ask_for_real(rule, minor(device.st_rdev), directory / fmt::format("userfaultfd-{}", number++));
    if (!answers)
      GTEST_SKIP() << "needs mount and user namespaces, capabilities, mknod and ACLs for: " << rule.name;
    expect(rule, *answers);
  }
}

}  // namespace
}  // namespace uffdkit::sim::test
