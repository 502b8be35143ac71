// Does a program fill its own memory faster with a thread for it, in a handler of SIGBUS, or by mprotect(2)
// in one of SIGSEGV? And how many mappings does its memory have meanwhile?
#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/pager.h>
#include <uffdkit/sigbus_pager.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "harness/bench.h"
#include "harness/image.h"
#include "harness/raw_sigbus.h"
#include "harness/raw_sigsegv.h"
#include "harness/statistics.h"
#include "support/child.h"

namespace uffdkit::bench {
namespace {

using Order = std::vector<std::uint64_t>;

// Nanoseconds that `threads` threads took to read a word of every page, each an equal part of the order.
std::uint64_t touch_all(const std::byte* memory, const Order& order, unsigned threads) {
  std::vector<std::uint64_t> wrong(threads, 0);
  const auto start = std::chrono::steady_clock::now();
  {
    std::vector<std::jthread> all;
    for (unsigned t = 0; t < threads; ++t)
      all.emplace_back([&, t] {
        for (std::size_t i = t; i < order.size(); i += threads) {
          std::uint64_t word = 0;
          std::memcpy(&word, memory + order[i] * kPageBytes, sizeof word);
          if (word != stamp(order[i])) ++wrong[t];
        }
      });
  }
  const auto took = std::chrono::steady_clock::now() - start;
  if (std::ranges::any_of(wrong, [](std::uint64_t count) { return count != 0; }))
    throw std::runtime_error("a page has wrong bytes");
  return static_cast<std::uint64_t>(took.count());
}

// Memory that shows the image, for as long as somebody holds it.
using Memory = std::shared_ptr<const std::byte>;

template <class AnyPager, class Options>
Memory map_paged(const std::string& image, const Options& options) {
  Result<AnyPager> pager = AnyPager::create(options);
  if (!pager) throw std::runtime_error(pager.error().text());
  auto region = pager->map(open_file_store(image).value());
  if (!region) throw std::runtime_error(region.error().text());
  auto kept = std::make_shared<decltype(std::pair(*std::move(pager), *std::move(region)))>(
      *std::move(pager), *std::move(region));
  return {kept, kept->second.data()};
}

Memory map_raw(void* (*map)(int, std::size_t), const std::string& image, std::size_t bytes) {
  const int file = ::open(image.c_str(), O_RDONLY | O_CLOEXEC);
  void* memory = map(file, bytes);
  if (memory == nullptr) throw std::runtime_error("the raw handler cannot map the image");
  return {Memory(), static_cast<const std::byte*>(memory)};
}

std::uint64_t mappings() {
  std::ifstream maps("/proc/self/maps");
  return static_cast<std::uint64_t>(
      std::count(std::istreambuf_iterator<char>(maps), std::istreambuf_iterator<char>(), '\n'));
}

struct Contender {
  std::string name;
  std::function<Memory()> map;
  std::vector<double> ns = {};  // of each round
};

// What `work` says in a process of its own: a handler of a signal is the process's.
std::uint64_t in_a_process(const std::function<std::uint64_t()>& work) {
  const test::Child child([&](const test::Channel& channel) {
    channel.send(work());
    return 0;
  });
  return child.channel().receive();
}

void measure(const Options& options, std::uint64_t mib, Report& report) {
  const std::uint64_t bytes = (options.smoke ? 4 : mib) << 20;
  const std::uint64_t pages = bytes / kPageBytes;
  const unsigned rounds = options.rounds_or(9);
  const std::string image = options.directory + "/image";
  write_image(image, pages);
  const auto with_thread = [&](std::uint64_t around) {
    return [&image, around] {
      return map_paged<Pager>(image, PagerOptions{.kernel_faults = false, .fault_around = PageCount(around)});
    };
  };
  const auto in_handler = [&](std::uint64_t around) {
    return [&image, around] {
      return map_paged<SigbusPager>(image, SigbusPagerOptions{.fault_around = PageCount(around)});
    };
  };
  std::vector<Contender> all = {
      {"raw SIGBUS handler, one page", [&] { return map_raw(raw_sigbus_map, image, bytes); }},
      {"PROT_NONE, SIGSEGV, mprotect", [&] { return map_raw(raw_sigsegv_map, image, bytes); }},
      {"SigbusPager, one page", in_handler(1)},
      {"Pager, one page", with_thread(1)},
      {"SigbusPager as it comes", in_handler(16)},
      {"Pager as it comes", with_thread(16)}};
  constexpr std::size_t kMprotect = 1;
  Random random(6);
  std::vector<std::uint64_t> added_mappings;
  const Order half = [&] {
    Order order = shuffled(pages, random);
    order.resize(pages / 2);
    return order;
  }();
  for (const Contender& contender : all)
    added_mappings.push_back(in_a_process([&] {
      const std::uint64_t before = mappings();
      const Memory memory = contender.map();
      touch_all(memory.get(), half, 1);
      return mappings() - before;
    }));

  report.table("sigbus",
               fmt::format("Every page of {} MiB touched once, at random, by threads of the process itself; "
                           "image in page cache, {} rounds, scheduled freely.",
                           pages * kPageBytes >> 20, rounds),
               {{"threads", "threads", 0},
                {"contender", "who brings the pages"},
                {"us_per_page", "us a page", 2},
                {"speedup", "speed / raw", 2},
                {"speed_mprotect", "speed / mprotect", 2},
                {"mappings", "mappings", 0}});
  for (const unsigned threads : {1u, 2u, 4u}) {
    for (Contender& contender : all) contender.ns.clear();
    for (unsigned round = 0; round < rounds; ++round) {
      const Order order = shuffled(pages, random);
      for (std::size_t i = 0; i < all.size(); ++i) {
        Contender& contender = all[(i + round) % all.size()];
        contender.ns.push_back(static_cast<double>(
            in_a_process([&] { return touch_all(contender.map().get(), order, threads); })));
      }
    }
    for (std::size_t i = 0; i < all.size(); ++i)
      report.row({{"threads", threads},
                  {"contender", all[i].name},
                  {"us_per_page", median(all[i].ns) / 1000 / static_cast<double>(pages)},
                  {"speedup", median_ratio(all[0].ns, all[i].ns)},
                  {"speed_mprotect", median_ratio(all[kMprotect].ns, all[i].ns)},
                  {"mappings", added_mappings[i]}});
  }
  report.note(
      "Mappings are those that the process has more than before when half of the pages have been touched.");
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  std::uint64_t mib = 128;
  return run_bench(
      argc, argv,
      "Does a program fill its own memory faster with a thread for it, in a handler of SIGBUS, or by "
      "mprotect in "
      "one of SIGSEGV?",
      [&](CLI::App& app) { add_number(app, "--mib", mib, "Size of the image in MiB", 1, 1 << 20); },
      [&](const Options& options, Report& report) { measure(options, mib, report); });
}
