// Runs the same random programs on the model of userfaultfd and on the running kernel, and compares all that
// can be seen after every operation. A disagreement is shortened, printed, and ends with status 1.
//
//   differential --programs 1000 --seed 7       programs 7, 8, ... 1006
//   differential --programs 1 --seed 42 -v      one, with all that is seen
#include <fmt/format.h>
#include <sys/utsname.h>
#include <uffdkit/error.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdio>
#include <optional>
#include <stdexcept>

#include "base/check.h"
#include "compare/machine.h"
#include "support/huge_pages.h"

namespace uffdkit::differential {
namespace {

constexpr int kSkipped = 77;

struct Disagreement {
  std::size_t at;  // index of the operation
  std::string model;
  std::string real;
};

struct Settings {
  bool huge = false;
  bool verbose = false;
  sim::KernelOptions model = {};  // what the model is like
};

std::optional<Disagreement> compare(const Program& program, std::uint64_t seed, const Settings& settings) {
  const std::unique_ptr<Machine> model = make_model(seed, settings.huge, settings.model);
  const std::unique_ptr<Machine> real = make_real(settings.huge);
  // At the end every page is looked at, when nobody's fault handler can be in the way any more.
  Program whole = program;
  for (int uffd = 0; uffd < kUffds; ++uffd) whole.push_back({.verb = Verb::close, .uffd = uffd});
  whole.push_back({.verb = Verb::dump});
  for (std::size_t i = 0; i < whole.size(); ++i) {
    const bool open = model->order_is_open(whole[i].uffd);
    std::string of_model = model->perform(whole[i], open);
    std::string of_real;
    try {
      of_real = real->perform(whole[i], open);
    } catch (const std::runtime_error& error) {
      of_real = error.what();
    }
    if (settings.verbose) fmt::print("{}\n    {}\n", to_string(whole[i]), of_real);
    if (of_model != of_real)
      return Disagreement{.at = i, .model = std::move(of_model), .real = std::move(of_real)};
  }
  return std::nullopt;
}

// Two threads that go on at the same moment may do so in either order, and now and then the order can be
// seen. What the model never does, under several seeds, is a disagreement.
std::optional<Disagreement> compare_often(const Program& program, std::uint64_t seed,
                                          const Settings& settings) {
  constexpr std::uint64_t kSeeds = 40;
  std::optional<Disagreement> found;
  for (std::uint64_t i = 0; i < kSeeds; ++i) {
    found = compare(program, seed + i, settings);
    if (!found) return std::nullopt;
  }
  return found;
}

// Leaves out whatever can be left out.
Program shorten(Program program, std::uint64_t seed, const Settings& settings) {
  for (std::size_t size = program.size() / 2; size > 0; size /= 2) {
    for (std::size_t at = 0; at < program.size();) {
      Program shorter = program;
      const auto first = shorter.begin() + static_cast<std::ptrdiff_t>(at);
      shorter.erase(first, first + static_cast<std::ptrdiff_t>(std::min(size, program.size() - at)));
      if (compare_often(shorter, seed, settings))
        program = std::move(shorter);
      else
        at += size;
    }
  }
  return program;
}

std::string running_version() {
  utsname name;
  CHECK(uname(&name) == 0);
  return name.release;
}

int run(std::uint64_t programs, std::uint64_t first_seed, std::size_t operations, double seconds,
        const Settings& settings) {
  using Clock = std::chrono::steady_clock;
  const auto started = Clock::now();
  std::uint64_t done = 0;
  for (; done < programs; ++done) {
    if (seconds > 0 && std::chrono::duration<double>(Clock::now() - started).count() > seconds) break;
    const std::uint64_t seed = first_seed + done;
    std::mt19937_64 random(seed);
    Program program = random_program(random, {.operations = operations, .huge = settings.huge});
    const auto found = compare(program, seed, settings);
    if (!found || !compare_often(program, seed, settings)) continue;

    program.resize(std::min(program.size(), found->at + 1));
    const Program shortest = shorten(program, seed, settings);
    const auto shown = compare_often(shortest, seed, settings);
    fmt::print("Program {} is not the same on the model and on the kernel. The shortest that shows it:\n{}",
               seed, to_string(shortest));
    if (shown)
      fmt::print("After operation {}\n  model:  {}\n  kernel: {}\n", shown->at + 1, shown->model,
                 shown->real);
    else
      fmt::print("It does not show every time. At first, after operation {}\n  model:  {}\n  kernel: {}\n",
                 found->at + 1, found->model, found->real);
    return 1;
  }
  fmt::print("{} programs, seeds {} to {}: the model and the kernel agree\n", done, first_seed,
             first_seed + done - 1);
  return 0;
}

int main_of(int argc, char** argv) {
  CLI::App app("Compares the model of userfaultfd with the running kernel");
  std::uint64_t programs = 1000;
  std::uint64_t seed = 1;
  std::size_t operations = 30;
  double seconds = 0;
  Settings settings;
  app.add_option("--programs", programs, "how many random programs to run");
  app.add_option("--seed", seed, "seed of the first program; the others follow it");
  app.add_option("--operations", operations, "operations in each program");
  app.add_option("--seconds", seconds, "stop after so long, if the programs are not done by then");
  app.add_flag("--huge", settings.huge, "huge pages instead of small ones");
  app.add_flag("-v,--verbose", settings.verbose, "print all that is seen");
  std::string version;
  app.add_option("--model-version", version, "which kernel the model is, as 6.12, if not the running one");
  CLI11_PARSE(app, argc, argv);

  if (version.empty()) version = running_version();
  if (std::sscanf(version.c_str(), "%d.%d", &settings.model.version.major, &settings.model.version.minor) !=
      2) {
    fmt::print(stderr, "differential: '{}' is not a version like 6.12\n", version);
    return 2;
  }

  std::string needs = lacking();
  std::optional<test::HugePages> pool;
  if (needs.empty() && settings.huge) needs = pool.emplace(8).lacking();
  if (!needs.empty()) {
    fmt::print("skipped: needs {}\n", needs);
    return kSkipped;
  }
  settings.model.reads_map_zero_page = reads_map_zero_page();
  return run(programs, seed, operations, seconds, settings);
}

}  // namespace
}  // namespace uffdkit::differential

int main(int argc, char** argv) {
  return uffdkit::differential::main_of(argc, argv);
}
