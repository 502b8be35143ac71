// How soon is a job done that touches part of its memory at random, from a cold disk: when what it touches
// was recorded before, and in other ways? And what does a fault wait while that is brought?
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "harness/bench.h"
#include "harness/client.h"
#include "harness/image.h"
#include "harness/placement.h"
#include "harness/server.h"
#include "harness/statistics.h"
#include "harness/working_set.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 1024;
  unsigned percent = 25;
  bool faults_only = false;
};

using Pages = std::vector<std::uint64_t>;
using Strings = std::vector<std::string>;

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::uint64_t now_ns() {
  return static_cast<std::uint64_t>(std::chrono::steady_clock::now().time_since_epoch() /
                                    std::chrono::nanoseconds(1));
}

// ---- the ways ---------------------------------------------------------------------------------------------

void touch(const std::byte* memory, const Pages& order) {
  for (const std::uint64_t page : order) {
    std::uint64_t word = 0;
    std::memcpy(&word, memory + page * kPageBytes, sizeof word);
    if (word != stamp(page)) throw std::runtime_error(fmt::format("page {} is not the image's", page));
  }
}

// All of the file into memory, then the job.
double read_first(const std::string& image, std::uint64_t bytes, const Pages& order) {
  const UniqueFd file(::open(image.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) fail("open " + image);
  const std::uint64_t start = now_ns();
  void* memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) fail("mmap");
  for (std::uint64_t at = 0; at < bytes;) {
    const ssize_t read = ::pread(file.get(), static_cast<char*>(memory) + at,
                                 std::min<std::uint64_t>(bytes - at, 1u << 20), static_cast<off_t>(at));
    if (read <= 0) fail("read " + image);
    at += static_cast<std::uint64_t>(read);
  }
  touch(static_cast<const std::byte*>(memory), order);
  const std::uint64_t end = now_ns();
  ::munmap(memory, bytes);
  return static_cast<double>(end - start);
}

double map_file(const std::string& image, std::uint64_t bytes, const Pages& order) {
  const UniqueFd file(::open(image.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) fail("open " + image);
  const std::uint64_t start = now_ns();
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file.get(), 0);
  if (memory == MAP_FAILED) fail("map " + image);
  touch(static_cast<const std::byte*>(memory), order);
  const std::uint64_t end = now_ns();
  ::munmap(memory, bytes);
  return static_cast<double>(end - start);
}

double serve(const Options& options, const std::string& image, const Strings& arguments, std::uint64_t bytes,
             const Pages& order) {
  const UffdkitServer server(options.uffdkit, options.directory, image, arguments);
  drop_from_page_cache(image);
  Client client(server, kAnyCpu, bytes, order.size());
  const std::uint64_t ns = client.attach_ns() + client.touch_all(order, 1);
  return static_cast<double>(ns);
}

// ---- the questions ----------------------------------------------------------------------------------------

struct Way {
  std::string name;
  std::function<double()> run;
  std::vector<double> ns = {};
};

void measure_job(const Options& options, const std::string& raw, const std::string& compressed,
                 std::uint64_t bytes, const Settings& settings, Report& report) {
  const unsigned rounds = options.rounds_or(3);
  Random random(7);
  Pages order = shuffled(bytes / kPageBytes, random);
  order.resize(std::max<std::size_t>(1, order.size() * settings.percent / 100));
  record_working_set(options, raw, bytes, order);
  record_working_set(options, compressed, bytes, order);
  const auto served = [&](const std::string& image, const Strings& arguments) {
    return [&options, &order, image, arguments, bytes] {
      return serve(options, image, arguments, bytes, order);
    };
  };
  const Strings cache = {"--image-cache", std::to_string(bytes / 4)};
  const auto with = [](Strings arguments, const Strings& more) {
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  };
  std::vector<Way> ways = {
      {"uffdkit, one page a fault", served(raw, {"--fault-around", "1", "--no-prefetch"})},
      {"uffdkit, with neighbours", served(raw, {"--no-prefetch"})},
      {"uffdkit, working set", served(raw, {})},
      {"all of it read first", [&] { return drop_from_page_cache(raw), read_first(raw, bytes, order); }},
      {"mmap MAP_PRIVATE of the file",
       [&] { return drop_from_page_cache(raw), map_file(raw, bytes, order); }},
      {"uffdkit, compressed", served(compressed, with(cache, {"--no-prefetch"}))},
      {"uffdkit, compressed, working set", served(compressed, cache)}};
  for (unsigned round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < ways.size(); ++i) {
      Way& way = ways[(i + round) % ways.size()];
      way.ns.push_back(way.run());
    }
  report.table(
      "working_set_job",
      fmt::format("A job that touches {} % of {} MiB at random, by one thread; page cache dropped; {} "
                  "rounds, scheduled freely. The working set is that of the same job.",
                  settings.percent, bytes >> 20, rounds),
      {{"way", "how"},
       {"seconds", "s", 3},
       {"seconds_min", "least", 3},
       {"seconds_max", "most", 3},
       {"speed", "speed / one page a fault", 2}});
  for (const Way& way : ways)
    report.row({{"way", way.name},
                {"seconds", median(way.ns) / 1e9},
                {"seconds_min", *std::ranges::min_element(way.ns) / 1e9},
                {"seconds_max", *std::ranges::max_element(way.ns) / 1e9},
                {"speed", median_ratio(ways[0].ns, way.ns)}});
}

