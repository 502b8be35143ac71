// The report for programs. man/uffdkit-doctor.1 describes the keys.
#include <fmt/format.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "tool/doctor_report.h"

namespace uffdkit::tool {
namespace {

using nlohmann::json;

const char* way_key(CreateWay way) {
  switch (way) {
    case CreateWay::device:
      return "device";
    case CreateWay::system_call:
      return "system-call";
    case CreateWay::device_user_mode:
      return "device-user-mode";
    case CreateWay::user_mode:
      return "system-call-user-mode";
  }
  return "?";
}

json ways_json(const std::vector<CreateAttempt>& ways) {
  json all = json::array();
  for (const CreateAttempt& attempt : ways)
    all.push_back({{"way", way_key(attempt.way)},
                   {"works", attempt.os_error == 0},
                   {"errno", attempt.os_error},
                   {"reason", attempt.reason},
                   {"remedy", attempt.remedy}});
  return all;
}

json features_json(Features features) {
  json known = json::array();
  for (const FeatureInfo& info : known_features())
    known.push_back({{"name", info.name},
                     {"since", info.since},
                     {"what", info.what},
                     {"available", features.has(info.bit)}});
  json unknown = json::array();
  for (unsigned bit = 0; bit < 64; ++bit)
    if ((features.bits & ~abi::kFeaturesKnown) >> bit & 1) unknown.push_back(bit);
  return {{"mask", features.bits}, {"known", known}, {"unknown_bits", unknown}};
}

json memory_json(const std::vector<MemoryProbe>& memory) {
  json all = json::array();
  for (const MemoryProbe& probe : memory) {
    json modes = json::array();
    for (const RegisterProbe& mode : probe.modes)
      modes.push_back({{"modes", to_string(mode.modes)},
                       {"asynchronous", mode.asynchronous},
                       {"registers", mode.os_error == 0},
                       {"errno", mode.os_error},
                       {"ioctl_mask", mode.ioctls.bits},
                       {"ioctls", to_string(mode.ioctls)}});
    all.push_back({{"memory", probe.name}, {"lacking", probe.lacking}, {"tries", modes}});
  }
  return all;
}

json works_json(int os_error) {
  return {{"works", os_error == 0}, {"errno", os_error}};
}

// No limit is null.
json limit_json(const LimitReport& limit) {
  const auto value = [](std::uint64_t number) { return number == UINT64_MAX ? json() : json(number); };
  return {{"soft", value(limit.soft)}, {"hard", value(limit.hard)}};
}

json answers_json(std::span<const NeedAnswer> answers) {
  json all = json::array();
  for (const NeedAnswer& answer : answers)
    all.push_back(
        {{"need", answer.need}, {"met", answer.met}, {"reason", answer.reason}, {"remedy", answer.remedy}});
  return all;
}

json calls_json(const std::vector<CallReport>& calls) {
  json all = json::array();
  for (const CallReport& call : calls)
    all.push_back({{"name", call.name}, {"works", call.os_error == 0}, {"errno", call.os_error}});
  return all;
}

json pools_json(const std::vector<HugePagePool>& pools) {
  json all = json::array();
  for (const HugePagePool& pool : pools)
    all.push_back({{"page_kib", pool.page_kib}, {"pages", pool.pages}, {"free", pool.free}});
  return all;
}

}  // namespace

json doctor_json(const DoctorReport& report, std::span<const NeedAnswer> answers) {
  const ConfinementReport& confinement = report.confinement;
  json document = {{"kernel", {{"release", report.kernel_release}, {"machine", report.machine}}},
                   {"user",
                    {{"uid", report.user.uid},
                     {"name", report.user.name},
                     {"cap_sys_ptrace", report.user.cap_sys_ptrace},
                     {"initial_user_namespace", report.user.initial_user_namespace}}},
                   {"ways", ways_json(report.kernel.ways)},
                   {"unprivileged_userfaultfd",
                    report.unprivileged_userfaultfd ? json(*report.unprivileged_userfaultfd) : json()},
                   {"device",
                    {{"exists", report.device.exists},
                     {"owner", report.device.owner},
                     {"group", report.device.group},
                     {"mode", fmt::format("{:04o}", report.device.mode)}}},
                   {"features", features_json(report.kernel.features)},
                   {"fork_events_permitted", report.kernel.fork_events_permitted},
                   {"memory", memory_json(report.kernel.memory)},
                   {"pagemap_scan", works_json(report.kernel.pagemap_scan_error)},
                   {"huge_pages", pools_json(report.huge_pages)},
                   {"transparent_huge_pages", {{"anonymous", report.thp}, {"shmem", report.shmem_thp}}},
                   {"kvm",
                    {{"works", report.kvm.os_error == 0},
                     {"errno", report.kvm.os_error},
                     {"api_version", report.kvm.api_version}}},
                   {"limits",
                    {{"descriptors", limit_json(report.descriptors)},
                     {"locked_bytes", limit_json(report.locked_bytes)},
                     {"map_count_max", report.map_count_max}}},
                   {"confinement",
                    {{"seccomp_mode", confinement.seccomp_mode},
                     {"system_calls", calls_json(confinement.calls)},
                     {"no_new_privileges", confinement.no_new_privileges},
                     {"container_signs", confinement.container_signs},
                     {"memory_limit_bytes",
                      confinement.memory_limit_bytes ? json(*confinement.memory_limit_bytes) : json()}}},
                   {"processes",
                    {{"pidfd_open", works_json(report.pidfd_open_error)},
                     {"peer_pidfd", works_json(report.peer_pidfd_error)}}},
                   {"advice", answers_json(advise(report))}};
  if (!answers.empty()) document["needs"] = answers_json(answers);
  return document;
}

}  // namespace uffdkit::tool
