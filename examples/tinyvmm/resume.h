// A resumed guest's life: its memory is read or handed over, it wakes, and it verifies all that it should
// hold.
#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "result.h"
#include "snapshot.h"

namespace tinyvmm {

using Clock = std::chrono::steady_clock;

struct ResumeOptions {
  std::filesystem::path directory;
  std::optional<std::filesystem::path> uffd_socket;  // none: all memory is read first
  unsigned region_count = 1;
  unsigned touch_percent = 100;
  unsigned thread_count = 2;  // of a guest without KVM
  bool kvm = true;
  bool huge_pages = false;
  bool balloon = false;
};

struct CloneReport {
  unsigned clone = 0;
  int pid = 0;
  std::optional<double> first_instruction_ms;  // both since `start`
  std::optional<double> done_ms;
  std::uint64_t pages_walked = 0;
  std::uint64_t pages_zero = 0;
  std::uint64_t pages_ballooned = 0;
  std::uint32_t checksum = 0;
  std::string error;  // empty: everything was verified
};

void to_json(nlohmann::ordered_json& json, const CloneReport& report);
void from_json(const nlohmann::ordered_json& json, CloneReport& report);

/// Resumes the machine in this process and lets its guest do its work. `start` is when the resume began.
CloneReport resume_clone(const ResumeOptions& options, const SavedMachine& machine, Clock::time_point start);

}  // namespace tinyvmm
