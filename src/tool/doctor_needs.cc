// What was asked for, held against what is there.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "tool/doctor_report.h"

// NOLINTBEGIN(concurrency-mt-unsafe): the doctor has one thread.

namespace uffdkit::tool {
namespace {

NeedAnswer met(std::string_view need) {
  return {.need = std::string(need), .met = true, .reason = {}, .remedy = {}};
}

NeedAnswer lacking(std::string_view need, std::string reason, std::string remedy) {
  return {.need = std::string(need), .met = false, .reason = std::move(reason), .remedy = std::move(remedy)};
}

bool sees_kernel_faults(CreateWay way) {
  return way == CreateWay::device || way == CreateWay::system_call;
}

NeedAnswer answer_faults(std::string_view need, const DoctorReport& report, bool in_kernel) {
  std::string reasons;
  std::string remedies;
  for (const CreateAttempt& attempt : report.kernel.ways) {
    if (in_kernel && !sees_kernel_faults(attempt.way)) continue;
    if (attempt.os_error == 0) return met(need);
    reasons += fmt::format("{}{}: {}", reasons.empty() ? "" : "; ", to_string(attempt.way), attempt.reason);
    remedies += fmt::format("{}{}: {}", remedies.empty() ? "" : "\n", to_string(attempt.way), attempt.remedy);
  }
  return lacking(need, reasons, remedies);
}

NeedAnswer answer_feature(std::string_view need, const DoctorReport& report, Features feature) {
  if (NeedAnswer any = answer_faults(need, report, false); !any.met) {
    any.reason = "no userfaultfd can be made: " + any.reason;
    return any;
  }
  if (report.kernel.features.has(feature)) return met(need);
  const auto known = known_features();
  const auto info = std::ranges::find(known, feature, &FeatureInfo::bit);
  return lacking(need,
                 fmt::format("Linux {} lacks the userfaultfd feature {}", report.kernel_release, info->name),
                 fmt::format("use Linux {} or newer, on an architecture that has it", info->since));
}

// A feature, and memory on which it was seen to work.
NeedAnswer answer_registration(std::string_view need, const DoctorReport& report, Features feature,
                               std::string_view memory, RegisterModes modes, bool asynchronous) {
  if (NeedAnswer has_feature = answer_feature(need, report, feature); !has_feature.met) return has_feature;
  for (const MemoryProbe& probe : report.kernel.memory) {
    if (probe.name != memory) continue;
    for (const RegisterProbe& mode : probe.modes)
      if (mode.modes == modes && mode.asynchronous == asynchronous && mode.os_error == 0) return met(need);
  }
  return lacking(
      need,
      fmt::format("the kernel reports it, but refuses to register {} memory for {}", memory,
                  to_string(modes)),
      "use a kernel built with CONFIG_HAVE_ARCH_USERFAULTFD_WP and CONFIG_HAVE_ARCH_USERFAULTFD_MINOR");
}

NeedAnswer answer_fork_events(std::string_view need, const DoctorReport& report) {
  NeedAnswer feature = answer_feature(need, report, Features(abi::kFeatureEventFork));
  if (!feature.met || report.kernel.fork_events_permitted) return feature;
  return lacking(
      need,
      "enabling event-fork needs CAP_SYS_PTRACE in the initial user namespace, however the userfaultfd is "
      "made",
      "give the program the capability: setcap cap_sys_ptrace+ep PROGRAM, or AmbientCapabilities= in its "
      "unit");
}

NeedAnswer answer_huge_pages(std::string_view need, const DoctorReport& report) {
  if (report.huge_pages.empty())
    return lacking(need, "the kernel has no huge page pools", "use a kernel with CONFIG_HUGETLBFS");
  for (const HugePagePool& pool : report.huge_pages)
    if (pool.free > 0) return met(need);
  return lacking(
      need, "no pool has a free huge page",
      "as root: sysctl vm.nr_hugepages=N; at boot, when memory is not yet fragmented: hugepages=N");
}

NeedAnswer answer_kvm(std::string_view need, const DoctorReport& report) {
  if (report.kvm.os_error == 0) return met(need);
  if (report.kvm.os_error == EACCES || report.kvm.os_error == EPERM)
    return lacking(
        need, "no permission to open /dev/kvm",
        "add the user to the device's group (usermod -aG kvm USER); in a container, allow the device");
  if (report.kvm.os_error == ENOENT || report.kvm.os_error == ENODEV || report.kvm.os_error == ENXIO)
    return lacking(
        need, "/dev/kvm does not work or does not exist",
        "load kvm_intel or kvm_amd and turn virtualisation on in the firmware; in a virtual machine, "
        "its host must allow nesting; in a container, pass the device in (docker run --device /dev/kvm)");
  return lacking(need, fmt::format("/dev/kvm: {}", std::strerror(report.kvm.os_error)), "see the kernel log");
}

NeedAnswer answer_pagemap_scan(std::string_view need, const DoctorReport& report) {
  switch (report.kernel.pagemap_scan_error) {
    case 0:
      return met(need);
    case ENOTTY:
      return lacking(need, fmt::format("Linux {} has no PAGEMAP_SCAN", report.kernel_release),
                     "use Linux 6.7 or newer");
    default:
      return lacking(need,
                     fmt::format("/proc/self/pagemap: {}", std::strerror(report.kernel.pagemap_scan_error)),
                     "mount /proc, and let the sandbox allow this file and ioctls on it");
  }
}

using Answer = NeedAnswer (*)(std::string_view need, const DoctorReport& report);
struct Ability {
  std::string_view word;
  Answer answer;
};

// The words that mean more than a bit of the kernel's.
constexpr std::array kAbilities = {
    Ability{"kernel-faults",
            [](std::string_view n, const DoctorReport& r) { return answer_faults(n, r, true); }},
    Ability{"user-faults",
            [](std::string_view n, const DoctorReport& r) { return answer_faults(n, r, false); }},
    Ability{"wp",
            [](std::string_view n, const DoctorReport& r) {
              return answer_registration(n, r, Features(abi::kFeaturePagefaultFlagWp), "anonymous",
                                         kWriteProtect, false);
            }},
    Ability{"wp-async",
            [](std::string_view n, const DoctorReport& r) {
              return answer_registration(n, r, Features(abi::kFeatureWpAsync), "anonymous", kWriteProtect,
                                         true);
            }},
    Ability{"minor",
            [](std::string_view n, const DoctorReport& r) {
              return answer_registration(n, r, Features(abi::kFeatureMinorShmem), "shmem shared", kMinor,
                                         false);
            }},
    Ability{"fork-events", answer_fork_events},
    Ability{"event-fork", answer_fork_events},
    Ability{"remove-events",
            [](std::string_view n, const DoctorReport& r) {
              return answer_feature(n, r, Features(abi::kFeatureEventRemove));
            }},
    Ability{"huge-pages", answer_huge_pages},
    Ability{"kvm", answer_kvm},
    Ability{"pagemap-scan", answer_pagemap_scan},
};

bool is_need(std::string_view word) {
  return std::ranges::find(kAbilities, word, &Ability::word) != kAbilities.end() || feature_by_name(word);
}

void advise_on_descriptors(const DoctorReport& report, std::vector<NeedAnswer>& advice) {
  // A session takes a userfaultfd, a socket, a pidfd and an image.
  constexpr std::uint64_t kEnough = 4096;
  if (report.descriptors.soft >= kEnough) return;
  advice.push_back(lacking("descriptors",
                           fmt::format("RLIMIT_NOFILE is {}: a manager with many clients needs four for each",
                                       report.descriptors.soft),
                           "ulimit -n 65536, or LimitNOFILE= in the unit"));
}

void advise_on_shmem_thp(const DoctorReport& report, std::vector<NeedAnswer>& advice) {
  if (report.shmem_thp != "always" && report.shmem_thp != "within_size" && report.shmem_thp != "force")
    return;
  advice.push_back(lacking(
      "shmem huge pages",
      fmt::format(
          "shmem_enabled is {}: a write of a few bytes to a memory file may bring in a whole huge page, "
          "whose other pages then read as zero without a fault",
          report.shmem_thp),
      "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled, or register for missing|minor "
      "there"));
}

void advise_on_map_count(const DoctorReport& report, std::vector<NeedAnswer>& advice) {
  constexpr std::uint64_t kDefault = 65530;  // of every kernel
  if (report.map_count_max == 0 || report.map_count_max >= kDefault) return;
  advice.push_back(
      lacking("mappings",
              fmt::format("vm.max_map_count is {}: registering parts of a mapping splits it, and "
                          "a split beyond the limit fails with ENOMEM",
                          report.map_count_max),
              fmt::format("sysctl vm.max_map_count={}", kDefault)));
}

// A filter that refuses more than it must is what containers and units most often have.
void advise_on_seccomp(const DoctorReport& report, std::vector<NeedAnswer>& advice) {
  constexpr int kFilter = 2;
  std::string refused;
  for (const CallReport& call : report.confinement.calls)
    if (call.is_refused())
      refused +=
          fmt::format("{}{} ({})", refused.empty() ? "" : ", ", call.name, std::strerror(call.os_error));
  if (report.confinement.seccomp_mode != kFilter || refused.empty()) return;
  advice.push_back(
      lacking("seccomp", fmt::format("a seccomp filter is active, and these system calls fail: {}", refused),
              "allow them in its profile: docker run --security-opt seccomp=PROFILE, seccompProfile in a "
              "pod's securityContext, SystemCallFilter= in a unit"));
}

void advise_on_device(const DoctorReport& report, std::vector<NeedAnswer>& advice) {
  const auto& ways = report.kernel.ways;
  const auto device = std::ranges::find(ways, CreateWay::device, &CreateAttempt::way);
  // A file's permissions are EACCES.
  if (device == ways.end() || device->os_error != EPERM) return;
  advice.push_back(lacking(
      "device",
      fmt::format("{} is refused whatever its permissions are: by the container's device cgroup, or a "
                  "security module",
                  abi::kDevicePath),
      "docker run --device /dev/userfaultfd; DeviceAllow=/dev/userfaultfd rw in a unit"));
}

void advise_on_processes(const DoctorReport& report, std::vector<NeedAnswer>& advice) {
  if (report.pidfd_open_error != 0)
    advice.push_back(lacking("pidfd_open",
                             fmt::format("pidfd_open: {}: a client's death would go unseen",
                                         std::strerror(report.pidfd_open_error)),
                             "use Linux 5.3 or newer, and a seccomp profile that allows pidfd_open"));
  if (report.peer_pidfd_error != 0)
    advice.push_back(
        lacking("SO_PEERPIDFD",
                fmt::format("SO_PEERPIDFD: {}: a client is found by its process number, which may "
                            "have been given to another by then",
                            std::strerror(report.peer_pidfd_error)),
                "use Linux 6.5 or newer"));
}

}  // namespace

bool CallReport::is_refused() const {
  return os_error == EPERM || os_error == EACCES || os_error == ENOSYS;
}

std::vector<std::string> need_words() {
  std::vector<std::string> words;
  words.reserve(kAbilities.size() + known_features().size());
  for (const Ability& ability : kAbilities) words.emplace_back(ability.word);
  for (const FeatureInfo& info : known_features())
    if (std::ranges::find(words, info.name) == words.end()) words.emplace_back(info.name);
  return words;
}

Result<std::vector<std::string>> parse_needs(std::string_view list) {
  std::vector<std::string> needs;
  for (std::size_t first = 0; first <= list.size();) {
    const std::size_t end = std::min(list.find(',', first), list.size());
    const std::string word(list.substr(first, end - first));
    if (!is_need(word))
      return Failure(Error(fmt::format("unknown ability '{}'", word), EINVAL)
                         .with_remedy(fmt::format("abilities: {}", fmt::join(need_words(), ", "))));
    needs.push_back(word);
    first = end + 1;
  }
  return needs;
}

NeedAnswer answer_need(std::string_view need, const DoctorReport& report) {
  const auto ability = std::ranges::find(kAbilities, need, &Ability::word);
  if (ability != kAbilities.end()) return ability->answer(need, report);
  // Of no word but these is it asked.
  return answer_feature(need, report, feature_by_name(need).value_or(Features()));
}

std::vector<NeedAnswer> advise(const DoctorReport& report) {
  std::vector<NeedAnswer> advice;
  for (const char* need : {"kernel-faults", "wp", "wp-async", "minor", "poison", "move", "fork-events",
                           "remove-events", "pagemap-scan", "huge-pages", "kvm"})
    if (NeedAnswer answer = answer_need(need, report); !answer.met) advice.push_back(std::move(answer));
  advise_on_seccomp(report, advice);
  advise_on_device(report, advice);
  advise_on_processes(report, advice);
  advise_on_descriptors(report, advice);
  advise_on_map_count(report, advice);
  advise_on_shmem_thp(report, advice);
  return advice;
}

}  // namespace uffdkit::tool

// NOLINTEND(concurrency-mt-unsafe)
