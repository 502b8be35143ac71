// How long does one served fault take, next to the plainest handler in the same place?
#include <fmt/format.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "harness/bench.h"
#include "harness/client.h"
#include "harness/image.h"
#include "harness/placement.h"
#include "harness/server.h"
#include "harness/statistics.h"
#include "harness/usage.h"

namespace uffdkit::bench {
namespace {

// Every touched page has so many to itself, so that one that is brought as a neighbour is never touched
// later.
constexpr std::uint64_t kPagesPerTouch = 32;
constexpr unsigned kTouchesPerTurn = 50;

struct Settings {
  std::vector<std::string> spin_us = {"0"};
  std::vector<std::string> workers = {"1", "8", "16"};
  std::string other;
};

struct Contender {
  std::string name;
  std::unique_ptr<Server> server;
  std::unique_ptr<Client> client = {};
  std::vector<double> p50_ns = {};  // of each round
  std::vector<std::uint32_t> all_ns = {};
  std::uint64_t switches = 0;  // of the server's threads
};

std::vector<Contender> contenders(const Options& options, const Settings& settings,
                                  const std::string& image) {
  std::vector<Contender> all;
  all.push_back({"raw read+pread+COPY", std::make_unique<RawServer>(RAW_READ, image)});
  all.push_back({"raw read+COPY, nothing read", std::make_unique<RawServer>(RAW_MEMORY, image)});
  all.push_back({"raw poll+read+pread+COPY", std::make_unique<RawServer>(RAW_POLL, image)});
  const auto add = [&](const std::string& binary, const std::string& name,
                       const std::vector<std::string>& arguments) {
    all.push_back({name, std::make_unique<UffdkitServer>(binary, options.directory, image, arguments)});
  };
  add(options.uffdkit, "uffdkit, one page a fault", {"--fault-around", "1"});
  add(options.uffdkit, "uffdkit as it comes", {});
  for (const std::string& us : settings.spin_us) {
    add(options.uffdkit, fmt::format("uffdkit, one page, spin {} us", us),
        {"--fault-around", "1", "--spin-us", us});
  }
  for (const std::string& workers : settings.workers) {
    add(options.uffdkit, fmt::format("uffdkit, one page, {} workers", workers),
        {"--fault-around", "1", "--workers", workers});
  }
  if (!settings.other.empty()) add(settings.other, "other build, one page a fault", {"--fault-around", "1"});
  return all;
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const unsigned rounds = options.rounds_or(60);
  const std::uint64_t touches = std::uint64_t{rounds} * kTouchesPerTurn;
  const std::uint64_t pages = (touches + 1) * kPagesPerTouch;  // the first touch is the attaching's
  const std::string image = options.directory + "/image";
  write_image(image, pages);

  report.table("fault_latency",
               fmt::format("One fault at a time, {} of each in turns of {}; image in page cache.", touches,
                           kTouchesPerTurn),
               {{"placement", "client and server"},
                {"contender", "who serves"},
                {"p50_us", "p50 us", 1},
                {"p99_us", "p99 us", 1},
                {"p50_ratio", "p50 / raw", 2},
                {"p99_ratio", "p99 / raw", 2},
                {"switches", "server's switches a fault", 2}});
  Random random(1);
  for (const Placement& placement : placements()) {
    std::vector<Contender> all = contenders(options, settings, image);
    for (Contender& contender : all) {
      contender.client =
          std::make_unique<Client>(*contender.server, placement.client_cpu, pages * kPageBytes, touches);
      pin(contender.server->pid(), placement.server_cpu);
    }
    const std::vector<std::uint64_t> order = shuffled(touches, random);
    for (unsigned round = 0; round < rounds; ++round) {
      std::vector<std::uint64_t> turn;
      for (unsigned i = 0; i < kTouchesPerTurn; ++i)
        turn.push_back((order[round * kTouchesPerTurn + i] + 1) * kPagesPerTouch + random() % kPagesPerTouch);
      for (std::size_t i = 0; i < all.size(); ++i) {
        Contender& contender = all[(i + round) % all.size()];
        const std::uint64_t switches_before = context_switches(contender.server->pid());
        const std::vector<std::uint32_t> ns = contender.client->touch(turn);
        contender.switches += context_switches(contender.server->pid()) - switches_before;
        contender.p50_ns.push_back(median(ns));
        contender.all_ns.insert(contender.all_ns.end(), ns.begin(), ns.end());
      }
    }
    const Contender& raw = all.front();
    for (const Contender& contender : all)
      report.row({{"placement", placement.name},
                  {"contender", contender.name},
                  {"p50_us", median(contender.all_ns) / 1000},
                  {"p99_us", quantile(contender.all_ns, 0.99) / 1000},
                  {"p50_ratio", median_ratio(contender.p50_ns, raw.p50_ns)},
                  {"p99_ratio", quantile(contender.all_ns, 0.99) / quantile(raw.all_ns, 0.99)},
                  {"switches", static_cast<double>(contender.switches) / static_cast<double>(touches)}});
  }
  report.note("p50 / raw is the median over rounds of the ratio of the two medians of the round.");
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  Settings settings;
  return run_bench(
      argc, argv, "How long does one served fault take?",
      [&](CLI::App& app) {
        app.add_option("--spin-us", settings.spin_us, "Values of uffdkit's --spin-us to measure as well")
            ->capture_default_str();
        app.add_option("--workers", settings.workers, "Values of uffdkit's --workers to measure as well")
            ->capture_default_str();
        app.add_option("--other", settings.other, "Another build of uffdkit, to compare with");
      },
      [&](const Options& options, Report& report) { measure(options, settings, report); });
}
