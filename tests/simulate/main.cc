// Runs the engine on the model of userfaultfd under seeds (world.h), or the manager (manager_world.h).
//
//   simulate --seeds 1000 --seed 7     seeds 7, 8, ... 1006
//   simulate --seed 42 -v              one, with all that was done
//   simulate --manager --seed 42 -v    of the manager, with what it logs
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "simulate/manager_world.h"
#include "simulate/world.h"

int main(int argc, char** argv) {
  CLI::App app("Runs the engine, or the manager, on the model of userfaultfd under seeds.");
  std::uint64_t seeds = 1;
  std::uint64_t first = 1;
  bool verbose = false;
  bool manager = false;
  app.add_option("--seeds", seeds, "how many");
  app.add_option("--seed", first, "the first one");
  app.add_flag("-v", verbose, "print what was done");
  app.add_flag("--manager", manager, "the manager, too, with all of its threads");
  CLI11_PARSE(app, argc, argv);
  // What the manager logs of each seed is of use with what was done there.
  if (manager && !verbose && std::freopen("/dev/null", "w", stderr) == nullptr) return 1;
  std::size_t bytes = 0;
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    const auto found = manager ? uffdkit::simulate::run_manager(seed) : uffdkit::simulate::run(seed);
    bytes += found.bytes_checked;
    if (verbose)
      for (const std::string& event : found.events) fmt::print("{}\n", event);
    if (verbose && manager) fmt::print("seed {} went the way {:016x}\n", seed, found.trace);
    if (found.wrong.empty()) continue;
    fmt::print("seed {}: {}\n", seed, found.wrong);
    return 1;
  }
  fmt::print("{} seeds: every thread got through, {} bytes were read and right\n", seeds, bytes);
  return 0;
}
