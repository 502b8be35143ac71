// What `uffdkit doctor` finds out, as values; and what may be said of them without looking again.
#pragma once

#include <uffdkit/error.h>

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernel/probe.h"

namespace uffdkit::tool {

struct UserReport {
  std::uint32_t uid = 0;        // effective
  std::string name;             // empty if it has none
  bool cap_sys_ptrace = false;  // effective
  bool initial_user_namespace = false;
};

struct DeviceReport {  // /dev/userfaultfd
  bool exists = false;
  std::string owner;
  std::string group;
  unsigned mode = 0;  // permission bits
};

struct HugePagePool {
  std::uint64_t page_kib = 0;
  std::uint64_t pages = 0;
  std::uint64_t free = 0;  // neither used nor reserved
};

struct KvmReport {
  int os_error = 0;     // of opening /dev/kvm; 0: it is open to this user
  int api_version = 0;  // 12 on every kernel of the last decade
};

struct LimitReport {
  std::uint64_t soft = 0;  // UINT64_MAX: none
  std::uint64_t hard = 0;
};

struct CallReport {  // a system call that serving needs
  std::string name;
  int os_error = 0;  // 0: it works
  // Whether that is how filters, containers and security modules refuse a call.
  bool is_refused() const;
};

struct ConfinementReport {
  int seccomp_mode = 0;  // 0 none, 1 strict, 2 filter
  std::vector<CallReport> calls;
  bool no_new_privileges = false;
  std::vector<std::string> container_signs;
  std::optional<std::uint64_t> memory_limit_bytes;  // the cgroups' tightest
};

struct DoctorReport {
  std::string kernel_release;
  std::string machine;
  KernelProbe kernel;
  UserReport user;
  std::optional<int> unprivileged_userfaultfd;  // the sysctl; nothing before Linux 5.2
  DeviceReport device;
  std::vector<HugePagePool> huge_pages;
  std::string thp;        // "always", "madvise" or "never"; empty if the kernel has none
  std::string shmem_thp;  // likewise, of memory files
  KvmReport kvm;
  LimitReport descriptors;          // RLIMIT_NOFILE
  LimitReport locked_bytes;         // RLIMIT_MEMLOCK
  std::uint64_t map_count_max = 0;  // vm.max_map_count
  ConfinementReport confinement;
  int pidfd_open_error = 0;  // errno; 0: it works
  int peer_pidfd_error = 0;  // of SO_PEERPIDFD
};

// Looks at everything. Changes nothing.
DoctorReport examine_machine();

// ---- asked-for abilities (pure) -------------------------------------------------------------------------

struct NeedAnswer {
  std::string need;
  bool met;
  std::string reason;  // why not; empty if met
  std::string remedy;  // what to do; empty if met
};

// Every word that a list of needs may hold.
std::vector<std::string> need_words();
// The words of a comma-separated list. Errors: an empty or unknown word; the remedy lists all.
Result<std::vector<std::string>> parse_needs(std::string_view list);
// Whether `need`, one of need_words(), is there.
NeedAnswer answer_need(std::string_view need, const DoctorReport& report);

// What lacks or may hurt on this machine, each with its remedy, whether or not anybody asked for it.
std::vector<NeedAnswer> advise(const DoctorReport& report);

// ---- printing (pure) ------------------------------------------------------------------------------------

// For people, at most 100 columns wide.
std::string doctor_text(const DoctorReport& report);
// For programs. `answers` is left out if it is empty.
nlohmann::json doctor_json(const DoctorReport& report, std::span<const NeedAnswer> answers);
// "  text..." broken at spaces so that no line is longer than 100 columns unless one word is; every line is
// indented.
std::string wrapped(std::string_view text, std::size_t indent);

}  // namespace uffdkit::tool
