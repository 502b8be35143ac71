// The uffdkit command: a table of subcommands, each in a file of its own.
#include "tool/command.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <string>
#include <vector>

namespace {

// What was given where a subcommand is expected, if it is not one: named with those that there are.
std::string unknown_subcommand(const CLI::App& app) {
  const CLI::App* at = &app;
  std::string path = app.get_name();
  while (!at->get_subcommands().empty()) {
    at = at->get_subcommands().front();
    path += " " + at->get_name();
  }
  const std::vector<std::string> rest = at->remaining();
  if (rest.empty() || at->get_require_subcommand_min() == 0) return {};
  std::vector<std::string> names;
  for (const CLI::App* known : at->get_subcommands({})) names.push_back(known->get_name());
  return fmt::format("{}: there is no {} '{}'; the subcommands are {}\nRun {} --help for more information.\n",
                     path, rest.front().starts_with('-') ? "option" : "subcommand", rest.front(),
                     fmt::join(names, ", "), path);
}

}  // namespace

// NOLINTNEXTLINE(bugprone-exception-escape): only want of memory throws here, and nothing is lost by ending.
int main(int argc, char** argv) {
  CLI::App app{"User-space paging for Linux, on userfaultfd", "uffdkit"};
  app.require_subcommand(1);
  app.set_version_flag("--version", UFFDKIT_VERSION);
  app.footer(
      "Exit codes: 0 done; 1 the answer is no, or the work failed (see stderr); 2 wrong use of the command.");

  int exit_code = uffdkit::tool::kExitDone;
  for (const auto add : uffdkit::tool::kSubcommands) add(app, exit_code);

  try {
    app.parse(argc, argv);
  } catch (const CLI::RequiredError& error) {
    if (const std::string unknown = unknown_subcommand(app); !unknown.empty()) {
      fmt::print(stderr, "{}", unknown);
    } else {
      app.exit(error);
    }
    return uffdkit::tool::kExitUsage;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? uffdkit::tool::kExitDone : uffdkit::tool::kExitUsage;
  }
  return exit_code;
}
