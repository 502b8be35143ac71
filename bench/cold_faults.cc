// What do clients of one image wait for that fault at once, with a cold disk, and what does the manager spend
// on it: with io_uring, and with threads alone?
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "harness/bench.h"
#include "harness/client.h"
#include "harness/image.h"
#include "harness/placement.h"
#include "harness/server.h"
#include "harness/statistics.h"
#include "harness/usage.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 512;
  std::uint64_t faults = 8000;
};

constexpr unsigned kThreadsPerClient = 8;

struct Way {
  std::string name;
  std::vector<std::string> arguments;
};

struct Samples {
  std::vector<double> per_second;
  std::vector<double> cpu_us;
};

void measure(const Options& options, const Settings& settings, Report& report) {
  const unsigned rounds = options.rounds_or(5);
  const std::uint64_t pages = ((options.smoke ? 8 : settings.mib) << 20) / kPageBytes;
  const std::string image = options.directory + "/image";
  write_image(image, pages);
  const std::vector<Way> ways = {{"threads", {"--no-io-uring"}}, {"io_uring", {}}};
  Random random(8);
  report.table(
      "cold_faults",
      fmt::format("Pages of {} MiB touched at random, each once, by clients of one image; page cache "
                  "dropped, {} rounds, scheduled freely.",
                  pages * kPageBytes >> 20, rounds),
      {{"around", "pages a fault"},
       {"clients", "clients"},
       {"threads", "threads of each"},
       {"way", "what waits for the disk"},
       {"per_second", "faults/s", 0},
       {"ratio", "speed / threads", 2},
       {"cpu_us", "manager's CPU us a fault", 1},
       {"cpu_ratio", "CPU / threads", 2}});
  for (const char* around : {"1", "16"})
    for (const unsigned clients : {1u, 4u})
      for (const unsigned threads : {1u, kThreadsPerClient}) {
        std::vector<Samples> samples(ways.size());
        for (unsigned round = 0; round < rounds; ++round)
          for (std::size_t i = 0; i < ways.size(); ++i) {
            const std::size_t which = (i + round) % ways.size();
            std::vector<std::string> arguments = ways[which].arguments;
            arguments.insert(arguments.end(), {"--no-prefetch", "--fault-around", around});
            const UffdkitServer server(options.uffdkit, options.directory, image, arguments);
            drop_from_page_cache(image);
            std::vector<std::uint64_t> order = shuffled(pages, random);
            order.resize(std::min<std::size_t>(order.size(), options.smoke ? 64 : settings.faults));
            const std::size_t share = order.size() / clients;
            std::vector<std::unique_ptr<Client>> all;
            for (unsigned client = 0; client < clients; ++client)
              all.push_back(std::make_unique<Client>(server, kAnyCpu, pages * kPageBytes, share));
            const std::uint64_t cpu = cpu_ns(server.pid());
            const std::int64_t start = monotonic_ns();
            {
              std::vector<std::jthread> running;
              for (unsigned client = 0; client < clients; ++client)
                running.emplace_back([&, client] {
                  all[client]->touch_all(std::span(order).subspan(client * share, share), threads);
                });
            }
            const auto faults = static_cast<double>(share * clients);
            samples[which].per_second.push_back(faults * 1e9 / static_cast<double>(monotonic_ns() - start));
            samples[which].cpu_us.push_back(static_cast<double>(cpu_ns(server.pid()) - cpu) / 1000 / faults);
          }
        for (std::size_t i = 0; i < ways.size(); ++i)
          report.row({{"around", around},
                      {"clients", clients},
                      {"threads", threads},
                      {"way", ways[i].name},
                      {"per_second", median(samples[i].per_second)},
                      {"ratio", median_ratio(samples[i].per_second, samples[0].per_second)},
                      {"cpu_us", median(samples[i].cpu_us)},
                      {"cpu_ratio", median_ratio(samples[i].cpu_us, samples[0].cpu_us)}});
      }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "What do faults cost that wait for a cold disk together?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the memory in MiB", 1, 1 << 20);
        add_number(app, "--faults", settings.faults, "Pages that are touched, of all clients", 1, 1 << 20);
      },
      measure);
}
