#include "clones.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <nlohmann/json.hpp>

namespace tinyvmm {
namespace {

// A clone tells its report as JSON text through a pipe, and closes it.
struct Clone {
  pid_t pid = -1;
  Fd pipe;
  std::string text;
  bool finished = false;
  bool timed_out = false;
  std::string start_error;
};

[[noreturn]] void be_clone(const ResumeOptions& options, const SavedMachine& machine, unsigned index,
                           Clock::time_point start, pid_t parent, const Fd& pipe) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(EXIT_FAILURE);  // the parent died before prctl
  CloneReport report = resume_clone(options, machine, start);
  report.clone = index;
  const std::string text =
      nlohmann::ordered_json(report).dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  for (std::size_t done = 0; done < text.size();) {
    const ssize_t written = write(pipe.get(), text.data() + done, text.size() - done);
    if (written < 0 && errno != EINTR) _exit(EXIT_FAILURE);
    if (written > 0) done += static_cast<std::size_t>(written);
  }
  _exit(EXIT_SUCCESS);
}

Clone start_clone(const ResumeOptions& options, const SavedMachine& machine, unsigned index,
                  Clock::time_point start) {
  Clone clone;
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) {
    clone.start_error = fmt::format("cannot make a pipe: {}", reason(errno));
    return clone;
  }
  clone.pipe = Fd(ends[0]);
  const Fd clone_end(ends[1]);
  const pid_t parent = getpid();
  clone.pid = fork();
  if (clone.pid == 0) be_clone(options, machine, index, start, parent, clone_end);
  if (clone.pid < 0) clone.start_error = fmt::format("cannot make a process: {}", reason(errno));
  return clone;
}

int poll_ms(Clock::time_point deadline) {
  if (deadline == Clock::time_point::max()) return -1;
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<std::chrono::milliseconds::rep>(left, 0, 1 << 30));
}

// Collects what the clones say until all have closed their pipes, which they do at the latest by dying.
void listen_to(std::vector<Clone>& clones, Clock::time_point deadline) {
  while (true) {
    std::vector<pollfd> polled;
    std::vector<Clone*> speakers;
    for (Clone& clone : clones) {
      if (clone.pid < 0 || clone.finished) continue;
      polled.push_back({.fd = clone.pipe.get(), .events = POLLIN, .revents = 0});
      speakers.push_back(&clone);
    }
    if (polled.empty()) return;
    const int ready = poll(polled.data(), polled.size(), poll_ms(deadline));
    if (ready == 0) {
      for (Clone* clone : speakers) {
        clone->timed_out = true;
        kill(clone->pid, SIGKILL);
      }
      deadline = Clock::time_point::max();  // their pipes close now
    }
    for (std::size_t i = 0; ready > 0 && i < polled.size(); ++i) {
      if (polled[i].revents == 0) continue;
      char bytes[4096];
      const ssize_t got = read(polled[i].fd, bytes, sizeof bytes);
      if (got > 0) speakers[i]->text.append(bytes, static_cast<std::size_t>(got));
      if (got == 0) speakers[i]->finished = true;
    }
  }
}

CloneReport report_of(const Clone& clone, unsigned index) {
  int status = 0;
  if (clone.pid > 0) {
    while (waitpid(clone.pid, &status, 0) < 0 && errno == EINTR) {
    }
  }
  const auto json = nlohmann::ordered_json::parse(clone.text, nullptr, false);
  if (!json.is_discarded()) return json.get<CloneReport>();

  CloneReport report;
  report.clone = index;
  report.pid = clone.pid;
  if (!clone.start_error.empty()) {
    report.error = clone.start_error;
  } else if (clone.timed_out) {
    report.error = "did not finish in the time allowed; is its page fault server alive?";
  } else if (WIFSIGNALED(status)) {
    report.error = fmt::format("killed by signal {} ({})", WTERMSIG(status), sigdescr_np(WTERMSIG(status)));
  } else {
    report.error = fmt::format("ended without a report, exit status {}", WEXITSTATUS(status));
  }
  return report;
}

}  // namespace

std::vector<CloneReport> resume_clones(const ResumeOptions& options, const SavedMachine& machine,
                                       unsigned count, Clock::time_point start,
                                       std::optional<std::chrono::seconds> time_limit) {
  std::vector<Clone> clones;
  clones.reserve(count);
  for (unsigned i = 0; i < count; ++i) clones.push_back(start_clone(options, machine, i, start));
  listen_to(clones, time_limit ? start + *time_limit : Clock::time_point::max());
  std::vector<CloneReport> reports;
  reports.reserve(count);
  for (unsigned i = 0; i < count; ++i) reports.push_back(report_of(clones[i], i));
  return reports;
}

}  // namespace tinyvmm
