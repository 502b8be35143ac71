// How fast do the first, the second and the last of many clones of one image read all of it, and how much
// memory do they take together: sharing it, with copies of their own, and beside a file that all map.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "harness/bench.h"
#include "harness/image.h"
#include "harness/statistics.h"
#include "support/child.h"
#include "support/manager_process.h"
#include "support/temp_dir.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 1024;
  unsigned clones = 50;
  unsigned percent = 20;
};

struct Contender {
  std::string name;
  unsigned clones;
  std::optional<AttachOptions> attach;  // nothing: maps the file below
  int file = -1;
};

// Nanoseconds that it took to read a word of every page, in this order. Throws if one is wrong.
std::uint64_t touch_all(const std::byte* memory, const std::vector<std::uint64_t>& order) {
  const auto start = std::chrono::steady_clock::now();
  for (const std::uint64_t page : order) {
    std::uint64_t word = 0;
    std::memcpy(&word, memory + page * kPageBytes, sizeof word);
    if (word != stamp(page)) throw std::runtime_error(fmt::format("page {} is wrong", page));
  }
  return static_cast<std::uint64_t>((std::chrono::steady_clock::now() - start).count());
}

std::uint64_t proportional_kib(pid_t pid) {
  std::ifstream file(fmt::format("/proc/{}/smaps_rollup", pid));
  for (std::string word; file >> word;) {
    std::uint64_t kib = 0;
    if (word == "Pss:" && file >> kib) return kib;
  }
  throw std::runtime_error("no Pss in smaps_rollup");
}

// A clone in a process of its own, which stays until the test::Child is destroyed.
std::unique_ptr<test::Child> start_clone(const Contender& contender, const std::string& socket,
                                         std::uint64_t pages, const std::vector<std::uint64_t>& order) {
  return std::make_unique<test::Child>([&](const test::Channel& channel) {
    const std::size_t bytes = pages * kPageBytes;
    if (contender.attach) {
      const Result<RemoteMapping> memory = attach(socket, "image", *contender.attach);
      if (!memory) throw std::runtime_error(memory.error().text());
      channel.send(static_cast<std::uint64_t>(memory->session().sharing()));
      channel.send(touch_all(memory->data(), order));
      channel.wait_closed();
      return 0;
    }
    void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, contender.file, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("cannot map the image");
    channel.send(0);
    channel.send(touch_all(static_cast<const std::byte*>(memory), order));
    channel.wait_closed();
    return 0;
  });
}

const char* mode_name(std::uint64_t mode) {
  return mode == 0                                                     ? "-"
         : mode == static_cast<std::uint64_t>(SharingMode::page_cache) ? "page cache"
                                                                       : "resolve";
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t mib = options.smoke ? 8 : settings.mib;
  const unsigned clones = options.smoke ? 3 : settings.clones;
  const std::uint64_t pages = (mib << 20) / kPageBytes;
  const std::string image = options.directory + "/image";
  write_image(image, pages);
  const UniqueFd file(::open(image.c_str(), O_RDONLY | O_CLOEXEC));
  const UniqueFd copy(::memfd_create("bench-image", MFD_CLOEXEC));
  for (off_t at = 0; at < static_cast<off_t>(mib << 20);)
    if (::sendfile(copy.get(), file.get(), &at, (mib << 20) - static_cast<std::uint64_t>(at)) <= 0)
      throw std::runtime_error("cannot copy the image into a memory file");
  AttachOptions shared;
  shared.sharing = AttachOptions::Share::if_possible;
  AttachOptions resolved = shared;
  resolved.removed_reads_zero = true;
  // Copies of their own would take all memory if there were many.
  const std::vector<Contender> contenders = {
      {"mmap MAP_PRIVATE of the file", clones, std::nullopt, file.get()},
      {"the same of a full memory file", clones, std::nullopt, copy.get()},
      {"uffdkit, shared", clones, shared},
      {"uffdkit, shared, removed reads zero", clones, resolved},
      {"uffdkit, copies", 2, AttachOptions{}}};

  report.table(
      "clones",
      fmt::format(
          "Clones of an image of {} MiB in the page cache, one after another; each reads a word of "
          "{} % of the pages, the same for all, at random, and stays. Milliseconds; faults that reach "
          "the manager.",
          mib, settings.percent),
      {{"contender", "memory"},
       {"mode", "mode"},
       {"clones", "clones", 0},
       {"first_ms", "first ms", 1},
       {"second_ms", "second ms", 1},
       {"last_ms", "last ms", 1},
       {"first_faults", "faults of first", 0},
       {"last_faults", "of last", 0},
       {"first_mib", "PSS of first MiB", 1},
       {"together_mib", "of all", 1},
       {"together_ratio", "all / first", 2}});
  for (const Contender& contender : contenders) {
    const test::TempDir directory;
    const std::string socket = directory / "native.sock";
    const test::ManagerProcess manager(directory, {"--listen", socket, "--image", "image=" + image});
    Random random(5);
    std::vector<std::uint64_t> read = shuffled(pages, random);
    read.resize(pages * settings.percent / 100);
    std::uint64_t first_kib = 0;
    std::vector<std::unique_ptr<test::Child>> all;
    std::vector<double> ms;
    std::vector<std::uint64_t> faults;
    std::uint64_t mode = 0;
    for (unsigned i = 0; i < contender.clones; ++i) {
      std::vector<std::uint64_t> order;
      for (const std::uint64_t index : shuffled(read.size(), random)) order.push_back(read[index]);
      const std::uint64_t before = manager.total("faults");
      all.push_back(start_clone(contender, socket, pages, order));
      mode = all.back()->channel().receive();
      ms.push_back(static_cast<double>(all.back()->channel().receive()) / 1e6);
      faults.push_back(manager.total("faults") - before);
      if (i == 0) first_kib = proportional_kib(all.front()->pid());
    }
    std::uint64_t together_kib = 0;
    for (const auto& clone : all) together_kib += proportional_kib(clone->pid());
    nlohmann::ordered_json row = {
        {"contender", contender.name},
        {"mode", mode_name(mode)},
        {"clones", contender.clones},
        {"first_ms", ms[0]},
        {"second_ms", ms[1]},
        {"last_ms", ms.back()},
        {"first_mib", static_cast<double>(first_kib) / 1024},
        {"together_mib", static_cast<double>(together_kib) / 1024},
        {"together_ratio", static_cast<double>(together_kib) / static_cast<double>(first_kib)}};
    if (contender.attach) {
      row["first_faults"] = faults.front();
      row["last_faults"] = faults.back();
    }
    report.row(std::move(row));
  }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "What do clones of one image cost?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the image in MiB", 1, 1 << 16);
        add_number(app, "--percent", settings.percent, "How much of the image each clone reads", 1, 100);
        add_number(app, "--clones", settings.clones, "Number of clones", 2, 1000);
      },
      measure);
}
