// How fast does memory fill that is touched all over, by one, two, four threads; and how much comes uncalled
// for when only some of it is touched?
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "harness/bench.h"
#include "harness/client.h"
#include "harness/image.h"
#include "harness/placement.h"
#include "harness/server.h"
#include "harness/statistics.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 1024;
  std::vector<unsigned> threads = {1, 2, 4};
  // Options of uffdkit serve, without their dashes; the first is what the others are compared with.
  std::vector<std::string> variants = {
      "fault-around=1",  "fault-around=8",   "fault-around=16",          "fault-around=32",
      "fault-around=64", "fault-around=128", "fault-around=1,spin-us=0", "fault-around=16,spin-us=0"};
};

struct Contender {
  std::string name;
  std::unique_ptr<Server> server;
  std::vector<double> ns = {};       // of each round
  std::vector<double> brought = {};  // pages, likewise
};

std::vector<Contender> contenders(const Options& options, const Settings& settings,
                                  const std::string& image) {
  std::vector<Contender> all;
  all.push_back({"raw, one page a fault", std::make_unique<RawServer>(RAW_READ, image)});
  for (const std::string& variant : settings.variants) {
    std::vector<std::string> arguments = CLI::detail::split(variant, ',');
    for (std::string& argument : arguments) argument = "--" + argument;
    all.push_back({"uffdkit " + CLI::detail::join(arguments, " "),
                   std::make_unique<UffdkitServer>(options.uffdkit, options.directory, image, arguments)});
  }
  return all;
}

// Every contender serves a new client that touches `touched` pages at random; in every round the same ones.
void run_rounds(std::vector<Contender>& all, unsigned rounds, std::uint64_t pages, std::uint64_t touched,
                unsigned threads, const Placement& placement, Random& random) {
  for (Contender& contender : all) {
    pin(contender.server->pid(), placement.server_cpu);
    contender.ns.clear();
    contender.brought.clear();
  }
  for (unsigned round = 0; round < rounds; ++round) {
    std::vector<std::uint64_t> order = shuffled(pages, random);
    order.resize(touched);
    for (std::size_t i = 0; i < all.size(); ++i) {
      Contender& contender = all[(i + round) % all.size()];
      Client client(*contender.server, placement.client_cpu, pages * kPageBytes, touched);
      contender.ns.push_back(static_cast<double>(client.touch_all(order, threads)));
      contender.brought.push_back(static_cast<double>(client.resident_pages()));
    }
  }
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t pages = (options.smoke ? 16 : settings.mib) * (1u << 20) / kPageBytes;
  const unsigned rounds = options.smoke ? 1 : options.rounds_or(3);
  const std::string image = options.directory + "/image";
  write_image(image, pages);
  std::vector<Contender> all = contenders(options, settings, image);
  Random random(2);

  report.table("full_touch",
               fmt::format("Every page of {} MiB touched once, at random; image in page cache, {} rounds, "
                           "scheduled freely.",
                           pages * kPageBytes >> 20, rounds),
               {{"threads", "threads", 0},
                {"contender", "who serves"},
                {"seconds", "seconds", 2},
                {"seconds_min", "least", 2},
                {"seconds_max", "most", 2},
                {"pages_per_second", "pages/s", 0},
                {"speedup", "speed / raw", 2},
                {"speedup_one_page", "speed / own one page", 2}});
  for (const unsigned threads : options.smoke ? std::vector<unsigned>{2} : settings.threads) {
    run_rounds(all, rounds, pages, pages, threads, placements().back(), random);
    for (const Contender& contender : all) {
      const double seconds = median(contender.ns) / 1e9;
      report.row({{"threads", threads},
                  {"contender", contender.name},
                  {"seconds", seconds},
                  {"seconds_min", *std::ranges::min_element(contender.ns) / 1e9},
                  {"seconds_max", *std::ranges::max_element(contender.ns) / 1e9},
                  {"pages_per_second", static_cast<double>(pages) / seconds},
                  {"speedup", median_ratio(all[0].ns, contender.ns)},
                  {"speedup_one_page", median_ratio(all[1].ns, contender.ns)}});
    }
  }

  report.table(
      "partial_touch",
      fmt::format(
          "Some pages of {} MiB touched at random by one thread, on one CPU with the server: what comes "
          "uncalled for.",
          pages * kPageBytes >> 20),
      {{"touched_percent", "touched %", 0},
       {"contender", "who serves"},
       {"touched_mib", "touched MiB", 1},
       {"brought_mib", "brought MiB", 1},
       {"brought_per_touched", "brought / touched", 2},
       {"us_per_touch", "us a touch", 1},
       {"speedup", "speed / raw", 2}});
  for (const unsigned percent : {1u, 10u, 25u}) {
    const std::uint64_t touched = std::max<std::uint64_t>(pages * percent / 100, 1);
    run_rounds(all, rounds, pages, touched, 1, same_cpu(), random);
    for (const Contender& contender : all) {
      const double brought = median(contender.brought);
      const auto mib = [](double count) { return count * kPageBytes / (1 << 20); };
      report.row({{"touched_percent", percent},
                  {"contender", contender.name},
                  {"touched_mib", mib(static_cast<double>(touched))},
                  {"brought_mib", mib(brought)},
                  {"brought_per_touched", brought / static_cast<double>(touched)},
                  {"us_per_touch", median(contender.ns) / 1000 / static_cast<double>(touched)},
                  {"speedup", median_ratio(all[0].ns, contender.ns)}});
    }
  }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How fast does memory fill that is touched at random?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the image in MiB", 1, 1 << 20);
        app.add_option("--threads", settings.threads, "Numbers of touching threads")->capture_default_str();
        app.add_option(
               "--variant", settings.variants,
               "Arguments of uffdkit serve, as one word; repeatable. The first is what the others are "
               "compared with")
            ->capture_default_str();
      },
      measure);
}
