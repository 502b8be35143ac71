// How soon has a client gone through its memory in order, from a cold disk, of which nothing was recorded?
#include <fmt/format.h>

#include <algorithm>
#include <functional>
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
  std::uint64_t mib = 256;
};

using Pages = std::vector<std::uint64_t>;
using Strings = std::vector<std::string>;

struct Walk {
  std::string name;
  Pages pages;
};

std::vector<Walk> walks(std::uint64_t pages) {
  Random random(5);
  Walk forwards{"forwards", {}};
  Walk backwards{"backwards", {}};
  Walk steps{"each 40th page", {}};
  for (std::uint64_t page = 0; page < pages; ++page) {
    forwards.pages.push_back(page);
    backwards.pages.push_back(pages - 1 - page);
    if (page % 40 == 0) steps.pages.push_back(page);
  }
  Walk at_random{"at random, a twentieth", shuffled(pages, random)};
  at_random.pages.resize(pages / 20);
  return {std::move(forwards), std::move(backwards), std::move(steps), std::move(at_random)};
}

struct Way {
  std::string name;
  Strings arguments;
  bool compressed = false;
};

void measure(const Options& options, const Settings& settings, Report& report) {
  const unsigned rounds = options.rounds_or(3);
  const std::uint64_t bytes = (options.smoke ? 8 : settings.mib) << 20;
  const std::string raw = options.directory + "/raw";
  const std::string compressed = options.directory + "/compressed";
  write_program_image(raw, bytes / kPageBytes);
  create_image(options.uffdkit, raw, compressed, {});
  const std::vector<Way> ways = {{"raw, streams left to faults", {"--no-prefetch"}},
                                 {"raw, streams brought ahead of", {}},
                                 {"compressed, streams left to faults", {"--no-prefetch"}, true},
                                 {"compressed, streams brought ahead of", {}, true}};
  report.table(
      "in_order",
      fmt::format("A client that goes through {} MiB once, by one thread; {} rounds, scheduled freely.",
                  bytes >> 20, rounds),
      {{"cache", "image"},
       {"walk", "walk"},
       {"way", "how"},
       {"seconds", "s", 3},
       {"seconds_min", "least", 3},
       {"seconds_max", "most", 3},
       {"speed", "speed / left to faults", 2}});
  for (const bool cold : {true, false})
    for (const Walk& walk : walks(bytes / kPageBytes)) {
      std::vector<std::vector<double>> ns(ways.size());
      for (unsigned round = 0; round < rounds; ++round)
        for (std::size_t i = 0; i < ways.size(); ++i) {
          const std::size_t which = (i + round) % ways.size();
          const std::string& image = ways[which].compressed ? compressed : raw;
          const UffdkitServer server(options.uffdkit, options.directory, image, ways[which].arguments);
          if (cold) drop_from_page_cache(image);
          Client client(server, kAnyCpu, bytes, walk.pages.size());
          // What was dropped is in the page cache again after the first client.
          ns[which].push_back(static_cast<double>(client.touch_all(walk.pages, 1)));
        }
      for (std::size_t i = 0; i < ways.size(); ++i)
        report.row({{"cache", cold ? "cold disk" : "page cache"},
                    {"walk", walk.name},
                    {"way", ways[i].name},
                    {"seconds", median(ns[i]) / 1e9},
                    {"seconds_min", *std::ranges::min_element(ns[i]) / 1e9},
                    {"seconds_max", *std::ranges::max_element(ns[i]) / 1e9},
                    {"speed", median_ratio(ns[i / 2 * 2], ns[i])}});
    }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How soon has a client gone through its memory in order?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the memory in MiB", 1, 1 << 20);
      },
      measure);
}
