// Runs the engine on the model of userfaultfd under seeds: see world.h.
//
//   simulate --seeds 1000 --seed 7     seeds 7, 8, ... 1006
//   simulate --seed 42 -v              one, with all that was done
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "simulate/world.h"

int main(int argc, char** argv) {
  CLI::App app("Runs the engine on the model of userfaultfd under seeds.");
  std::uint64_t seeds = 1;
  std::uint64_t first = 1;
  bool verbose = false;
  app.add_option("--seeds", seeds, "how many");
  app.add_option("--seed", first, "the first one");
  app.add_flag("-v", verbose, "print what was done");
  CLI11_PARSE(app, argc, argv);
  std::size_t bytes = 0;
  for (std::uint64_t seed = first; seed < first + seeds; ++seed) {
    const auto found = uffdkit::simulate::run(seed);
    bytes += found.bytes_checked;
    if (verbose)
      for (const std::string& event : found.events) fmt::print("{}\n", event);
    if (found.wrong.empty()) continue;
    fmt::print("seed {}: {}\n", seed, found.wrong);
    return 1;
  }
  fmt::print("{} seeds: every thread got through, {} bytes were read and right\n", seeds, bytes);
  return 0;
}
