#include "manager/keeper.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdlib>
#include <fstream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/process.h"
#include "base/step.h"

// NOLINTBEGIN(concurrency-mt-unsafe): a keeper has one thread, and so has a worker that it has just made.

namespace uffdkit {
namespace {

// Tells the program that replaces this one which descriptor is that of the records.
constexpr const char* kRecordsVariable = "UFFDKIT_RECORDS";
// A worker that crashes is started again after a pause, which doubles up to 3.2 s. One that was killed is
// started at once, unless that happens again and again before it serves.
constexpr std::int64_t kCrashPauseNs = 100'000'000;
constexpr unsigned kCrashDoublingsMax = 5;
constexpr unsigned kKillsAtOnce = 3;
// How soon a standby that could not be started is tried again.
constexpr std::int64_t kStandbyPauseNs = 200'000'000;
// How often it is looked whether a new worker has gone through the descriptors.
constexpr int kLookMs = 2;
// Debian 12's headers of the C library do not name it.
constexpr std::uint64_t kClonePidfd = 0x1000;

// Opens nothing: a worker may be closing what it does not know.
void say(const std::string& text) {
  const std::string line = "uffdkit: keeper: " + text + "\n";
  pollfd entry{.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
  // A reader that is slow must not hold this up.
  if (::poll(&entry, 1, 0) == 1) (void)!::write(STDERR_FILENO, line.data(), line.size());
}

void wait_for_end(int pidfd) {
  while (!has_ended(pidfd)) {
    pollfd entry{.fd = pidfd, .events = POLLIN, .revents = 0};
    (void)::poll(&entry, 1, -1);
  }
}

// The signal that ended a child; 0 if it exited, or if it was another keeper's child.
int reap(int pidfd) {
  siginfo_t info{};
  if (::waitid(P_PIDFD, static_cast<id_t>(pidfd), &info, WEXITED | WNOHANG) != 0 || info.si_pid == 0)
    return 0;
  return info.si_code == CLD_EXITED ? 0 : info.si_status;
}

std::string path_of_program() {
  std::array<char, 4096> path;
  const ssize_t bytes = ::readlink("/proc/self/exe", path.data(), path.size());
  return bytes <= 0 ? std::string() : std::string(path.data(), static_cast<std::size_t>(bytes));
}

std::vector<std::string> command_line() {
  std::ifstream file("/proc/self/cmdline", std::ios::binary);
  std::vector<std::string> words;
  for (std::string word; std::getline(file, word, '\0');) words.push_back(word);
  return words;
}

void set_close_on_exec(bool on) {
  DIR* directory = ::opendir("/proc/self/fd");
  if (directory == nullptr) return;
  while (const dirent* entry = ::readdir(directory)) {
    const std::string_view name = entry->d_name;
    int fd = -1;
    if (std::from_chars(name.data(), name.data() + name.size(), fd).ec != std::errc()) continue;
    if (fd > STDERR_FILENO && fd != ::dirfd(directory)) (void)::fcntl(fd, F_SETFD, on ? FD_CLOEXEC : 0);
  }
  ::closedir(directory);
}

}  // namespace

int Keeper::stop_signal() {
  return SIGUSR1;
}

Result<std::unique_ptr<Keeper>> Keeper::create() {
  if (const char* given = ::getenv(kRecordsVariable)) {
    UniqueFd file(std::atoi(given));
    ::unsetenv(kRecordsVariable);
    Result<std::unique_ptr<Records>> records = Records::open(std::move(file));
    if (!records) return Failure(std::move(records).error());
    std::unique_ptr<Keeper> keeper(new Keeper(std::move(*records)));
    set_close_on_exec(true);
    keeper->is_on_trial_ = keeper->shared_.is_on_trial != 0;
    keeper->said_ready_ = true;
    return keeper;
  }
  Result<std::unique_ptr<Records>> records = Records::create();
  if (!records) return Failure(std::move(records).error());
  std::unique_ptr<Keeper> keeper(new Keeper(std::move(*records)));
  Records::Shared& shared = keeper->shared_;
  const std::string program = path_of_program();
  program.copy(shared.program.data(), shared.program.size() - 1);
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP}) ::sigaddset(&signals, signal);
  shared.signals = ::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK);
  shared.nudge = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  shared.trial_timer = ::timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC | TFD_NONBLOCK);
  shared.keeper = ::getpid();
  shared.keeper_pidfd = static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0));
  if (shared.signals < 0 || shared.nudge < 0 || shared.trial_timer < 0 || shared.keeper_pidfd < 0)
    return Failure(Error::from_errno("create the keeper's descriptors", errno));
  shared.started_ns = monotonic_ns();
  return keeper;
}

