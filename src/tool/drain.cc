// uffdkit drain: completes the memory of clients, so that they need their manager no more.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <thread>

#include "tool/command.h"
#include "tool/control_client.h"

namespace uffdkit::tool {
namespace {

constexpr std::chrono::milliseconds kLook{50};

int drain(const std::string& control) {
  std::set<std::uint64_t> sessions;
  std::set<std::uint64_t> failed;
  const auto begin = [&]() -> Result<std::uint64_t> {
    // First, so that a worker that takes over between the two questions is asked once more, and not left out.
    const Result<nlohmann::json> status = ask_manager(control, control::Status{});
    if (!status) return Failure(status.error());
    const Result<nlohmann::json> begun = ask_manager(control, control::Drain{});
    if (!begun) return Failure(begun.error());
    for (const auto& id : begun->at("sessions")) sessions.insert(id.get<std::uint64_t>());
    return status->value("takeovers", std::uint64_t{0});
  };
  Result<std::uint64_t> takeovers = begin();
  if (!takeovers) return report(takeovers.error());
  for (bool left = true; left;) {
    const Result<nlohmann::json> status = ask_manager(control, control::Status{});
    if (!status) return report(status.error());
    // A worker that took over has not been asked.
    if (status->value("takeovers", std::uint64_t{0}) != *takeovers) {
      takeovers = begin();
      if (!takeovers) return report(takeovers.error());
      continue;
    }
    left = status->value("draining", std::uint64_t{0}) > 0;
    failed.clear();
    for (const auto& session : status->at("sessions")) {
      const auto id = session.value("id", std::uint64_t{0});
      if (sessions.contains(id) && !session.value("draining", false)) failed.insert(id);
    }
    if (left) std::this_thread::sleep_for(kLook);
  }
  fmt::print("{} sessions completed and released\n", sessions.size() - failed.size());
  if (failed.empty()) return kExitDone;
  return report(Error(fmt::format("{} sessions could not be completed, and are served on", failed.size()))
                    .with_remedy("the manager's log says why"));
}

}  // namespace

void add_drain(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand(
      "drain", "Complete the memory of Firecracker clients and of forked children, and let them go");
  const auto control = std::make_shared<std::string>(default_control_socket());
  command->add_option("--control", *control, "The manager's control socket")->capture_default_str();
  command->callback([control, &exit_code] { exit_code = drain(*control); });
}

}  // namespace uffdkit::tool
