// The uffdkit command: a table of subcommands, each in a file of its own.
#include "tool/command.h"

#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include <cstdio>

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
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? uffdkit::tool::kExitDone : uffdkit::tool::kExitUsage;
  }
  return exit_code;
}
