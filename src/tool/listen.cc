// uffdkit listen: sockets of a running manager.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "manager/access.h"
#include "tool/command.h"
#include "tool/control_client.h"

namespace uffdkit::tool {
namespace {

struct Options {
  std::string control = default_control_socket();
  std::string socket;
  std::string image;
  std::string allow;
  bool json = false;
};

void add_control_option(CLI::App& command, Options& options) {
  command.add_option("--control", options.control, "The manager's control socket")->capture_default_str();
}

int list(const Options& options) {
  const Result<nlohmann::json> answer = ask_manager(options.control, control::ListenList{});
  if (!answer) return report(answer.error());
  const nlohmann::json& listeners = answer->at("listeners");
  if (options.json) {
    fmt::print("{}\n", listeners.dump(2));
    return kExitDone;
  }
  for (const auto& listener : listeners)
    fmt::print("{:12} {}{}\n", listener.value("kind", ""), listener.value("socket", ""),
               listener.contains("image") ? "=" + listener.value("image", "") : "");
  return kExitDone;
}

int add_socket(const Options& options) {
  const auto kind = options.image.empty() ? control::ListenKind::native : control::ListenKind::firecracker;
  std::vector<Subject> allowed;
  if (!options.allow.empty()) {
    Result<std::vector<Subject>> subjects = parse_subjects(options.allow, Names::look_up);
    if (!subjects) return report(subjects.error());
    allowed = std::move(*subjects);
  }
  const control::ListenAdd request{
      .kind = kind, .socket = options.socket, .image = options.image, .allow = to_string(allowed)};
  const Result<nlohmann::json> answer = ask_manager(options.control, request);
  return answer ? kExitDone : report(answer.error());
}

int change(const Options& options, const control::Request& request) {
  const Result<nlohmann::json> answer = ask_manager(options.control, request);
  return answer ? kExitDone : report(answer.error());
}

}  // namespace

void add_listen(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("listen", "Add, remove and list the sockets of a running manager");
  command->require_subcommand(1);
  const auto options = std::make_shared<Options>();

  CLI::App* add = command->add_subcommand("add", "Listen at another socket");
  add_control_option(*add, *options);
  add->add_option("socket", options->socket, "Where to listen")->required();
  add->add_option(
      "--firecracker", options->image,
      "IMAGE: for clients that hand over as Firecracker does, served from this file; without it the socket "
      "is for uffdkit's own protocol");
  add->add_option("--allow", options->allow,
                  "WHO: who may connect there beside those who may have the image anyway: user:NAME, "
                  "group:NAME, anyone, or several with commas")
      ->needs("--firecracker");
  add->callback([options, &exit_code] { exit_code = add_socket(*options); });

  CLI::App* remove = command->add_subcommand("remove", "Listen at a socket no longer; its sessions go on");
  add_control_option(*remove, *options);
  remove->add_option("socket", options->socket, "Where to listen no longer")->required();
  remove->callback([options, &exit_code] {
    exit_code = change(*options, control::ListenRemove{.socket = options->socket});
  });

  CLI::App* show = command->add_subcommand("list", "List the sockets");
  add_control_option(*show, *options);
  show->add_flag("--json", options->json, "Print them as JSON");
  show->callback([options, &exit_code] { exit_code = list(*options); });
}

}  // namespace uffdkit::tool
