// uffdkit upgrade: has a running manager's program replaced by the one at its path.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>

#include "tool/command.h"
#include "tool/control_client.h"
#include "wire/unix_socket.h"

namespace uffdkit::tool {
namespace {

constexpr std::chrono::seconds kLimit{60};
constexpr std::chrono::milliseconds kLook{20};

int upgrade(const std::string& control) {
  const Result<nlohmann::json> before = ask_manager(control, control::Status{});
  if (!before) return report(before.error());
  const auto count = [](const nlohmann::json& status, const char* key) {
    return status.value(key, std::uint64_t{0});
  };
  const Result<nlohmann::json> asked = ask_manager(control, control::Upgrade{});
  // The worker that is asked ends by what it is asked for, perhaps before it has answered; and while a
  // program is on trial nobody may answer for as long as anybody waits for an answer.
  const auto may_come = [](const Error& error) { return is_lost(error) || error.os_error() == ETIMEDOUT; };
  if (!asked && !may_come(asked.error())) return report(asked.error());
  const auto give_up = std::chrono::steady_clock::now() + kLimit;
  while (std::chrono::steady_clock::now() < give_up) {
    std::this_thread::sleep_for(kLook);
    const Result<nlohmann::json> now = ask_manager(control, control::Status{});
    if (!now && may_come(now.error())) continue;
    if (!now) return report(now.error());
    if (count(*now, "upgrades") > count(*before, "upgrades")) {
      fmt::print("upgraded: keeper {}, worker {}\n", count(*now, "pid"),
                 now->at("worker").value("pid", std::uint64_t{0}));
      return kExitDone;
    }
    if (count(*now, "upgrades_failed") > count(*before, "upgrades_failed"))
      return report(Error("the program at the manager's path does not come to serve; the old one goes on")
                        .with_remedy("the manager's log says why"));
  }
  return report(Error(fmt::format("the manager was not replaced within {} s", kLimit.count()), ETIMEDOUT)
                    .with_remedy("the manager's log says why"));
}

}  // namespace

void add_upgrade(CLI::App& app, int& exit_code) {
  CLI::App* command =
      app.add_subcommand("upgrade", "Replace a running manager by the program that is at its path now");
  const auto control = std::make_shared<std::string>(default_control_socket());
  command->add_option("--control", *control, "The manager's control socket")->capture_default_str();
  command->callback([control, &exit_code] { exit_code = upgrade(*control); });
}

}  // namespace uffdkit::tool
