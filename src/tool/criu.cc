// uffdkit criu: in the place of CRIU's own programs.
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <memory>
#include <string>

#include "manager/criu_daemon.h"
#include "manager/sandbox.h"
#include "tool/command.h"

namespace uffdkit::tool {
namespace {

struct Options {
  std::string images = ".";
  std::string work;  // empty: the images'
  std::string log;
  bool daemon = false;
  std::string pidfile;
  int status_fd = -1;
  std::uint64_t fault_around = 16;
  unsigned workers = 0;
  bool no_sandbox = false;
  std::string ignored_text;
  bool ignored = false;
};

// criu makes its socket, and everything else that is named without a directory, in the work directory.
Result<std::string> enter_work_directory(const Options& options) {
  const std::unique_ptr<char, decltype(&::free)> images(::realpath(options.images.c_str(), nullptr), &::free);
  if (!images) return Failure(Error::from_errno("open the directory " + options.images, errno));
  const std::string& work = options.work.empty() ? options.images : options.work;
  if (::chdir(work.c_str()) != 0) return Failure(Error::from_errno("enter the directory " + work, errno));
  return std::string(images.get());
}

Result<void> write_log_to(const std::string& path) {
  const UniqueFd log(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0600));
  if (!log || ::dup2(log.get(), STDERR_FILENO) < 0)
    return Failure(Error::from_errno("write the log to " + path, errno));
  return {};
}

Result<void> say_ready(int status_fd) {
  const char byte = 0;
  if (::write(status_fd, &byte, 1) != 1)
    return Failure(Error::from_errno(fmt::format("write to descriptor {}", status_fd), errno)
                       .with_remedy("--status-fd is to be a descriptor that is open for writing"));
  ::close(status_fd);
  return {};
}

Result<void> write_pidfile(const std::string& path, pid_t pid) {
  const UniqueFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  const std::string text = std::to_string(pid);
  if (!file || ::write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()))
    return Failure(Error::from_errno("write " + path, errno));
  return {};
}

Result<void> leave_terminal(bool keep_errors) {
  const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
  if (!null || ::setsid() < 0 || ::dup2(null.get(), STDIN_FILENO) < 0 ||
      ::dup2(null.get(), STDOUT_FILENO) < 0 || (!keep_errors && ::dup2(null.get(), STDERR_FILENO) < 0))
    return Failure(Error::from_errno("leave the terminal", errno));
  return {};
}

// `pid` serves, and criu can connect.
Result<void> announce(const Options& options, pid_t pid) {
  if (!options.pidfile.empty())
    if (auto written = write_pidfile(options.pidfile, pid); !written) return written;
  return options.status_fd >= 0 ? say_ready(options.status_fd) : Result<void>();
}

// In the process that is left behind, does not return.
Result<void> become_daemon(const Options& options) {
  const pid_t pid = ::fork();
  if (pid < 0) return Failure(Error::from_errno("start the daemon", errno));
  if (pid == 0) {
    if (options.status_fd >= 0) ::close(options.status_fd);
    return leave_terminal(!options.log.empty());
  }
  const Result<void> announced = announce(options, pid);
  if (!announced) ::kill(pid, SIGKILL);
  // Without destructors: the socket is the daemon's.
  ::_exit(announced ? kExitDone : report(announced.error()));
}

int run(const Options& options) {
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  ::sigaddset(&signals, SIGINT);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  raise_descriptor_limit();

  const Result<std::string> images = enter_work_directory(options);
  if (!images) return report(images.error());
  if (!options.log.empty())
    if (auto logging = write_log_to(options.log); !logging) return report(logging.error());
  Result<std::unique_ptr<CriuDaemon>> daemon =
      CriuDaemon::create({.images = *images,
                          .socket = "lazy-pages.socket",
                          .workers = options.workers,
                          .fault_around = PageCount(options.fault_around)});
  if (!daemon) return report(daemon.error());
  auto ready = options.daemon ? become_daemon(options) : announce(options, ::getpid());
  if (!ready) return report(ready.error());
  if (!options.no_sandbox) {
    // Its threads are still to come, and inherit it.
    if (auto dropped = drop_privileges(); !dropped) return report(dropped.error());
    if (auto filtered = filter_system_calls(); !filtered) return report(filtered.error());
  }
  const Result<void> served = (*daemon)->run();
  return served ? kExitDone : report(served.error());
}

}  // namespace

void add_criu(CLI::App& app, int& exit_code) {
  CLI::App* criu = app.add_subcommand("criu", "In the place of CRIU's own programs");
  criu->require_subcommand(1);
  CLI::App* command = criu->add_subcommand(
      "lazy-pages", "Fill the memory of what `criu restore --lazy-pages` restores, as it is touched");
  const auto options = std::make_shared<Options>();
  command->add_option("-D,--images-dir", options->images, "The directory of the checkpoint")
      ->capture_default_str();
  command->add_option("-W,--work-dir", options->work,
                      "Where the socket lazy-pages.socket, the log and the pid file are made; that of the "
                      "images by default");
  command->add_option("-o,--log-file", options->log, "Write messages there instead of to standard error");
  command->add_flag("-d,--daemon", options->daemon, "Go on in the background once criu can connect");
  command->add_option("--pidfile", options->pidfile, "Write the number of the process that serves there");
  command
      ->add_option("--status-fd", options->status_fd,
                   "Write a zero byte to this descriptor, and close it, once criu can connect")
      ->check(CLI::NonNegativeNumber);
  add_fault_around_option(*command, "--fault-around", options->fault_around, kFaultAroundHelp);
  add_workers_option(*command, options->workers);
  add_no_sandbox_option(*command, options->no_sandbox);
  // Options of criu's that change nothing here, so that its command lines can be used as they are.
  command->add_option("-v,--verbosity", options->ignored_text, "Taken for criu's sake; no effect")
      ->expected(0, 1);
  command->add_flag("--display-stats", options->ignored, "Likewise");
  command->add_flag("--log-pid", options->ignored, "Likewise");
  command->add_flag("--no-default-config", options->ignored, "Likewise");
  command->footer(
      "Ends when all memory is in place, or its processes are gone.\n"
      "Exit codes: 0 all is in place; 1 it could not start, the restore failed, or pages could not be read; "
      "2 "
      "usage.");
  command->callback([options, &exit_code] { exit_code = run(*options); });
}

}  // namespace uffdkit::tool