int Keeper::split(std::atomic<std::int32_t>& pid, std::atomic<std::int32_t>& pidfd) const {
  if (const int before = pidfd.exchange(-1); before >= 0) ::close(before);
  // Not fork(2), which would copy the table of descriptors. The pidfd is written before the process begins,
  // so that a standby knows of it however early this process is killed.
  const long child = ::syscall(SYS_clone, CLONE_FILES | kClonePidfd | SIGCHLD, nullptr, &pidfd, nullptr, 0);
  if (child < 0) say(Error::from_errno("start a process", errno).text());
  if (child >= 0) pid = child == 0 ? ::getpid() : static_cast<std::int32_t>(child);
  return static_cast<int>(child);
}

bool Keeper::may_open() const {
  return has_ended(shared_.worker_pidfd) || shared_.is_serving != 0;
}

void Keeper::start_standby(const Notify& notify) {
  (void)reap(shared_.standby_pidfd);
  const int child = split(shared_.standby, shared_.standby_pidfd);
  if (child < 0) standby_at_ns_ = monotonic_ns() + kStandbyPauseNs;
  if (child != 0) return;

  ::prctl(PR_SET_NAME, "uffdkit-standby");
  outlast_keeper();
  if (shared_.is_on_trial != 0) undo_upgrade();
  while (!may_open()) (void)::poll(nullptr, 0, kLookMs);
  // This process's pidfd is the keeper's from here on.
  const int own = shared_.standby_pidfd;
  const int before = shared_.keeper_pidfd.exchange(own);
  shared_.standby_pidfd = -1;
  ::close(before);
  if (shared_.exit_code < 0)
    say(fmt::format("process {} has ended; process {} keeps the worker now", shared_.keeper.load(),
                    ::getpid()));
  ::prctl(PR_SET_NAME, "uffdkit");
  notify(fmt::format("MAINPID={}", ::getpid()));
}

void Keeper::outlast_keeper() const {
  while (!has_ended(shared_.keeper_pidfd)) {
    std::array<pollfd, 2> entries = {pollfd{.fd = shared_.keeper_pidfd, .events = POLLIN, .revents = 0},
                                     pollfd{.fd = shared_.trial_timer, .events = POLLIN, .revents = 0}};
    (void)::poll(entries.data(), entries.size(), -1);
    std::uint64_t times = 0;
    if (entries[1].revents == 0 || ::read(shared_.trial_timer, &times, sizeof times) != sizeof times)
      continue;
    say(fmt::format("the new program does not serve after {} s", kTrialSeconds));
    send_signal(shared_.keeper_pidfd, SIGKILL);
    wait_for_end(shared_.keeper_pidfd);
  }
}

void Keeper::undo_upgrade() const {
  // One of the new program's, which may not even know which descriptors it may close.
  if (!has_ended(shared_.worker_pidfd)) {
    send_signal(shared_.worker_pidfd, SIGKILL);
    wait_for_end(shared_.worker_pidfd);
  }
  if (const int before = shared_.worker_pidfd.exchange(-1); before >= 0) ::close(before);
  say("the program stays: the new one has not come to serve");
  ++shared_.upgrades_failed;
  end_trial();
}

void Keeper::begin_trial() const {
  shared_.is_on_trial = 1;
  const itimerspec limit{.it_interval = {}, .it_value = {.tv_sec = kTrialSeconds, .tv_nsec = 0}};
  (void)::timerfd_settime(shared_.trial_timer, 0, &limit, nullptr);
}

void Keeper::end_trial() const {
  shared_.is_on_trial = 0;
  const itimerspec never{};
  (void)::timerfd_settime(shared_.trial_timer, 0, &never, nullptr);
}

void Keeper::end_standby() const {
  if (has_ended(shared_.standby_pidfd)) return;
  send_signal(shared_.standby_pidfd, SIGKILL);
  wait_for_end(shared_.standby_pidfd);
  (void)reap(shared_.standby_pidfd);
}

void Keeper::start_worker(const Work& work) {
  shared_.is_serving = 0;
  ++shared_.workers;
  const int child = split(shared_.worker, shared_.worker_pidfd);
  if (child < 0) worker_at_ns_ = monotonic_ns() + kCrashPauseNs;
  if (child != 0) return;
  ::prctl(PR_SET_NAME, "uffdkit-worker");
  count_steps_of_worker(shared_.workers);
  const int code = work(*records_);
  // One that has not come to take over from another is no end: the next one tries.
  if (shared_.is_ready == 0 || shared_.is_serving != 0) shared_.exit_code = code;
  std::exit(code);
}

