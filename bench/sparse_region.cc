// Does a terabyte cost more than a gigabyte: for a fault, for attaching, in memory for page states?
#include <fmt/format.h>

#include <algorithm>
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

constexpr unsigned kTouchesPerTurn = 50;

struct Contender {
  std::string region;
  std::string name;
  const std::vector<std::uint64_t>* order;  // the pages to touch
  std::unique_ptr<Server> server;
  std::unique_ptr<Client> client = {};
  std::size_t against = 0;  // the contender that this one is compared with
  MemoryUse before = {};
  std::vector<double> p50_ns = {};
  std::vector<std::uint32_t> all_ns = {};
};

std::string size_text(std::uint64_t bytes) {
  return bytes >> 40 != 0 ? fmt::format("{} TiB", bytes >> 40) : fmt::format("{} GiB", bytes >> 30);
}

void measure(const Options& options, const std::vector<std::uint64_t>& gib, Report& report) {
  const unsigned rounds = options.rounds_or(40);
  const std::uint64_t touches = std::uint64_t{rounds} * kTouchesPerTurn;
  const Placement placement = same_cpu();
  Random random(3);

  struct Shape {
    std::string name;
    std::uint64_t bytes;
    bool scattered;  // over the whole region; or as close together as in the first shape
    std::vector<std::uint64_t> order = {};
  };
  std::vector<Shape> shapes = {{"1 GiB", 1ull << 30, true}};
  for (const std::uint64_t size : gib) {
    shapes.push_back({size_text(size << 30) + ", a part of it", size << 30, false});
    shapes.push_back({size_text(size << 30) + ", all over", size << 30, true});
  }
  std::vector<Contender> all;
  for (Shape& shape : shapes) {
    // Different pages, none of them the first, which attaching touches.
    const std::uint64_t spread = (shape.scattered ? shape.bytes : shapes[0].bytes) / kPageBytes;
    const std::uint64_t stride = spread / (touches + 1);
    for (const std::uint64_t i : shuffled(touches, random)) shape.order.push_back((i + 1) * stride);
    const std::string image = fmt::format("{}/image-{}", options.directory, all.size());
    std::vector<std::uint64_t> data = shape.order;
    data.push_back(0);
    std::sort(data.begin(), data.end());
    write_sparse_image(image, shape.bytes, data);

    const std::size_t raw = all.size();
    all.push_back(
        {shape.name, "raw read+pread+COPY", &shape.order, std::make_unique<RawServer>(RAW_READ, image)});
    all.push_back({shape.name, "uffdkit, one page a fault", &shape.order,
                   std::make_unique<UffdkitServer>(options.uffdkit, options.directory, image,
                                                   std::vector<std::string>{"--fault-around", "1"})});
    for (std::size_t i = raw; i < all.size(); ++i) {
      Contender& contender = all[i];
      contender.against = raw;
      pin(contender.server->pid(), placement.server_cpu);
      contender.before = memory_use(contender.server->pid());
      contender.client =
          std::make_unique<Client>(*contender.server, placement.client_cpu, shape.bytes, touches);
    }
  }
  for (unsigned round = 0; round < rounds; ++round) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      Contender& contender = all[(i + round) % all.size()];
      const std::vector<std::uint32_t> ns = contender.client->touch(
          std::span(*contender.order).subspan(round * kTouchesPerTurn, kTouchesPerTurn));
      contender.p50_ns.push_back(median(ns));
      contender.all_ns.insert(contender.all_ns.end(), ns.begin(), ns.end());
    }
  }

  report.table("sparse_region",
               fmt::format("{} pages of a sparse image touched one at a time, on one CPU.", touches),
               {{"region", "region"},
                {"contender", "who serves"},
                {"attach_us", "attach us", 0},
                {"p50_us", "p50 us", 1},
                {"p50_ratio", "p50 / raw there", 2},
                {"p50_ratio_small", "p50 / own of 1 GiB", 2},
                {"state_kib", "page states KiB", 0},
                {"state_bytes_per_touch", "bytes a touched page", 1},
                {"other_kib", "other growth KiB", 0}});
  for (std::size_t i = 0; i < all.size(); ++i) {
    const Contender& contender = all[i];
    nlohmann::ordered_json row = {
        {"region", contender.region},
        {"contender", contender.name},
        {"attach_us", static_cast<double>(contender.client->attach_ns()) / 1000},
        {"p50_us", median(contender.all_ns) / 1000},
        {"p50_ratio", median_ratio(contender.p50_ns, all[contender.against].p50_ns)},
        {"p50_ratio_small", median_ratio(contender.p50_ns, all[i % 2].p50_ns)}};
    if (i != contender.against) {
      const MemoryUse after = memory_use(contender.server->pid());
      const double state = static_cast<double>(after.state_bytes - contender.before.state_bytes);
      row["state_kib"] = state / 1024;
      row["state_bytes_per_touch"] = state / static_cast<double>(touches);
      row["other_kib"] =
          (static_cast<double>(after.private_bytes) - static_cast<double>(contender.before.private_bytes)) /
          1024;
    }
    report.row(std::move(row));
  }
  report.note(
      "Attaching is timed from making the memory until its first page is there. Page states are 256 bytes "
      "for each 2 MiB of which a page was touched, side by side in a sparse file, and 4 bytes for every 2 "
      "MiB "
      "in a directory whose pages cover 2 GiB each. The client's own page tables, which the kernel makes in "
      "the same fault, grow likewise; hence the raw loop in the same region.");
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  std::vector<std::uint64_t> gib = {64, 1024};
  return run_bench(
      argc, argv, "Does a terabyte cost more than a gigabyte?",
      [&](CLI::App& app) {
        add_number(app, "--gib", gib, "Sizes of the large regions in GiB", 1, 16 * 1024 - 1);
      },
      [&](const Options& options, Report& report) { measure(options, gib, report); });
}
