// How long does one served fault take, next to the plainest handler in the same place?
#include <fmt/format.h>

#include <algorithm>
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
// Of each thread. It takes a hundred of them until the scheduler lets all threads run: before that there is
// one that faults, and the others wait for the CPU, which no fault's time shows.
constexpr unsigned kTouchesPerThread = 500;
constexpr unsigned kThreadsMax = 4;

struct Settings {
  std::vector<std::string> spin_us = {"0"};
  std::vector<std::string> workers = {"1", "8", "16"};
  std::string other = {};
  bool one_page_only = false;  // and of the raw loops only the first
};

struct Contender {
  std::string name;
  std::unique_ptr<Server> server;
  std::unique_ptr<Client> client = {};
  std::vector<double> p50_ns = {};   // of each round
  std::vector<double> mean_ns = {};  // likewise
  std::vector<double> took_ns = {};  // likewise, from the first touch to the last one
  std::vector<std::uint32_t> all_ns = {};
  std::uint64_t server_switches = 0;
  std::uint64_t client_switches = 0;

  void take_turn(const std::vector<std::uint64_t>& pages, unsigned threads) {
    const std::uint64_t server_before = context_switches(server->pid());
    const std::uint64_t client_before = client->context_switches();
    const std::vector<std::uint32_t> ns = client->touch(pages, threads);
    server_switches += context_switches(server->pid()) - server_before;
    client_switches += client->context_switches() - client_before;
    p50_ns.push_back(median(ns));
    mean_ns.push_back(mean(ns));
    took_ns.push_back(static_cast<double>(client->took_ns()));
    all_ns.insert(all_ns.end(), ns.begin(), ns.end());
  }
  void forget() {
    p50_ns.clear();
    mean_ns.clear();
    took_ns.clear();
    all_ns.clear();
    server_switches = client_switches = 0;
  }
};

