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
#include "image/working_set.h"

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

enum class Way : std::uint8_t { faults_alone, working_set, stored_apart };

const char* name_of(Way way) {
  switch (way) {
    case Way::faults_alone:
      return "faults alone";
    case Way::working_set:
      return "working set";
    case Way::stored_apart:
      return "working set, stored for itself";
  }
  return "";
}

struct Image {
  std::string path;
  std::vector<std::string> files;  // that it is made of
};

// From handing the memory over until the job is done.
Taken resume(const Options& options, const Image& image, State state, Way way, std::uint64_t pages,
             const std::vector<std::uint64_t>& order) {
  std::vector<std::string> arguments = {"--image-cache", std::to_string(pages * kPageBytes * 2)};
  if (way == Way::faults_alone) arguments.emplace_back("--no-prefetch");
  const UffdkitServer server(options.uffdkit, options.directory, image.path, arguments);
  const auto job = [&] {
    Client client(server, kAnyCpu, pages * kPageBytes, order.size());
    const std::uint64_t before = cpu_ns(server.pid());
    const std::uint64_t ns = client.attach_ns() + client.touch_all(order, 1);
    return Taken{static_cast<double>(ns), static_cast<double>(cpu_ns(server.pid()) - before)};
  };
  if (state == State::decompressed) job();
  if (state == State::cold) std::ranges::for_each(image.files, drop_from_page_cache);
  return job();
}

struct Contender {
  Image image;
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
  // The same files by another name, beside which the set is stored.
  const std::string with_set = options.directory + "/with-set";
  for (const char* suffix : {"", image::kWorkingSetSuffix})
    std::filesystem::create_hard_link(compressed + suffix, with_set + suffix);
  const std::string stored = store_working_set(options.uffdkit, with_set);
  const auto mib_of = [](const std::string& file) {
    return static_cast<double>(std::filesystem::file_size(file)) / (1 << 20);
  };

  report.table(
      "image_resume",
      fmt::format("A job that touches {} % of {} MiB at random, by one thread, {} rounds, scheduled freely; "
                  "the image has {:.0f} MiB, and the working set, stored for itself, {:.0f} more.",
                  settings.percent, bytes >> 20, rounds, mib_of(compressed), mib_of(stored)),
      {{"way", "how"},
       {"state", "before"},
       {"raw_seconds", "raw s", 3},
       {"compressed_seconds", "compressed s", 3},
       {"raw_cpu_seconds", "raw: manager's CPU s", 3},
       {"compressed_cpu_seconds", "compressed: manager's CPU s", 3},
       {"speed", "compressed: speed / raw", 2}});
  for (const Way way : {Way::faults_alone, Way::working_set, Way::stored_apart})
    for (const State state : {State::decompressed, State::page_cache, State::cold}) {
      const Image image =
          way == Way::stored_apart ? Image{with_set, {with_set, stored}} : Image{compressed, {compressed}};
      Contender all[] = {{{raw, {raw}}}, {image}};
      for (unsigned round = 0; round < rounds; ++round)
        for (unsigned i = 0; i < 2; ++i) {
          Contender& contender = all[(i + round) % 2];
          const Taken taken = resume(options, contender.image, state, way, pages, order);
          contender.ns.push_back(taken.ns);
          contender.cpu_ns.push_back(taken.cpu_ns);
        }
      report.row({{"way", name_of(way)},
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
  return run_bench<Settings>(
      argc, argv, "Is a resume from a compressed image as fast as from a raw one?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the memory in MiB", 1, 1 << 20);
        add_number(app, "--percent", settings.percent, "How much of it the job touches", 1, 100);
        app.add_option("--create", settings.create, "Options of uffdkit image create");
      },
      measure);
}
