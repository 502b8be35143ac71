// Many resumes of one snapshot at once, each in a process of its own, as a host runs its virtual machines.
#pragma once

#include <chrono>
#include <optional>
#include <vector>

#include "resume.h"

namespace tinyvmm {

/// Resumes `count` clones at once and gives a report of each, also of those that were killed. Clones die with
/// this process. With a time limit those that have not reported when it is over are killed and say so.
std::vector<CloneReport> resume_clones(const ResumeOptions& options, const SavedMachine& machine,
                                       unsigned count, Clock::time_point start,
                                       std::optional<std::chrono::seconds> time_limit);

}  // namespace tinyvmm