std::vector<Contender> contenders(const Options& options, const Settings& settings,
                                  const std::string& image) {
  std::vector<Contender> all;
  all.push_back({"raw read+pread+COPY", std::make_unique<RawServer>(RAW_READ, image)});
  if (!settings.one_page_only) {
    all.push_back({"raw read+COPY, nothing read", std::make_unique<RawServer>(RAW_MEMORY, image)});
    all.push_back({"raw poll+read+pread+COPY", std::make_unique<RawServer>(RAW_POLL, image)});
  }
  const auto add = [&](const std::string& binary, const std::string& name,
                       const std::vector<std::string>& arguments) {
    all.push_back({name, std::make_unique<UffdkitServer>(binary, options.directory, image, arguments)});
  };
  add(options.uffdkit, "uffdkit, one page a fault", {"--fault-around", "1"});
  if (!settings.one_page_only) add(options.uffdkit, "uffdkit as it comes", {});
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

const std::vector<Column> kColumns = {{"placement", "client and server"},
                                      {"contender", "who serves"},
                                      {"p50_us", "p50 us", 1},
                                      {"p99_us", "p99 us", 1},
                                      {"mean_us", "mean us", 1},
                                      {"p50_ratio", "p50 / raw", 2},
                                      {"p99_ratio", "p99 / raw", 2},
                                      {"mean_ratio", "mean / raw", 2},
                                      {"took_ratio", "all of them / raw", 2},
                                      {"server_switches", "switches a fault: server's", 2},
                                      {"switches", "client's too", 2}};

nlohmann::ordered_json row_of(const Placement& placement, const Contender& contender, const Contender& raw) {
  const auto faults = static_cast<double>(contender.all_ns.size());
  return {{"placement", placement.name},
          {"contender", contender.name},
          {"p50_us", median(contender.all_ns) / 1000},
          {"p99_us", quantile(contender.all_ns, 0.99) / 1000},
          {"mean_us", mean(contender.all_ns) / 1000},
          {"p50_ratio", median_ratio(contender.p50_ns, raw.p50_ns)},
          {"p99_ratio", quantile(contender.all_ns, 0.99) / quantile(raw.all_ns, 0.99)},
          {"mean_ratio", median_ratio(contender.mean_ns, raw.mean_ns)},
          {"took_ratio", median_ratio(contender.took_ns, raw.took_ns)},
          {"server_switches", static_cast<double>(contender.server_switches) / faults},
          {"switches", static_cast<double>(contender.server_switches + contender.client_switches) / faults}};
}

void start_clients(std::vector<Contender>& all, const Placement& placement, std::uint64_t pages,
                   std::size_t touches_max) {
  for (Contender& contender : all) {
    contender.client =
        std::make_unique<Client>(*contender.server, placement.client_cpu, pages * kPageBytes, touches_max);
    pin(contender.server->pid(), placement.server_cpu);
  }
}

// One thread of the client, and all ways to serve it.
void measure_one(const Options& options, const Settings& settings, const std::string& image,
                 std::uint64_t pages, unsigned rounds, Report& report) {
  const std::uint64_t touches = std::uint64_t{rounds} * kTouchesPerTurn;
  report.table("fault_latency",
               fmt::format("One fault at a time, {} of each in turns of {}; image in page cache.", touches,
                           kTouchesPerTurn),
               kColumns);
  Random random(1);
  for (const Placement& placement : placements()) {
    std::vector<Contender> all = contenders(options, settings, image);
    start_clients(all, placement, pages, kTouchesPerTurn);
    const std::vector<std::uint64_t> order = shuffled(touches, random);
    for (unsigned round = 0; round < rounds; ++round) {
      std::vector<std::uint64_t> turn;
      for (unsigned i = 0; i < kTouchesPerTurn; ++i)
        turn.push_back((order[round * kTouchesPerTurn + i] + 1) * kPagesPerTouch + random() % kPagesPerTouch);
      for (std::size_t i = 0; i < all.size(); ++i) all[(i + round) % all.size()].take_turn(turn, 1);
    }
    for (const Contender& contender : all) report.row(row_of(placement, contender, all.front()));
  }
  report.note(
      "p50 / raw is the median over rounds of the ratio of the two medians of the round, mean / raw that of "
      "the two means.");
}

// Several threads, which fault at once.
void measure_threads(const Options& options, const std::string& image, std::uint64_t pages, unsigned rounds,
                     Report& report) {
  report.table("fault_latency_threads",
               fmt::format("Threads of one client that fault at once, one page a fault, {} of each thread in "
                           "turns of {}.",
                           std::uint64_t{rounds} * kTouchesPerThread, kTouchesPerThread),
               [] {
                 std::vector<Column> columns = kColumns;
                 columns.insert(columns.begin() + 1, {"threads", "threads", 0});
                 return columns;
               }());
  const Settings settings = {.spin_us = {}, .workers = {"8"}, .one_page_only = true};
  Random random(2);
  for (const Placement& placement : placements()) {
    std::vector<Contender> all = contenders(options, settings, image);
    start_clients(all, placement, pages, std::size_t{kTouchesPerThread} * kThreadsMax);
    const std::vector<std::uint64_t> order = shuffled(pages - 1, random);
    auto next = order.begin();
    for (unsigned threads = 1; threads <= kThreadsMax; ++threads) {
      for (Contender& contender : all) contender.forget();
      for (unsigned round = 0; round < rounds; ++round) {
        std::vector<std::uint64_t> turn;
        while (turn.size() < std::size_t{kTouchesPerThread} * threads) turn.push_back(*next++ + 1);
        for (std::size_t i = 0; i < all.size(); ++i) all[(i + round) % all.size()].take_turn(turn, threads);
      }
      for (const Contender& contender : all) {
        nlohmann::ordered_json row = row_of(placement, contender, all.front());
        row["threads"] = threads;
        report.row(std::move(row));
      }
    }
  }
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const unsigned rounds = options.rounds_or(60);
  const unsigned rounds_of_threads = std::max(1u, rounds / 4);
  const std::uint64_t pages = 1 + std::max((std::uint64_t{rounds} * kTouchesPerTurn + 1) * kPagesPerTouch,
                                           std::uint64_t{rounds_of_threads} * kTouchesPerThread *
                                               kThreadsMax * (kThreadsMax + 1) / 2);
  const std::string image = options.directory + "/image";
  write_image(image, pages);
  measure_one(options, settings, image, pages, rounds, report);
  measure_threads(options, image, pages, rounds_of_threads, report);
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How long does one served fault take?",
      [](CLI::App& app, Settings& settings) {
        app.add_option("--spin-us", settings.spin_us, "Values of uffdkit's --spin-us to measure as well")
            ->capture_default_str();
        app.add_option("--workers", settings.workers, "Values of uffdkit's --workers to measure as well")
            ->capture_default_str();
        app.add_option("--other", settings.other, "Another build of uffdkit, to compare with");
      },
      measure);
}
