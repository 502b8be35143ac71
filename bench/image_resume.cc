// Is a resume from a compressed image as fast as from a raw one, in page cache and from a cold disk, by
// faults alone and with a working set?
#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
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
#include "harness/working_set.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 1024;
  unsigned percent = 25;
  std::vector<std::string> create = {};
};

enum class State : std::uint8_t { decompressed, page_cache, cold };

const char* name_of(State state) {
  switch (state) {
    case State::decompressed:
      return "another client had it before";
    case State::page_cache:
      return "file in page cache";
    case State::cold:
      return "cold disk";
  }
  return "";
}

struct Taken {
  double ns;
  double cpu_ns;  // of the manager
};

// From handing the memory over until the job is done.
Taken resume(const Options& options, const std::string& image, State state, bool working_set,
             std::uint64_t pages, const std::vector<std::uint64_t>& order) {
  std::vector<std::string> arguments = {"--image-cache", std::to_string(pages * kPageBytes * 2)};
  if (!working_set) arguments.emplace_back("--no-prefetch");
  const UffdkitServer server(options.uffdkit, options.directory, image, arguments);
  const auto job = [&] {
    Client client(server, kAnyCpu, pages * kPageBytes, order.size());
    const std::uint64_t before = cpu_ns(server.pid());
    const std::uint64_t ns = client.attach_ns() + client.touch_all(order, 1);
    return Taken{static_cast<double>(ns), static_cast<double>(cpu_ns(server.pid()) - before)};
  };
  if (state == State::decompressed) job();
  if (state == State::cold) drop_from_page_cache(image);
  return job();
}

struct Contender {
  std::string image;
  std::vector<double> ns = {};
  std::vector<double> cpu_ns = {};
};

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t bytes = (options.smoke ? 16 : settings.mib) << 20;
  const std::uint64_t pages = bytes / kPageBytes;
  const unsigned rounds = options.rounds_or(3);
  const std::string raw = options.directory + "/raw";
  const std::string compressed = options.directory + "/compressed";
  write_program_image(raw, pages);
  create_image(options.uffdkit, raw, compressed, settings.create);
  Random random(4);
  std::vector<std::uint64_t> order = shuffled(pages, random);
  order.resize(std::max<std::uint64_t>(1, pages * settings.percent / 100));
  record_working_set(options, raw, bytes, order);
  record_working_set(options, compressed, bytes, order);

  report.table(
      "image_resume",
      fmt::format("A job that touches {} % of {} MiB at random, by one thread, {} rounds, scheduled freely; "
                  "the image is {:.2f} times as small as the memory.",
                  settings.percent, bytes >> 20, rounds,
                  static_cast<double>(bytes) / static_cast<double>(std::filesystem::file_size(compressed))),
      {{"way", "how"},
       {"state", "before"},
       {"raw_seconds", "raw s", 3},
       {"compressed_seconds", "compressed s", 3},
       {"raw_cpu_seconds", "raw: manager's CPU s", 3},
       {"compressed_cpu_seconds", "compressed: manager's CPU s", 3},
       {"speed", "compressed: speed / raw", 2}});
  for (const bool working_set : {false, true})
    for (const State state : {State::decompressed, State::page_cache, State::cold}) {
      Contender all[] = {{raw}, {compressed}};
      for (unsigned round = 0; round < rounds; ++round)
        for (unsigned i = 0; i < 2; ++i) {
          Contender& contender = all[(i + round) % 2];
          const Taken taken = resume(options, contender.image, state, working_set, pages, order);
          contender.ns.push_back(taken.ns);
          contender.cpu_ns.push_back(taken.cpu_ns);
        }
      report.row({{"way", working_set ? "working set" : "faults alone"},
                  {"state", name_of(state)},
                  {"raw_seconds", median(all[0].ns) / 1e9},
                  {"compressed_seconds", median(all[1].ns) / 1e9},
                  {"raw_cpu_seconds", median(all[0].cpu_ns) / 1e9},
                  {"compressed_cpu_seconds", median(all[1].cpu_ns) / 1e9},
                  {"speed", median_ratio(all[0].ns, all[1].ns)}});
    }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  Settings settings;
  return run_bench(
      argc, argv, "Is a resume from a compressed image as fast as from a raw one?",
      [&](CLI::App& app) {
        app.add_option("--mib", settings.mib, "Size of the memory in MiB")
            ->check(CLI::Range(1, 1 << 20))
            ->capture_default_str();
        app.add_option("--percent", settings.percent, "How much of it the job touches")
            ->check(CLI::Range(1, 100))
            ->capture_default_str();
        app.add_option("--create", settings.create, "Options of uffdkit image create");
      },
      [&](const Options& options, Report& report) { measure(options, settings, report); });
}