void Keeper::worker_died() {
  const int signal = reap(shared_.worker_pidfd);
  shared_.death_signal = signal;
  if (const int before = shared_.worker_pidfd.exchange(-1); before >= 0) ::close(before);
  const bool served = shared_.is_serving != 0;
  crashes_ = served && (signal == SIGKILL || signal == 0) ? 0 : crashes_ + 1;
  const bool at_once = signal == SIGKILL && crashes_ <= kKillsAtOnce;
  worker_at_ns_ = crashes_ == 0 || at_once
                      ? 0
                      : monotonic_ns() + (kCrashPauseNs << std::min(crashes_ - 1, kCrashDoublingsMax));
}

void Keeper::take_signals() {
  std::uint64_t nudges = 0;
  (void)!::read(shared_.nudge, &nudges, sizeof nudges);
  signalfd_siginfo signal;
  while (::read(shared_.signals, &signal, sizeof signal) == sizeof signal) {
    if (signal.ssi_signo == SIGHUP) {
      shared_.upgrade = 1;
      continue;
    }
    ++shared_.stops;
    send_signal(shared_.worker_pidfd, stop_signal());
  }
}

void Keeper::notify_manager(const Notify& notify) {
  // These open a socket.
  if (!may_open()) return;
  if (shared_.is_ready != 0 && !std::exchange(said_ready_, true)) notify("READY=1");
  if (shared_.stops != 0 && !std::exchange(said_stopping_, true)) notify("STOPPING=1");
}

void Keeper::replace_program() {
  shared_.upgrade = 0;
  const std::string program(shared_.program.data());
  if (::access(program.c_str(), X_OK) != 0) {
    say(Error::from_errno("the program stays: run " + program, errno).text());
    ++shared_.upgrades_failed;
    return;
  }
  send_signal(shared_.worker_pidfd, SIGKILL);
  wait_for_end(shared_.worker_pidfd);
  worker_died();
  std::vector<std::string> words = command_line();
  std::vector<char*> argv;
  argv.reserve(words.size() + 1);
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  ::setenv(kRecordsVariable, std::to_string(records_->fd()).c_str(), 1);
  set_close_on_exec(false);
  begin_trial();
  ::execv(program.c_str(), argv.data());
  const int why = errno;
  end_trial();
  set_close_on_exec(true);
  ::unsetenv(kRecordsVariable);
  say(Error::from_errno("the program stays: run " + program, why).text());
  ++shared_.upgrades_failed;
}

void Keeper::wait() const {
  std::array<pollfd, 4> entries = {
      pollfd{.fd = shared_.signals, .events = POLLIN, .revents = 0},
      pollfd{.fd = shared_.nudge, .events = POLLIN, .revents = 0},
      pollfd{.fd = shared_.worker_pidfd, .events = POLLIN, .revents = 0},
      pollfd{.fd = shared_.standby_pidfd, .events = POLLIN, .revents = 0},
  };
  const bool retries = shared_.worker_pidfd < 0 || has_ended(shared_.standby_pidfd);
  if (has_ended(shared_.standby_pidfd)) entries[3].fd = -1;
  (void)::poll(entries.data(), entries.size(), retries ? kLookMs : -1);
}

int Keeper::run(const Work& work, const Notify& notify) {
  bool has_begun = false;
  // Each turn looks at everything anew: a standby that has become the keeper goes on here.
  for (;; wait()) {
    take_signals();
    if (has_ended(shared_.worker_pidfd) && shared_.workers != 0) {
      if (shared_.exit_code >= 0) break;
      if (shared_.worker_pidfd >= 0) worker_died();
      // The standby goes on with the program of before.
      if (is_on_trial_ && has_begun) return 1;
      if (shared_.is_ready == 0) {
        say(fmt::format("the worker ended before it was ready, by signal {}", shared_.death_signal.load()));
        shared_.exit_code = 1;
        break;
      }
    }
    if (is_on_trial_ && has_begun && shared_.is_serving != 0) {
      is_on_trial_ = false;
      end_trial();
      end_standby();
      ++shared_.upgrades;
    }
    notify_manager(notify);
    const std::int64_t now = monotonic_ns();
    if (may_open() && has_ended(shared_.standby_pidfd) && now >= standby_at_ns_) start_standby(notify);
    // Said when another can take its place.
    if (!has_ended(shared_.standby_pidfd)) shared_.keeper = ::getpid();
    if (shared_.upgrade != 0 && shared_.is_serving != 0 && !has_ended(shared_.standby_pidfd))
      replace_program();
    if (has_ended(shared_.worker_pidfd) && shared_.exit_code < 0 && monotonic_ns() >= worker_at_ns_) {
      start_worker(work);
      has_begun = true;
    }
  }
  (void)reap(shared_.worker_pidfd);
  end_standby();
  return shared_.exit_code;
}

}  // namespace uffdkit

// NOLINTEND(concurrency-mt-unsafe)
