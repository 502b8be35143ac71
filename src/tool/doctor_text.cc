// The report for people.
#include <fmt/format.h>

#include <array>
#include <cstring>
#include <iterator>

#include "tool/doctor_report.h"

// NOLINTBEGIN(concurrency-mt-unsafe): the doctor has one thread.

namespace uffdkit::tool {
namespace {

constexpr std::size_t kColumns = 100;
constexpr std::size_t kValueColumn = 28;

using Text = std::back_insert_iterator<std::string>;

void heading(Text out, std::string_view title) {
  fmt::format_to(out, "\n{}\n", title);
}

// "  key                 value", the value's further lines below its first.
void row(Text out, std::string_view key, std::string_view value) {
  const std::string lines = wrapped(value, kValueColumn);
  fmt::format_to(out, "  {:{}}{}\n", key, kValueColumn - 2, std::string_view(lines).substr(kValueColumn));
}

// A lack and, below, what to do about it.
void refusal(Text out, std::string_view key, std::string_view reason, std::string_view remedy) {
  row(out, key, reason);
  fmt::format_to(out, "{}\n", wrapped(fmt::format("-> {}", remedy), kValueColumn));
}

std::string works(int os_error) {
  return os_error == 0 ? "works" : fmt::format("no: {}", std::strerror(os_error));
}

std::string limit(std::uint64_t number) {
  return number == UINT64_MAX ? "unlimited" : std::to_string(number);
}

void print_user(Text out, const DoctorReport& report) {
  const UserReport& user = report.user;
  row(out, "kernel", fmt::format("Linux {} {}", report.kernel_release, report.machine));
  row(out, "user",
      fmt::format("{} (uid {}), {} CAP_SYS_PTRACE, {}", user.name.empty() ? "without a name" : user.name,
                  user.uid, user.cap_sys_ptrace ? "with" : "without",
                  user.initial_user_namespace ? "initial user namespace" : "a user namespace of its own"));
}

void print_ways(Text out, const DoctorReport& report) {
  heading(out, "Ways to create a userfaultfd");
  for (const CreateAttempt& attempt : report.kernel.ways) {
    // Longer than the column of keys, so it gets a line of its own.
    fmt::format_to(out, "  {}: {}\n", to_string(attempt.way), attempt.os_error == 0 ? "works" : "refused");
    if (attempt.os_error == 0) continue;
    fmt::format_to(out, "{}\n", wrapped(attempt.reason, 6));
    fmt::format_to(out, "{}\n", wrapped("-> " + attempt.remedy, 6));
  }
  row(out, "unprivileged_userfaultfd",
      report.unprivileged_userfaultfd ? std::to_string(*report.unprivileged_userfaultfd) : "no such sysctl");
  const DeviceReport& device = report.device;
  row(out, abi::kDevicePath,
      device.exists ? fmt::format("{}:{} {:04o}", device.owner, device.group, device.mode)
                    : "does not exist");
}

void print_features(Text out, const DoctorReport& report) {
  heading(out, "Features of the kernel");
  for (const FeatureInfo& info : known_features()) {
    const bool available = report.kernel.features.has(info.bit);
    fmt::format_to(out, "  {:3}  {:20}{:6}{}\n", available ? "yes" : "no", info.name, info.since, info.what);
  }
  const Features unknown = report.kernel.features - Features(abi::kFeaturesKnown);
  if (!unknown.empty()) fmt::format_to(out, "  yes  {} (newer than this program)\n", to_string(unknown));
  fmt::format_to(out, "  {:3}  {:20}{:6}{}\n", report.kernel.pagemap_scan_error == 0 ? "yes" : "no",
                 "PAGEMAP_SCAN", "6.7", "find and re-arm written pages in one call");
}

// One letter for each ioctl, in the order of the kernel's bits.
std::string ioctl_letters(RangeIoctls ioctls) {
  constexpr std::array<std::pair<std::uint64_t, char>, 6> kLetters = {{{abi::kHasCopy, 'C'},
                                                                       {abi::kHasZeropage, 'Z'},
                                                                       {abi::kHasMove, 'M'},
                                                                       {abi::kHasWriteprotect, 'W'},
                                                                       {abi::kHasContinue, 'R'},
                                                                       {abi::kHasPoison, 'P'}}};
  std::string letters;
  for (const auto& [bit, letter] : kLetters)
    if (ioctls.has(RangeIoctls(bit))) letters += letter;
  return letters;
}

void print_memory(Text out, const DoctorReport& report) {
  heading(out, "Memory that can be registered, and for which faults");
  if (report.kernel.memory.empty()) {
    fmt::format_to(out, "  not tried: no userfaultfd can be made\n");
    return;
  }
  fmt::format_to(out, "  {:18}{:12}{:12}{:12}{:13}{:15}{}\n", "", "missing", "wp", "minor", "missing|wp",
                 "missing|minor", "wp async");
  constexpr std::array<int, 6> kWidths = {12, 12, 12, 13, 15, 0};
  for (const MemoryProbe& probe : report.kernel.memory) {
    std::string line = fmt::format("  {:18}", probe.name);
    if (!probe.lacking.empty()) line += "not tried: " + probe.lacking;
    for (std::size_t i = 0; i < probe.modes.size(); ++i)
      line += fmt::format("{:{}}", probe.modes[i].os_error == 0 ? ioctl_letters(probe.modes[i].ioctls) : "-",
                          kWidths.at(i));
    fmt::format_to(out, "{}\n", line.substr(0, line.find_last_not_of(' ') + 1));
  }
  fmt::format_to(out, "{}\n",
                 wrapped("C copy, Z zeropage, M move, W writeprotect, R continue (resume), P poison, as the "
                         "kernel reports them, which is optimistic (move works on anonymous memory only); "
                         "- refused",
                         2));
}

void print_huge_pages(Text out, const DoctorReport& report) {
  heading(out, "Huge pages");
  for (const HugePagePool& pool : report.huge_pages)
    row(out, fmt::format("pool of {} KiB pages", pool.page_kib),
        fmt::format("{} pages, {} free", pool.pages, pool.free));
  row(out, "transparent, anonymous", report.thp.empty() ? "not in this kernel" : report.thp);
  row(out, "transparent, shmem", report.shmem_thp.empty() ? "not in this kernel" : report.shmem_thp);
  fmt::format_to(
      out, "{}\n",
      wrapped("With huge pages in shmem (always, within_size) a small write to a memory file can bring "
              "in a whole huge page, whose other pages then read as zero without a missing fault.",
              kValueColumn));
}

// "a filter is active; no new privileges; refuses openat2".
std::string confinement_text(const ConfinementReport& confinement) {
  constexpr std::array<const char*, 3> kSeccomp = {"none", "strict", "a filter is active"};
  const auto mode = static_cast<std::size_t>(confinement.seccomp_mode);
  std::string text = mode < kSeccomp.size() ? kSeccomp[mode] : "unknown";
  if (confinement.no_new_privileges) text += "; no new privileges";
  std::string refused;
  for (const CallReport& call : confinement.calls)
    if (call.is_refused()) refused += (refused.empty() ? "" : ", ") + call.name;
  if (!refused.empty()) text += "; refused: " + refused;
  if (refused.empty() && confinement.seccomp_mode != 0) text += "; no call that serving needs is refused";
  return text;
}

void print_machine(Text out, const DoctorReport& report) {
  heading(out, "Machine and limits");
  row(out, "/dev/kvm",
      report.kvm.os_error == 0 ? fmt::format("works, API version {}", report.kvm.api_version)
                               : works(report.kvm.os_error));
  row(out, "RLIMIT_NOFILE",
      fmt::format("{} (at most {})", limit(report.descriptors.soft), limit(report.descriptors.hard)));
  row(out, "RLIMIT_MEMLOCK",
      fmt::format("{} bytes (at most {})", limit(report.locked_bytes.soft), limit(report.locked_bytes.hard)));
  row(out, "vm.max_map_count", std::to_string(report.map_count_max));
  row(out, "pidfd_open", works(report.pidfd_open_error));
  row(out, "SO_PEERPIDFD", works(report.peer_pidfd_error));
  row(out, "seccomp", confinement_text(report.confinement));
  row(out, "signs of a container",
      report.confinement.container_signs.empty()
          ? "none"
          : fmt::format("{}", fmt::join(report.confinement.container_signs, ", ")));
  const auto memory = report.confinement.memory_limit_bytes;
  row(out, "cgroup memory limit", memory ? fmt::format("{} MiB", *memory >> 20) : "none");
}

void print_advice(Text out, const DoctorReport& report) {
  heading(out, "What is not there, and what to do");
  const std::vector<NeedAnswer> advice = advise(report);
  if (advice.empty()) fmt::format_to(out, "  nothing is missing\n");
  for (const NeedAnswer& answer : advice) refusal(out, answer.need, answer.reason, answer.remedy);
}

void wrap_line(std::string& out, std::string_view line, std::size_t indent) {
  std::size_t column = 0;
  while (!line.empty()) {
    const std::size_t end = std::min(line.find(' '), line.size());
    const std::string_view word = line.substr(0, end);
    line.remove_prefix(std::min(end + 1, line.size()));
    if (column == 0 || column + 1 + word.size() > kColumns) {
      if (!out.empty()) out += '\n';
      out.append(indent, ' ');
      column = indent;
    } else {
      out += ' ';
      ++column;
    }
    out += word;
    column += word.size();
  }
}

}  // namespace

std::string wrapped(std::string_view text, std::size_t indent) {
  std::string out;
  while (true) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    wrap_line(out, text.substr(0, end), indent);
    if (end == text.size()) return out;
    text.remove_prefix(end + 1);
  }
}

std::string doctor_text(const DoctorReport& report) {
  std::string text;
  const Text out(text);
  print_user(out, report);
  print_ways(out, report);
  print_features(out, report);
  print_memory(out, report);
  print_huge_pages(out, report);
  print_machine(out, report);
  print_advice(out, report);
  return text;
}

}  // namespace uffdkit::tool

// NOLINTEND(concurrency-mt-unsafe)
