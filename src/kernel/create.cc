// Creating a userfaultfd: the ladder of ways, what each refusal means, and the handshake with UFFDIO_API.
#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/uffd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <string_view>

namespace uffdkit {
namespace {

constexpr std::array kWays = {CreateWay::device, CreateWay::system_call, CreateWay::device_user_mode,
                              CreateWay::user_mode};

bool handles_kernel_faults(CreateWay way) {
  return way == CreateWay::device || way == CreateWay::system_call;
}

bool uses_device(CreateWay way) {
  return way == CreateWay::device || way == CreateWay::device_user_mode;
}

// A descriptor, or -errno.
int create_by(CreateWay way, int flags, SystemCalls& system) {
  if (!handles_kernel_faults(way)) flags |= abi::kUserModeOnly;
  if (!uses_device(way)) return system.userfaultfd(flags);
  const int device = system.open(abi::kDevicePath, O_RDONLY | O_CLOEXEC);
  if (device < 0) return device;
  const int fd = system.ioctl(device, abi::kIocNew, static_cast<std::uintptr_t>(flags));
  system.close(device);
  return fd;
}

CreateAttempt explain_device(CreateWay way, int os_error) {
  CreateAttempt attempt{.way = way, .os_error = os_error, .reason = {}, .remedy = {}};
  switch (os_error) {
    case ENOENT:
    case ENODEV:
    case ENXIO:
      attempt.reason = fmt::format("{} does not exist", abi::kDevicePath);
      attempt.remedy =
          "use Linux 6.1 or newer with CONFIG_USERFAULTFD; in a container or jail, make the device visible "
          "there "
          "(docker run --device /dev/userfaultfd; or mknod c 10 with the minor from /proc/misc)";
      break;
    case EACCES:
    case EPERM:
      attempt.reason = fmt::format("no permission to open {}", abi::kDevicePath);
      attempt.remedy = fmt::format(
          "give the user access by a group (chgrp GROUP {0} && chmod 0660 {0}) or an ACL (setfacl -m "
          "u:USER:rw {0}); "
          "in a container, allow the device in its cgroup",
          abi::kDevicePath);
      break;
    default:
      attempt.reason = Error::from_errno(abi::kDevicePath, os_error).message();
      attempt.remedy = "see open(2) for this error";
  }
  return attempt;
}

CreateAttempt explain_system_call(CreateWay way, int os_error) {
  CreateAttempt attempt{.way = way, .os_error = os_error, .reason = {}, .remedy = {}};
  if (os_error == ENOSYS) {
    attempt.reason = "the kernel has no userfaultfd, or a seccomp filter hides it";
    attempt.remedy = "use a kernel with CONFIG_USERFAULTFD, and a seccomp profile that allows userfaultfd";
  } else if (os_error == EPERM && way == CreateWay::system_call) {
    attempt.reason =
        "not permitted: no CAP_SYS_PTRACE in the initial user namespace and "
        "vm.unprivileged_userfaultfd is 0 (or a seccomp filter refuses it)";
    attempt.remedy =
        "give the program CAP_SYS_PTRACE (setcap cap_sys_ptrace+ep PROGRAM), or for the whole machine: "
        "sysctl vm.unprivileged_userfaultfd=1; in a container, allow userfaultfd in its seccomp profile";
  } else if (os_error == EPERM) {
    attempt.reason = "not permitted, which for user-mode only means a seccomp filter or a security module";
    attempt.remedy = "allow the userfaultfd system call in the seccomp profile";
  } else if (os_error == EINVAL) {
    attempt.reason = "the kernel does not know UFFD_USER_MODE_ONLY";
    attempt.remedy = "use Linux 5.11 or newer";
  } else {
    attempt.reason = Error::from_errno("userfaultfd", os_error).message();
    attempt.remedy = "see userfaultfd(2) for this error";
  }
  return attempt;
}

CreateAttempt explain(CreateWay way, int os_error) {
  if (os_error == 0) return {.way = way, .os_error = 0, .reason = {}, .remedy = {}};
  if (os_error == EMFILE || os_error == ENFILE)
    return {.way = way,
            .os_error = os_error,
            .reason = "no free file descriptor",
            .remedy = "raise RLIMIT_NOFILE (ulimit -n, LimitNOFILE=)"};
  return uses_device(way) ? explain_device(way, os_error) : explain_system_call(way, os_error);
}

// UFFDIO_API, which succeeds only once on each descriptor.
Result<KernelFeatures> enable(int fd, Features features, SystemCalls& system) {
  abi::ApiArgs args{.api = abi::kApi, .features = features.bits, .ioctls = 0};
  const int result = system.ioctl(fd, abi::kIoctlApi, reinterpret_cast<std::uintptr_t>(&args));
  if (result >= 0) return KernelFeatures{.available = Features(args.features), .ioctls = args.ioctls};
  Error error =
      Error::from_errno(fmt::format("enable userfaultfd features ({})", to_string(features)), -result);
  if (result == -EPERM)
    error = std::move(error).with_remedy(
        "event-fork needs CAP_SYS_PTRACE in the initial user namespace: give it to the program, or do "
        "without");
  return Failure(std::move(error));
}

// The features that can be enabled through `fd` at most. Uses the descriptor up.
Result<KernelFeatures> probe_and_close(int fd, SystemCalls& system) {
  Result<KernelFeatures> kernel = enable(fd, Features(), system);
  system.close(fd);
  return kernel;
}

Result<void> check_required(Features required, Features available) {
  const Features lacking = required - available;
  if (lacking.empty()) return {};
  Error error(fmt::format("this kernel's userfaultfd lacks: {}", to_string(lacking)), ENOTSUP);
  for (const FeatureInfo& info : known_features())
    if (lacking.has(info.bit))
      error = std::move(error).with_remedy(fmt::format("{} needs Linux {} or newer", info.name, info.since));
  return Failure(std::move(error));
}

// The value of "API:" in /proc/self/fdinfo/FD, as "aa:<features>:<ioctls>"; features 0 before UFFDIO_API.
Result<std::uint64_t> features_from_fdinfo(int fd, SystemCalls& system) {
  const std::string path = fmt::format("/proc/self/fdinfo/{}", fd);
  const int info = system.open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (info < 0) return Failure(Error::from_errno("open " + path, -info));
  std::array<char, 1024> buffer;
  const std::ptrdiff_t bytes = system.read(info, buffer.data(), buffer.size());
  system.close(info);
  if (bytes < 0) return Failure(Error::from_errno("read " + path, static_cast<int>(-bytes)));

  const std::string_view text(buffer.data(), static_cast<std::size_t>(bytes));
  constexpr std::string_view kKey = "API:\taa:";
  const std::size_t key = text.find(kKey);
  if (key == std::string_view::npos) return Failure(Error("it is not a userfaultfd", EBADF));
  std::uint64_t features = 0;
  const char* first = text.data() + key + kKey.size();
  const auto [end, failed] = std::from_chars(first, text.data() + text.size(), features, 16);
  if (failed != std::errc() || end == first) return Failure(Error("cannot read " + path, EBADF));
  return features;
}

}  // namespace

std::string to_string(CreateWay way) {
  switch (way) {
    case CreateWay::device:
      return "/dev/userfaultfd";
    case CreateWay::system_call:
      return "userfaultfd system call";
    case CreateWay::device_user_mode:
      return "/dev/userfaultfd, user mode only";
    case CreateWay::user_mode:
      return "userfaultfd system call, user mode only";
  }
  return "?";
}

Result<Uffd> Uffd::create(const UffdNeeds& needs, SystemCalls& system) {
  const int flags = (needs.close_on_exec ? O_CLOEXEC : 0) | (needs.non_blocking ? O_NONBLOCK : 0);
  std::string refusals;
  std::string remedies;
  int last_error = 0;
  for (const CreateWay way :
       {CreateWay::device, CreateWay::system_call, CreateWay::user_mode, CreateWay::device_user_mode}) {
    if (needs.kernel_faults && !handles_kernel_faults(way)) continue;
    const int probe = create_by(way, flags, system);
    if (probe < 0) {
      const CreateAttempt attempt = explain(way, -probe);
      refusals += fmt::format("\n  {}: {}", to_string(way), attempt.reason);
      remedies += fmt::format("\n  {}: {}", to_string(way), attempt.remedy);
      last_error = attempt.os_error;
      continue;
    }
    const Result<KernelFeatures> kernel = probe_and_close(probe, system);
    if (!kernel) return Failure(kernel.error());
    if (auto enough = check_required(needs.required, kernel->available); !enough)
      return Failure(enough.error());

    Features chosen = needs.required | (needs.wanted & kernel->available);
    const int fd = create_by(way, flags, system);
    if (fd < 0) return Failure(Error::from_errno("create a userfaultfd by " + to_string(way), -fd));
    Uffd made(fd, chosen, way, system);
    const Result<KernelFeatures> enabled = enable(fd, chosen, system);
    if (!enabled) {
      // A wanted feature may need a capability (event-fork); a required one must not be dropped.
      const Features without_fork = chosen - Features(abi::kFeatureEventFork);
      if (enabled.error().os_error() != EPERM || !without_fork.has(needs.required))
        return Failure(enabled.error());
      chosen = without_fork;
      if (auto again = enable(fd, chosen, system); !again) return Failure(again.error());
      made.features_ = chosen;
    }
    return made;
  }

  std::string needed =
      needs.kernel_faults ? "a userfaultfd that sees faults inside the kernel" : "a userfaultfd";
  Error error(fmt::format("cannot create {}; every way was refused:{}", needed, refusals), last_error);
  error = std::move(error).with_remedy("any one of these makes it work:" + remedies);
  if (needs.kernel_faults)
    error = std::move(error).with_remedy(
        "a program whose memory is touched in user mode only may do without kernel faults "
        "(UFFD_USER_MODE_ONLY, for everybody since Linux 5.11): its system calls on missing pages then fail "
        "with "
        "EFAULT, and a KVM guest cannot run on such memory");
  return Failure(std::move(error));
}

Result<Uffd> Uffd::receive(int fd, SystemCalls& system) {
  const auto refuse = [&](Error error) -> Result<Uffd> {
    system.close(fd);
    return Failure(std::move(error).within("received descriptor"));
  };
  Result<std::uint64_t> shown = features_from_fdinfo(fd, system);
  if (!shown) return refuse(std::move(shown).error());
  const int flags = system.get_flags(fd);
  if (flags < 0) return refuse(Error::from_errno("fcntl", -flags));
  if ((flags & O_NONBLOCK) == 0)
    return refuse(Error("the userfaultfd is blocking", EINVAL)
                      .with_remedy("create it with O_NONBLOCK: poll(2) does not work on blocking ones"));
  // The kernel marks a userfaultfd whose UFFDIO_API has been done by the topmost bit of its own feature word.
  constexpr std::uint64_t kInitialised = 1u << 31;
  if ((*shown & kInitialised) == 0)
    return refuse(Error("the userfaultfd has not been enabled", EINVAL)
                      .with_remedy("call UFFDIO_API before handing it over"));
  return adopt(fd, Features(*shown & ~kInitialised), system);
}

Result<Uffd> Uffd::duplicate() const {
  const int fd = system_->duplicate(fd_);
  if (fd < 0) return Failure(Error::from_errno("duplicate a userfaultfd", -fd));
  return Uffd(fd, features_, way_, *system_);
}

std::vector<CreateAttempt> try_create_ways(SystemCalls& system) {
  std::vector<CreateAttempt> attempts;
  for (const CreateWay way : kWays) {
    const int fd = create_by(way, O_CLOEXEC, system);
    if (fd >= 0) system.close(fd);
    attempts.push_back(explain(way, fd < 0 ? -fd : 0));
  }
  return attempts;
}

Result<KernelFeatures> probe_features(SystemCalls& system) {
  int last_error = ENOSYS;
  for (const CreateWay way : kWays) {
    const int fd = create_by(way, O_CLOEXEC, system);
    if (fd >= 0) return probe_and_close(fd, system);
    last_error = -fd;
  }
  return Failure(Error::from_errno("create a userfaultfd", last_error)
                     .with_remedy("run 'uffdkit doctor' to see what every way needs"));
}

}  // namespace uffdkit
