#include "support/manager_process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "support/arguments.h"
#include "support/sanitizers.h"
#include "wire/unix_socket.h"

namespace uffdkit::test {
namespace {

constexpr std::chrono::seconds kPatience{30};

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// Up to and without the end of the line; what there is if the peer ends before.
std::string read_line(int fd) {
  std::string line;
  std::array<char, 4096> buffer;
  while (true) {
    pollfd entry{.fd = fd, .events = POLLIN, .revents = 0};
    if (poll(&entry, 1, static_cast<int>(std::chrono::milliseconds(kPatience).count())) != 1)
      throw std::runtime_error("no answer from the manager");
    const ssize_t bytes = read(fd, buffer.data(), buffer.size());
    if (bytes < 0) fail("read");
    line.append(buffer.data(), static_cast<std::size_t>(bytes));
    const std::size_t end = line.find('\n');
    if (end != std::string::npos) return line.substr(0, end);
    if (bytes == 0) return line;
  }
}

std::size_t entries_in(const std::string& directory) {
  const std::filesystem::directory_iterator entries(directory);
  return static_cast<std::size_t>(std::distance(begin(entries), end(entries)));
}

// Ends a manager whose test was killed, and one that hangs. Its processes keep each other alive, so that the
// death of their parent is not enough.
pid_t start_guard(pid_t group, int pipe_end, int other_end, std::chrono::milliseconds lifetime) {
  const pid_t guard = fork();
  if (guard != 0) return guard;
  close(other_end);
  pollfd entry{.fd = pipe_end, .events = POLLIN, .revents = 0};
  (void)poll(&entry, 1, static_cast<int>(lifetime.count()));
  kill(-group, SIGKILL);
  _exit(0);
}

// Reaps all processes of a group, of which nothing is left to run.
void reap_group(pid_t group) {
  while (waitpid(-group, nullptr, 0) > 0 || errno == EINTR) {
  }
}

}  // namespace

std::ostream& operator<<(std::ostream& out, const Footprint& footprint) {
  return out << footprint.descriptors << " descriptors, " << footprint.threads << " threads, "
             << footprint.state_mappings << " mappings of state files";
}

bool eventually(const std::function<bool()>& holds) {
  const auto give_up = std::chrono::steady_clock::now() + kPatience;
  while (!holds()) {
    if (std::chrono::steady_clock::now() > give_up) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return true;
}

ManagerProcess::ManagerProcess(const TempDir& directory, const std::vector<std::string>& arguments)
    : ManagerProcess(directory, arguments, Setting{}) {}

ManagerProcess::ManagerProcess(const TempDir& directory, const std::vector<std::string>& arguments,
                               const Setting& setting)
    : control_(directory / "control.sock"),
      log_path_(directory / ("manager-" + std::to_string(entries_in(directory.path().string())) + ".log")) {
  std::vector<std::string> words = {setting.program, "serve", "--control", control_};
  words.insert(words.end(), arguments.begin(), arguments.end());
  // Sanitizers have threads and system calls of their own.
  if (kSanitized) words.emplace_back("--no-sandbox");
  std::vector<std::string> environment = setting.environment;
  for (char** entry = environ; *entry != nullptr; ++entry) environment.emplace_back(*entry);
  const std::vector<char*> argv = exec_pointers(words);
  const std::vector<char*> envp = exec_pointers(environment);

  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) fail("pipe2");
  out_.reset(ends[0]);
  UniqueFd write_end(ends[1]);
  const UniqueFd log_file(open(log_path_.c_str(), O_CREAT | O_WRONLY | O_APPEND | O_CLOEXEC, 0600));
  if (!log_file) fail(log_path_);

  int guard_ends[2];
  if (pipe2(guard_ends, O_CLOEXEC) != 0) fail("pipe2");
  guard_pipe_.reset(guard_ends[1]);
  const UniqueFd guard_end(guard_ends[0]);
  // What it leaves behind is ours to reap.
  if (prctl(PR_SET_CHILD_SUBREAPER, 1) != 0) fail("prctl");
  pid_ = fork();
  if (pid_ < 0) fail("fork");
  if (pid_ == 0) {
    setpgid(0, 0);
    const rlimit limit{.rlim_cur = setting.descriptors_max, .rlim_max = setting.descriptors_max};
    const bool limited = setting.descriptors_max == 0 || setrlimit(RLIMIT_NOFILE, &limit) == 0;
    if (limited && dup2(write_end.get(), STDOUT_FILENO) >= 0 && dup2(log_file.get(), STDERR_FILENO) >= 0)
      execve(argv[0], argv.data(), envp.data());
    _exit(127);
  }
  setpgid(pid_, pid_);
  guard_ = start_guard(pid_, guard_end.get(), guard_pipe_.get(), setting.lifetime);
  // Only the manager has it open now, so its end is seen.
  write_end.reset();
  try {
    ready_line_ = read_line(out_.get());
    if (!ready_line_.starts_with("uffdkit: ready"))
      throw std::runtime_error("the manager did not start: " + ready_line_ + log());
  } catch (...) {
    kill();
    throw;
  }
}

ManagerProcess::~ManagerProcess() {
  kill();
}

nlohmann::json ManagerProcess::ask(const std::string& line, int attempts_left) const {
  const Result<UniqueFd> socket = connect_unix(control_, kPatience);
  if (!socket) throw std::runtime_error(socket.error().text());
  const std::string request = line + "\n";
  if (const auto sent = send_all(socket->get(), std::as_bytes(std::span(request)), {}, kPatience); !sent)
    throw std::runtime_error(sent.error().text());
  // A worker that is killed answers nobody; the next one does.
  std::string answer;
  try {
    answer = read_line(socket->get());
  } catch (const std::system_error&) {
  }
  if (answer.empty() && attempts_left > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    return ask(line, attempts_left - 1);
  }
  if (answer.empty()) throw std::runtime_error("no answer on the control socket; the log:\n" + log());
  return nlohmann::json::parse(answer);
}

std::uint64_t ManagerProcess::total(const char* counter) const {
  return status().at("total").value(counter, std::uint64_t{0});
}

Footprint ManagerProcess::footprint() const {
  const std::string process = "/proc/" + std::to_string(worker_pid());
  Footprint footprint{.descriptors = entries_in(process + "/fd"),
                      .threads = entries_in(process + "/task"),
                      .state_mappings = 0};
  std::ifstream maps(process + "/maps");
  for (std::string line; std::getline(maps, line);)
    if (line.find("/memfd:") != std::string::npos) ++footprint.state_mappings;
  return footprint;
}

std::chrono::milliseconds ManagerProcess::cpu_time() const {
  std::ifstream file("/proc/" + std::to_string(worker_pid()) + "/stat");
  std::string text;
  std::getline(file, text);
  // The name may hold spaces; after its closing bracket come the state and 10 numbers, then the two times.
  std::istringstream fields(text.substr(text.rfind(')') + 2));
  std::string skipped;
  for (int i = 0; i < 11; ++i) fields >> skipped;
  std::uint64_t user = 0;
  std::uint64_t system = 0;
  fields >> user >> system;
  return std::chrono::milliseconds((user + system) * 1000 / static_cast<std::uint64_t>(sysconf(_SC_CLK_TCK)));
}

std::string ManagerProcess::log() const {
  std::ifstream file(log_path_);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void ManagerProcess::signal(int number) const {
  if (::kill(pid_, number) != 0) fail("kill");
}

int ManagerProcess::wait() {
  int status = 0;
  if (waitpid(pid_, &status, 0) != pid_) fail("waitpid");
  kill();
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

int ManagerProcess::stop() {
  signal(SIGTERM);
  return wait();
}

void ManagerProcess::kill() {
  if (pid_ < 0) return;
  ::kill(-pid_, SIGKILL);
  reap_group(pid_);
  pid_ = -1;
  // Other children of the test may have the pipe open still.
  ::kill(guard_, SIGKILL);
  waitpid(guard_, nullptr, 0);
  guard_pipe_.reset();
}

}  // namespace uffdkit::test
