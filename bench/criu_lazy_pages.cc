// How long does a lazily restored process take to do its work, and to have all of its memory?
//
// Beside uffdkit stands a plain daemon, bench/plain/lazy_pages.cc, which goes about it as criu does; the real
// one of Debian does not run on current kernels. Times are from the end of the restore. Every byte that the
// process reads is compared. Work that waits for the memory to be complete has no time of its own.
#include <fmt/format.h>

#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/clock.h"
#include "harness/bench.h"
#include "harness/statistics.h"
#include "support/criu_restorer.h"
#include "support/lazy_pages.h"
#include "support/paths.h"
#include "support/sanitizers.h"

namespace uffdkit::bench {
namespace {

using test::CriuTask;
using test::CriuWork;

struct Shape {
  std::string name;
  CriuWork work;
  bool waits;  // the work ends when somebody says that the memory is complete
};

const std::vector<Shape> kShapes = {
    {"idle", CriuWork::idle, true},       {"sequential", CriuWork::sequential, false},
    {"random", CriuWork::random, false},  {"four threads", CriuWork::threads, false},
    {"fork loop", CriuWork::forks, true}, {"remap, unmap, DONTNEED", CriuWork::changes, false}};

struct Settings {
  std::uint64_t mib = 1024;
  std::vector<std::string> shapes;
};

struct Contender {
  std::string name;
  std::vector<std::string> command;
  std::vector<double> work_ms = {};
  std::vector<double> complete_ms = {};
};

// Restores of the plain daemon that may fail in a row: it is as plain as it looks, and now and then loses a
// page of a process that changes its memory meanwhile.
constexpr int kPlainFailuresMax = 3;

void restore(const std::string& directory, const CriuTask& task, Contender& contender) {
  test::LazyPages daemon(contender.command, directory + "/log");
  test::CriuRestore restore(directory, {task}, {});
  const bool worked = restore.wait_released() && restore.wait_worked();
  const int code = daemon.wait();
  const std::int64_t complete_ns = monotonic_ns() - restore.released_at_ns();
  if (!worked || code != 0 || restore.finish() != 0)
    throw std::runtime_error(fmt::format("{}: a restore failed: {}", contender.name, daemon.log()));
  contender.work_ms.push_back(static_cast<double>(restore.work_ns(0)) / 1e6);
  contender.complete_ms.push_back(static_cast<double>(complete_ns) / 1e6);
}

void restore_plain(const std::string& directory, const CriuTask& task, Contender& plain, Report& report) {
  for (int failures = 0;; ++failures) {
    try {
      return restore(directory, task, plain);
    } catch (const std::runtime_error& error) {
      if (failures == kPlainFailuresMax) throw;
      report.note(fmt::format("Done again: {}", error.what()));
    }
  }
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t mib = options.smoke ? 8 : settings.mib;
  CriuTask task{.pid = 100,
                .areas = {{.address = Address(0x200000000000), .pages = mib * 256, .dense = true}}};
  test::write_criu_checkpoint(options.directory, {task});
  report.table("shapes", fmt::format("A process of {} MiB, each shape of work after another restore", mib),
               {{"shape", "work"},
                {"contender", "daemon"},
                {"work_ms", "work done, ms", 0},
                {"work_speedup", "speed / plain", 2},
                {"complete_ms", "memory complete, ms", 0},
                {"complete_speedup", "speed / plain", 2}});
  for (const Shape& shape : kShapes) {
    if (!settings.shapes.empty() && std::ranges::find(settings.shapes, shape.name) == settings.shapes.end())
      continue;
    task.work = shape.work;
    std::vector<Contender> all = {
        {.name = "plain", .command = {test::built("plain_lazy_pages"), "-D", options.directory}},
        {.name = "uffdkit", .command = {options.uffdkit, "criu", "lazy-pages", "-D", options.directory}}};
    // A sanitizer's look for leaks is no system call that serving needs.
    if (test::kSanitized) all[1].command.emplace_back("--no-sandbox");
    for (unsigned round = 0; round < options.rounds_or(5); ++round) {
      restore_plain(options.directory, task, all[0], report);
      restore(options.directory, task, all[1]);
    }
    for (const Contender& contender : all) {
      nlohmann::ordered_json row = {
          {"shape", shape.name},
          {"contender", contender.name},
          {"complete_ms", median(contender.complete_ms)},
          {"complete_speedup", median(all[0].complete_ms) / median(contender.complete_ms)}};
      if (!shape.waits) {
        row["work_ms"] = median(contender.work_ms);
        row["work_speedup"] = median(all[0].work_ms) / median(contender.work_ms);
      }
      report.row(std::move(row));
    }
  }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How soon has a lazily restored process done its work, and all of its memory?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Memory of the process in MiB", 1, 1 << 20);
        app.add_option("--shape", settings.shapes, "Only this one; repeatable");
      },
      measure);
}
