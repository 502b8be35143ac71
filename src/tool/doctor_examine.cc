// Looking at the machine: everything of the report that is not the userfaultfd interface itself.
#include <fcntl.h>
#include <fmt/format.h>
#include <grp.h>
#include <linux/openat2.h>
#include <pwd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "tool/doctor_report.h"

namespace uffdkit::tool {
namespace {

// The first number in a file of the kernel.
std::optional<std::uint64_t> read_number(const std::string& path) {
  std::ifstream file(path);
  std::uint64_t number = 0;
  if (!(file >> number)) return std::nullopt;
  return number;
}

// The word in brackets of "always [madvise] never"; empty if there is no such file.
std::string read_choice(const std::string& path) {
  std::ifstream file(path);
  for (std::string word; file >> word;)
    if (word.size() > 2 && word.front() == '[') return word.substr(1, word.size() - 2);
  return {};
}

// The value of `key` in /proc/self/status, in this base; 0 if it is not there.
std::uint64_t status_number(std::string_view key, int base) {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (!line.starts_with(key) || line.size() <= key.size() || line[key.size()] != ':') continue;
    const std::size_t first = line.find_first_not_of(" \t", key.size() + 1);
    std::uint64_t number = 0;
    if (first != std::string::npos)
      std::from_chars(line.data() + first, line.data() + line.size(), number, base);
    return number;
  }
  return 0;
}

std::string user_name(uid_t uid) {
  const passwd* entry = getpwuid(uid);  // NOLINT(concurrency-mt-unsafe): the doctor has one thread
  return entry == nullptr ? std::string() : entry->pw_name;
}

UserReport examine_user() {
  constexpr unsigned kCapSysPtrace = 19;               // linux/capability.h
  constexpr ino_t kInitialUserNamespace = 0xEFFFFFFD;  // PROC_USER_INIT_INO, the same on every kernel
  struct stat space;
  return {.uid = geteuid(),
          .name = user_name(geteuid()),
          .cap_sys_ptrace = (status_number("CapEff", 16) >> kCapSysPtrace & 1) != 0,
          .initial_user_namespace =
              stat("/proc/self/ns/user", &space) == 0 && space.st_ino == kInitialUserNamespace};
}

DeviceReport examine_device() {
  struct stat device;
  if (stat(abi::kDevicePath, &device) != 0) return {};
  const group* entry = getgrgid(device.st_gid);  // NOLINT(concurrency-mt-unsafe): likewise
  std::string owner = user_name(device.st_uid);
  if (owner.empty()) owner = std::to_string(device.st_uid);
  return {.exists = true,
          .owner = std::move(owner),
          .group = entry == nullptr ? std::to_string(device.st_gid) : entry->gr_name,
          .mode = device.st_mode & 07777};
}

std::vector<HugePagePool> examine_huge_pages() {
  const std::string kPrefix = "hugepages-";
  std::vector<HugePagePool> pools;
  std::error_code none;  // no such folder: no pools
  for (const auto& entry : std::filesystem::directory_iterator("/sys/kernel/mm/hugepages", none)) {
    const std::string name = entry.path().filename();
    if (!name.starts_with(kPrefix)) continue;
    const std::string folder = entry.path().string() + "/";
    const std::uint64_t free = read_number(folder + "free_hugepages").value_or(0);
    const std::uint64_t reserved = read_number(folder + "resv_hugepages").value_or(0);
    pools.push_back({.page_kib = std::strtoull(name.c_str() + kPrefix.size(), nullptr, 10),
                     .pages = read_number(folder + "nr_hugepages").value_or(0),
                     .free = free - std::min(free, reserved)});
  }
  std::ranges::sort(pools, {}, &HugePagePool::page_kib);
  return pools;
}

KvmReport examine_kvm() {
  constexpr unsigned long kGetApiVersion = 0xAE00;  // KVM_GET_API_VERSION
  const UniqueFd kvm(open("/dev/kvm", O_RDWR | O_CLOEXEC));
  if (!kvm) return {.os_error = errno, .api_version = 0};
  const int version = ioctl(kvm.get(), kGetApiVersion, 0);
  return version < 0 ? KvmReport{.os_error = errno, .api_version = 0}
                     : KvmReport{.os_error = 0, .api_version = version};
}

template <class Resource>
LimitReport examine_limit(Resource resource) {
  rlimit limit{};
  getrlimit(resource, &limit);
  return {.soft = limit.rlim_cur, .hard = limit.rlim_max};
}

std::vector<std::string> container_signs(const UserReport& user) {
  std::vector<std::string> signs;
  for (const char* path : {"/.dockerenv", "/run/.containerenv", "/run/systemd/container"})
    if (access(path, F_OK) == 0) signs.emplace_back(path);
  for (const char* name : {"container", "KUBERNETES_SERVICE_HOST"})
    if (std::getenv(name) != nullptr)  // NOLINT(concurrency-mt-unsafe): the doctor has one thread
      signs.push_back(fmt::format("environment variable {}", name));
  if (!user.initial_user_namespace) signs.emplace_back("a user namespace of its own");
  return signs;
}

// The limit in `file` of the cgroup at `path` below `mount`, or of one above it; the tightest.
std::optional<std::uint64_t> tightest_limit(const std::string& mount, std::filesystem::path path,
                                            const std::string& file) {
  std::optional<std::uint64_t> tightest;
  while (true) {
    // "max" is no number. The older hierarchy says "no limit" by a number near 2^63.
    const std::optional<std::uint64_t> limit =
        read_number(fmt::format("{}{}/{}", mount, path.string(), file));
    if (limit && *limit < std::uint64_t{1} << 62 && (!tightest || *limit < *tightest)) tightest = limit;
    if (path == path.parent_path()) return tightest;
    path = path.parent_path();
  }
}

// The memory limit of this process's cgroups, seen at the usual places.
std::optional<std::uint64_t> memory_limit() {
  std::optional<std::uint64_t> tightest;
  const auto consider = [&](std::optional<std::uint64_t> limit) {
    if (limit && (!tightest || *limit < *tightest)) tightest = limit;
  };
  std::ifstream cgroups("/proc/self/cgroup");
  for (std::string line; std::getline(cgroups, line);) {  // "0::/a/b" or "4:memory:/a/b"
    const std::size_t first = line.find(':');
    const std::size_t second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const std::string path = line.substr(second + 1);
    if (controllers == ",,")
      consider(tightest_limit("/sys/fs/cgroup", path, "memory.max"));
    else if (controllers.find(",memory,") != std::string::npos)
      consider(tightest_limit("/sys/fs/cgroup/memory", path, "memory.limit_in_bytes"));
  }
  return tightest;
}

int try_pidfd_open() {
  const UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  return pidfd ? 0 : errno;
}

// What they make goes at once.
std::vector<CallReport> examine_calls() {
  const auto error_of = [](long result) { return result < 0 ? errno : 0; };
  const auto error_of_making = [](long fd) {
    const int error = fd < 0 ? errno : 0;
    UniqueFd(static_cast<int>(fd)).reset();
    return error;
  };
  open_how how{};
  how.flags = O_PATH | O_CLOEXEC;
  const UniqueFd own(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  std::vector<CallReport> calls = {
      {.name = "userfaultfd",
       .os_error = error_of_making(syscall(SYS_userfaultfd, O_CLOEXEC | abi::kUserModeOnly))},
      {.name = "memfd_create", .os_error = error_of_making(memfd_create("uffdkit-doctor", MFD_CLOEXEC))},
      {.name = "openat2", .os_error = error_of_making(syscall(SYS_openat2, AT_FDCWD, "/", &how, sizeof how))},
      {.name = "pidfd_open", .os_error = try_pidfd_open()},
  };
  if (own)
    calls.push_back({.name = "pidfd_send_signal",
                     .os_error = error_of(syscall(SYS_pidfd_send_signal, own.get(), 0, nullptr, 0))});
  return calls;
}

ConfinementReport examine_confinement(const UserReport& user) {
  return {.seccomp_mode = static_cast<int>(status_number("Seccomp", 10)),
          .calls = examine_calls(),
          .no_new_privileges = status_number("NoNewPrivs", 10) != 0,
          .container_signs = container_signs(user),
          .memory_limit_bytes = memory_limit()};
}

int try_peer_pidfd() {
  constexpr int kSoPeerPidfd = 77;  // SO_PEERPIDFD, asm-generic/socket.h since 6.5
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return errno;
  const UniqueFd first(ends[0]);
  const UniqueFd second(ends[1]);
  int fd = -1;
  socklen_t size = sizeof fd;
  if (getsockopt(first.get(), SOL_SOCKET, kSoPeerPidfd, &fd, &size) != 0) return errno;
  const UniqueFd pidfd(fd);
  return 0;
}

}  // namespace

DoctorReport examine_machine() {
  utsname names{};
  uname(&names);
  const UserReport user = examine_user();
  const auto everybody = read_number("/proc/sys/vm/unprivileged_userfaultfd");
  return {
      .kernel_release = names.release,
      .machine = names.machine,
      .kernel = probe_kernel(),
      .user = user,
      .unprivileged_userfaultfd = everybody ? std::optional<int>(static_cast<int>(*everybody)) : std::nullopt,
      .device = examine_device(),
      .huge_pages = examine_huge_pages(),
      .thp = read_choice("/sys/kernel/mm/transparent_hugepage/enabled"),
      .shmem_thp = read_choice("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
      .kvm = examine_kvm(),
      .descriptors = examine_limit(RLIMIT_NOFILE),
      .locked_bytes = examine_limit(RLIMIT_MEMLOCK),
      .map_count_max = read_number("/proc/sys/vm/max_map_count").value_or(0),
      .confinement = examine_confinement(user),
      .pidfd_open_error = try_pidfd_open(),
      .peer_pidfd_error = try_peer_pidfd()};
}

}  // namespace uffdkit::tool
