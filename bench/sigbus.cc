// Does a program fill its own memory faster with a thread for it, or in a handler of SIGBUS?
#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/pager.h>
#include <uffdkit/sigbus_pager.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "harness/bench.h"
#include "harness/image.h"
#include "harness/raw_sigbus.h"
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

template <class AnyPager, class Options>
std::uint64_t touch_paged(const std::string& image, const Options& options, const Order& order,
                          unsigned threads) {
  Result<AnyPager> pager = AnyPager::create(options);
  if (!pager) throw std::runtime_error(pager.error().text());
  const auto region = pager->map(open_file_store(image).value());
  if (!region) throw std::runtime_error(region.error().text());
  return touch_all(region->data(), order, threads);
}

struct Contender {
  std::string name;
  std::function<std::uint64_t(const Order&, unsigned)> touch;
  std::vector<double> ns = {};  // of each round
};

void measure(const Options& options, std::uint64_t mib, Report& report) {
  const std::uint64_t pages = ((options.smoke ? 4 : mib) << 20) / kPageBytes;
  const unsigned rounds = options.rounds_or(9);
  const std::string image = options.directory + "/image";
  write_image(image, pages);
  const auto with_thread = [&](std::uint64_t around) {
    return [&image, around](const Order& order, unsigned threads) {
      const PagerOptions chosen{.kernel_faults = false, .fault_around = PageCount(around)};
      return touch_paged<Pager>(image, chosen, order, threads);
    };
  };
  const auto in_handler = [&](std::uint64_t around) {
    return [&image, around](const Order& order, unsigned threads) {
      const SigbusPagerOptions chosen{.fault_around = PageCount(around)};
      return touch_paged<SigbusPager>(image, chosen, order, threads);
    };
  };
  std::vector<Contender> all = {{"raw SIGBUS handler, one page",
                                 [&](const Order& order, unsigned threads) {
                                   const int file = ::open(image.c_str(), O_RDONLY | O_CLOEXEC);
                                   const void* memory = raw_sigbus_map(file, order.size() * kPageBytes);
                                   if (memory == nullptr)
                                     throw std::runtime_error("the raw handler cannot map the image");
                                   return touch_all(static_cast<const std::byte*>(memory), order, threads);
                                 }},
                                {"SigbusPager, one page", in_handler(1)},
                                {"Pager, one page", with_thread(1)},
                                {"SigbusPager as it comes", in_handler(16)},
                                {"Pager as it comes", with_thread(16)}};

  report.table("sigbus",
               fmt::format("Every page of {} MiB touched once, at random, by threads of the process itself; "
                           "image in page cache, {} rounds, scheduled freely.",
                           pages * kPageBytes >> 20, rounds),
               {{"threads", "threads", 0},
                {"contender", "who brings the pages"},
                {"us_per_page", "us a page", 2},
                {"speedup", "speed / raw", 2}});
  Random random(6);
  for (const unsigned threads : {1u, 2u, 4u}) {
    for (Contender& contender : all) contender.ns.clear();
    for (unsigned round = 0; round < rounds; ++round) {
      const Order order = shuffled(pages, random);
      for (std::size_t i = 0; i < all.size(); ++i) {
        Contender& contender = all[(i + round) % all.size()];
        // A process for each turn: a handler of SIGBUS is the process's.
        test::Child child([&](const test::Channel& channel) {
          channel.send(contender.touch(order, threads));
          return 0;
        });
        contender.ns.push_back(static_cast<double>(child.channel().receive()));
      }
    }
    for (const Contender& contender : all)
      report.row({{"threads", threads},
                  {"contender", contender.name},
                  {"us_per_page", median(contender.ns) / 1000 / static_cast<double>(pages)},
                  {"speedup", median_ratio(all[0].ns, contender.ns)}});
  }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  std::uint64_t mib = 128;
  return run_bench(
      argc, argv,
      "Does a program fill its own memory faster with a thread for it, or in a handler of SIGBUS?",
      [&](CLI::App& app) {
        app.add_option("--mib", mib, "Size of the image in MiB")
            ->check(CLI::Range(1, 1 << 20))
            ->capture_default_str();
      },
      [&](const Options& options, Report& report) { measure(options, mib, report); });
}
