// uffdkit resume: a client that was stopped over a page that could not be read goes on.
#include <CLI/CLI.hpp>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "tool/command.h"
#include "tool/control_client.h"

namespace uffdkit::tool {

void add_resume(CLI::App& app, int& exit_code) {
  CLI::App* command =
      app.add_subcommand("resume", "Let a client go on that was stopped over a page that could not be read");
  struct Options {
    std::string control = default_control_socket();
    std::uint64_t session = 0;
  };
  const auto options = std::make_shared<Options>();
  command->add_option("--control", options->control, "The manager's control socket")->capture_default_str();
  command->add_option("session", options->session, "The session's number, as 'uffdkit status' shows it")
      ->required();
  command->callback([options, &exit_code] {
    const Result<nlohmann::json> answer =
        ask_manager(options->control, control::SessionResume{.session = options->session});
    exit_code = answer ? kExitDone : report(answer.error());
  });
}

}  // namespace uffdkit::tool