// Faults for pages that are not in the working set, while it is brought.
void measure_faults(const Options& options, const std::string& raw, std::uint64_t bytes,
                    const Settings& settings, Report& report) {
  // A p99 of a disk differs from run to run.
  const unsigned rounds = options.rounds_or(9);
  Random random(8);
  const Pages order = shuffled(bytes / kPageBytes, random);
  const std::size_t in_set = std::max<std::size_t>(1, order.size() * settings.percent / 100);
  const std::size_t touched = std::max<std::size_t>(1, order.size() / 200);
  record_working_set(options, raw, bytes,
                     Pages(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(in_set)));
  const Pages others(order.end() - static_cast<std::ptrdiff_t>(touched), order.end());
  report.table("working_set_faults",
               fmt::format("{} faults one after another for pages that are not in a working set of {} MiB, "
                           "alone and while that is brought; {} rounds.",
                           touched, in_set * kPageBytes >> 20, rounds),
               {{"cache", "image"},
                {"way", "meanwhile"},
                {"p50", "p50 us", 1},
                {"p99", "p99 us", 1},
                {"p99_ratio", "p99 / alone", 2}});
  for (const bool cold : {false, true}) {
    std::vector<double> p50[2];
    std::vector<double> p99[2];
    for (unsigned round = 0; round < rounds; ++round)
      for (const bool loaded : {false, true}) {
        Strings arguments = {"--fault-around", "1"};
        if (!loaded) arguments.emplace_back("--no-prefetch");
        const UffdkitServer server(options.uffdkit, options.directory, raw, arguments);
        if (cold) drop_from_page_cache(raw);
        if (!cold) (void)read_first(raw, bytes, {});
        Client client(server, kAnyCpu, bytes, others.size());
        const std::vector<std::uint32_t> ns = client.touch(others);
        p50[loaded].push_back(quantile(ns, 0.5) / 1000);
        p99[loaded].push_back(quantile(ns, 0.99) / 1000);
      }
    for (const bool loaded : {false, true})
      report.row({{"cache", cold ? "cold disk" : "page cache"},
                  {"way", loaded ? "the working set is brought" : "nothing"},
                  {"p50", median(p50[loaded])},
                  {"p99", median(p99[loaded])},
                  {"p99_ratio", median_ratio(p99[loaded], p99[0])}});
  }
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t bytes = (options.smoke ? 16 : settings.mib) << 20;
  const std::string raw = options.directory + "/raw";
  const std::string compressed = options.directory + "/compressed";
  write_program_image(raw, bytes / kPageBytes);
  if (!settings.faults_only) create_image(options.uffdkit, raw, compressed, {});
  if (!settings.faults_only) measure_job(options, raw, compressed, bytes, settings, report);
  measure_faults(options, raw, bytes, settings, report);
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How soon is a job done whose pages were recorded before?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the memory in MiB", 1, 1 << 20);
        add_number(app, "--percent", settings.percent, "How much of it the job touches", 1, 100);
        app.add_flag("--faults-only", settings.faults_only,
                     "Leave the job out, and ask only what a fault waits meanwhile");
      },
      measure);
}
