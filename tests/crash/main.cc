// Kills the worker, and the keeper, of a manager whose clients never rest, as long as one likes.
#include <fmt/format.h>
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <exception>
#include <random>
#include <string>
#include <vector>

#include "support/image.h"
#include "support/manager_process.h"
#include "support/temp_dir.h"
#include "support/turmoil.h"

namespace uffdkit::test {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  double minutes = 1;
  std::size_t clients = 8;
  std::size_t pages = 2048;
  std::uint64_t kills = 0;
  std::uint64_t seed = 1;
  unsigned pause_ms = 40;
  unsigned rest_us = 0;
  bool keepers = false;
};

std::uint64_t percentile(std::vector<std::uint64_t>& values, double part) {
  if (values.empty()) return 0;
  const auto at = static_cast<std::size_t>(part * static_cast<double>(values.size() - 1));
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(at), values.end());
  return values[at];
}

void print_waits(const char* when, std::vector<std::uint64_t>& waits_us) {
  const auto ms = [&](double part) { return static_cast<double>(percentile(waits_us, part)) / 1000; };
  fmt::print("longest wait of a client {}: p50 {:.1f} ms, p99 {:.1f} ms, longest {:.1f} ms\n", when, ms(0.5),
             ms(0.99), ms(1));
}

int run(const Options& options) {
  const TempDir directory;
  const Image image(directory / "image", options.pages);
  const std::string firecracker = directory / "firecracker.sock";
  const std::string native = directory / "native.sock";
  ManagerProcess manager(directory,
                         {"--firecracker", firecracker + "=" + image.path(), "--listen", native, "--image",
                          "image=" + image.path()},
                         {.lifetime = std::chrono::minutes(static_cast<int>(options.minutes) + 5)});
  Turmoil clients(image);
  std::mt19937_64 random(options.seed);
  for (std::size_t i = 0; i < options.clients; ++i) {
    constexpr Turmoil::Kind kKinds[] = {Turmoil::Kind::forking, Turmoil::Kind::firecracker,
                                        Turmoil::Kind::native};
    const Turmoil::Kind kind = kKinds[i % 3];
    AttachOptions shared;
    if (i % 2 == 1) shared.sharing = AttachOptions::Share::if_possible;
    shared.removed_reads_zero = true;
    clients.start({.kind = kind,
                   .socket = kind == Turmoil::Kind::native ? native : firecracker,
                   .image_name = "image",
                   .options = shared,
                   .seed = random(),
                   .rest_us = options.rest_us});
  }

  const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                      std::chrono::duration<double, std::ratio<60>>(options.minutes));
  // As long without a kill as with one, so that the two can be compared.
  std::vector<std::uint64_t> quiet_us;
  std::vector<std::uint64_t> pauses_us;
  const auto note = [&](std::vector<std::uint64_t>& waits_us) {
    (void)clients.longest_us();
    usleep(1000 * options.pause_ms);
    for (const std::uint64_t us : clients.longest_us()) waits_us.push_back(us);
  };
  std::uint64_t kills = 0;
  std::string hanging;
  while (hanging.empty() && Clock::now() < end && (options.kills == 0 || kills < options.kills)) {
    usleep(static_cast<useconds_t>(random() % (1 + 1000 * options.pause_ms)));
    note(quiet_us);
    const nlohmann::json status = manager.status();
    const bool keeper = options.keepers && random() % 4 == 0;
    const auto pid = status.at(keeper ? "keeper" : "worker").at("pid").get<pid_t>();
    ::kill(pid, SIGKILL);
    ++kills;
    note(pauses_us);
    hanging = clients.hanging();
  }
  const nlohmann::json status = manager.status();
  const std::size_t failed = hanging.empty() ? clients.stop() : 1;
  const Turmoil::Counts counts = clients.counts();
  fmt::print("kills {}, takeovers {}, steps {}, removes {}, moves {}, forks {}\n", kills,
             status.at("takeovers").get<std::uint64_t>(), counts.steps, counts.removes, counts.moves,
             counts.forks);
  print_waits("around a kill", pauses_us);
  print_waits("at other times", quiet_us);
  fmt::print("clients that found something wrong or did not end: {}\n", failed);
  if (!hanging.empty()) fmt::print("{}\n", hanging);
  if (failed != 0) fmt::print("the manager's log:\n{}", manager.log());
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace uffdkit::test

int main(int argc, char** argv) {
  CLI::App app{"Kills workers of a manager under clients that never rest", "soak"};
  uffdkit::test::Options options;
  app.add_option("--minutes", options.minutes, "How long")->capture_default_str();
  app.add_option("--kills", options.kills, "End after so many; 0: by time only")->capture_default_str();
  app.add_option("--clients", options.clients, "How many")->check(CLI::Range(1, 256))->capture_default_str();
  app.add_option("--pages", options.pages, "Pages of 4 KiB of each")->capture_default_str();
  app.add_option("--pause-ms", options.pause_ms, "Between kills, about")->capture_default_str();
  app.add_option("--rest-us", options.rest_us, "How long a client rests between two steps, at most")
      ->capture_default_str();
  app.add_option("--seed", options.seed, "Of all that is random")->capture_default_str();
  app.add_flag("--keepers", options.keepers, "Kill keepers, too");
  CLI11_PARSE(app, argc, argv);
  try {
    return uffdkit::test::run(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
