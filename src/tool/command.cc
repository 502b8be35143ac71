#include "tool/command.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>

namespace uffdkit::tool {

int report(const Error& error) {
  fmt::print(stderr, "uffdkit: {}\n", error.text());
  return kExitFailed;
}

std::string default_control_socket() {
  if (::geteuid() == 0) return "/run/uffdkit.sock";
  const char* runtime = std::getenv("XDG_RUNTIME_DIR");  // NOLINT(concurrency-mt-unsafe): before any thread
  return std::string(runtime != nullptr ? runtime : "/tmp") + "/uffdkit.sock";
}

void raise_descriptor_limit() {
  rlimit limit;
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max;
  (void)::setrlimit(RLIMIT_NOFILE, &limit);
}

void add_fault_around_option(CLI::App& command, const std::string& name, std::uint64_t& pages,
                             const std::string& help) {
  command.add_option(name, pages, help)
      ->check(CLI::IsMember({1, 2, 4, 8, 16, 32, 64, 128, 256, 512}))
      ->capture_default_str();
}

void add_workers_option(CLI::App& command, unsigned& workers) {
  command.add_option("--workers", workers, "Threads that serve faults; 0: one for each CPU, at least 2")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str();
}

void add_no_sandbox_option(CLI::App& command, bool& no_sandbox) {
  command.add_flag("--no-sandbox", no_sandbox,
                   "Keep all privileges and system calls, for debuggers and sanitizers");
}

}  // namespace uffdkit::tool
