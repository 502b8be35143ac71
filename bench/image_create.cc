// How soon is an image made of a raw memory file, by one thread and by all CPUs, and how soon is it raw
// again? Beside the zstd command, at the same level.
#include <fmt/format.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "harness/bench.h"
#include "harness/image.h"
#include "harness/statistics.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 512;
};

struct Contender {
  std::string name;
  std::vector<std::string> create;
  std::vector<std::string> verify;
  std::string image;
  std::vector<double> create_seconds = {};
  std::vector<double> verify_seconds = {};
};

std::vector<Contender> contenders(const Options& options, const std::string& raw) {
  std::vector<Contender> all;
  const auto add = [&](const std::string& name, const std::string& file) -> Contender& {
    return all.emplace_back(
        Contender{.name = name, .create = {}, .verify = {}, .image = options.directory + "/" + file});
  };
  for (const auto& [name, threads] : {std::pair{"1 thread", "1"}, std::pair{"all CPUs", "0"}}) {
    Contender& ours = add(fmt::format("uffdkit image, {}", name), fmt::format("ours.{}", threads));
    ours.create = {options.uffdkit, "image", "create", "--force", "--threads",
                   threads,         "--raw", raw,      ours.image};
    ours.verify = {options.uffdkit, "image", "verify", "--threads", threads, ours.image};
  }
  for (const auto& [name, threads] : {std::pair{"1 thread", "-T1"}, std::pair{"all CPUs", "-T0"}}) {
    Contender& zstd = add(fmt::format("zstd --fast=1, {}", name), fmt::format("zstd{}", threads));
    zstd.create = {"zstd", "-q", "-f", "--fast=1", threads, raw, "-o", zstd.image};
    zstd.verify = {"zstd", "-q", "-t", zstd.image};
  }
  return all;
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t mib = options.smoke ? 4 : settings.mib;
  const unsigned rounds = options.rounds_or(5);
  const std::string raw = options.directory + "/raw";
  write_program_image(raw, (mib << 20) / kPageBytes);
  std::vector<Contender> all = contenders(options, raw);
  for (unsigned round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < all.size(); ++i) {
      Contender& contender = all[(i + round) % all.size()];
      contender.create_seconds.push_back(run_command(contender.create));
      contender.verify_seconds.push_back(run_command(contender.verify));
    }

  report.table("image_create",
               fmt::format("{} MiB of program files as memory, in page cache, {} rounds.", mib, rounds),
               {{"who", "who"},
                {"create_mib_per_second", "create MiB/s", 0},
                {"create_speed", "speed / ours by one", 2},
                {"verify_mib_per_second", "verify MiB/s", 0},
                {"verify_speed", "speed / ours by one", 2},
                {"ratio", "memory / file", 2}});
  const auto size = static_cast<double>(mib);
  for (const Contender& contender : all)
    report.row(
        {{"who", contender.name},
         {"create_mib_per_second", size / median(contender.create_seconds)},
         {"create_speed", median_ratio(all[0].create_seconds, contender.create_seconds)},
         {"verify_mib_per_second", size / median(contender.verify_seconds)},
         {"verify_speed", median_ratio(all[0].verify_seconds, contender.verify_seconds)},
         {"ratio", size * (1 << 20) / static_cast<double>(std::filesystem::file_size(contender.image))}});
  report.note(
      "An image has a checksum for each frame and a hash of its memory, and any page of it can be read "
      "alone. zstd "
      "decompresses by one thread.");
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How soon is an image made, and verified?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "How much memory", 1, 1 << 20);
      },
      measure);
}
