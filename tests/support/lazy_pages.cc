#include "support/lazy_pages.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <system_error>

#include "support/arguments.h"
#include "support/paths.h"
#include "support/sanitizers.h"

namespace uffdkit::test {
namespace {

[[noreturn]] void fail(const char* call) {
  throw std::system_error(errno, std::generic_category(), call);
}

std::vector<std::string> lazy_pages_command(const std::string& directory,
                                            const std::vector<std::string>& arguments) {
  std::vector<std::string> command = {built("uffdkit"), "criu", "lazy-pages", "-D", directory};
  command.insert(command.end(), arguments.begin(), arguments.end());
  // Sanitizers have threads and system calls of their own.
  if (kSanitized) command.emplace_back("--no-sandbox");
  return command;
}

}  // namespace

LazyPages::LazyPages(const std::string& directory, const std::vector<std::string>& arguments)
    : LazyPages(lazy_pages_command(directory, arguments), directory + "/lazy-pages.log") {}

LazyPages::LazyPages(std::vector<std::string> command, std::string log) : log_(std::move(log)) {
  int status[2];
  if (pipe2(status, O_CLOEXEC) != 0) fail("pipe2");
  const UniqueFd read_end(status[0]);
  UniqueFd write_end(status[1]);
  command.insert(command.end(), {"--status-fd", std::to_string(write_end.get())});
  const std::vector<char*> argv = exec_pointers(command);
  const UniqueFd log_file(open(log_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!log_file) fail(log_.c_str());
  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ < 0) fail("fork");
  if (pid_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(98);
    if (fcntl(write_end.get(), F_SETFD, 0) == 0 && dup2(log_file.get(), STDERR_FILENO) >= 0)
      execv(argv[0], argv.data());
    _exit(127);
  }
  write_end.reset();
  char byte = 1;
  if (read(read_end.get(), &byte, 1) != 1 || byte != 0) {
    wait();
    throw std::runtime_error("it does not listen: " + this->log());
  }
}

LazyPages::~LazyPages() {
  if (pid_ < 0) return;
  kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
}

std::string LazyPages::log() const {
  std::ostringstream text;
  text << std::ifstream(log_).rdbuf();
  return text.str();
}

int LazyPages::wait() {
  int status = 0;
  if (waitpid(pid_, &status, 0) != pid_) fail("waitpid");
  pid_ = -1;
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace uffdkit::test
