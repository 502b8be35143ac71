// How large should the frames of a compressed image be, and how hard should it be compressed?
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

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 256;
  std::vector<std::string> frames = {"16K", "32K", "64K", "128K", "256K"};
  std::vector<int> levels = {-5, -1, 3, 9};
};

struct Contender {
  std::string name;
  std::string image;
  double create_seconds = 0;
  // Of each round: nanoseconds, and those of the manager's CPU time.
  std::vector<double> few_ns = {};  // a touch
  std::vector<double> few_cpu_ns = {};
  std::vector<double> all_ns = {};  // all touches
  std::vector<double> all_cpu_ns = {};
};

struct Taken {
  double ns;
  double cpu_ns;
};

// Touches these pages in a client of a new server, whose cache is empty.
Taken touch(const Options& options, const Contender& contender, std::uint64_t pages,
            const std::vector<std::uint64_t>& order) {
  const UffdkitServer server(options.uffdkit, options.directory, contender.image, {});
  Client client(server, kAnyCpu, pages * kPageBytes, order.size());
  const std::uint64_t before = cpu_ns(server.pid());
  const std::uint64_t ns = client.touch_all(order, 1);
  return {static_cast<double>(ns), static_cast<double>(cpu_ns(server.pid()) - before)};
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t bytes = (options.smoke ? 4 : settings.mib) << 20;
  const std::uint64_t pages = bytes / kPageBytes;
  const std::string raw = options.directory + "/raw";
  write_program_image(raw, pages);
  std::vector<Contender> all = {{.name = "raw", .image = raw}};
  const std::vector<std::string> frames =
      options.smoke ? std::vector<std::string>{"16K", "128K"} : settings.frames;
  for (const std::string& frame : frames)
    for (const int level : frame == "64K" ? settings.levels : std::vector{-1}) {
      Contender& contender =
          all.emplace_back(Contender{.name = fmt::format("{} frames, level {:2}", frame, level),
                                     .image = fmt::format("{}/{}.{}", options.directory, frame, level)});
      contender.create_seconds = create_image(options.uffdkit, raw, contender.image,
                                              {"--frame-size", frame, "--level", std::to_string(level)});
    }

  Random random(3);
  const unsigned rounds = options.smoke ? 1 : options.rounds_or(3);
  for (unsigned round = 0; round < rounds; ++round) {
    const std::vector<std::uint64_t> order = shuffled(pages, random);
    // Pages that no other touch brings along.
    std::vector<std::uint64_t> few;
    for (std::uint64_t page = 0; page < pages; page += 256) few.push_back(page + order[page / 256] % 256);
    std::ranges::shuffle(few, random);
    for (std::size_t i = 0; i < all.size(); ++i) {
      Contender& contender = all[(i + round) % all.size()];
      const auto touches = static_cast<double>(few.size());
      const Taken some = touch(options, contender, pages, few);
      contender.few_ns.push_back(some.ns / touches);
      contender.few_cpu_ns.push_back(some.cpu_ns / touches);
      const Taken every = touch(options, contender, pages, order);
      contender.all_ns.push_back(every.ns);
      contender.all_cpu_ns.push_back(every.cpu_ns);
    }
  }

  const auto raw_bytes = static_cast<double>(std::filesystem::file_size(raw));
  report.table(
      "frames",
      fmt::format("{} MiB of program files as memory; image in page cache, nothing decompressed yet, {} "
                  "rounds, scheduled freely.",
                  bytes >> 20, rounds),
      {{"image", "image"},
       {"ratio", "memory / file", 2},
       {"create_mib_per_second", "create MiB/s", 0},
       {"single_touch_us", "one in MiB: us a touch", 1},
       {"single_cpu_us", "manager's CPU us", 1},
       {"single_ratio", "time / raw", 2},
       {"all_seconds", "all at random: s", 2},
       {"all_cpu_seconds", "manager's CPU s", 2},
       {"all_speed", "speed / raw", 2}});
  for (const Contender& contender : all) {
    nlohmann::ordered_json row = {
        {"image", contender.name},
        {"ratio", raw_bytes / static_cast<double>(std::filesystem::file_size(contender.image))},
        {"single_touch_us", median(contender.few_ns) / 1000},
        {"single_cpu_us", median(contender.few_cpu_ns) / 1000},
        {"single_ratio", median_ratio(contender.few_ns, all[0].few_ns)},
        {"all_seconds", median(contender.all_ns) / 1e9},
        {"all_cpu_seconds", median(contender.all_cpu_ns) / 1e9},
        {"all_speed", median_ratio(all[0].all_ns, contender.all_ns)}};
    if (contender.create_seconds > 0)
      row["create_mib_per_second"] = static_cast<double>(bytes >> 20) / contender.create_seconds;
    report.row(std::move(row));
  }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How large should frames of images be?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the memory in MiB", 1, 1 << 20);
        app.add_option("--frame", settings.frames, "Frame sizes; repeatable")->capture_default_str();
        app.add_option("--level", settings.levels, "Levels, of 64K frames; repeatable")
            ->capture_default_str();
      },
      measure);
}
