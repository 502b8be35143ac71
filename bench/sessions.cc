// What do idle sessions cost: a busy one beside them, and the manager?
#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <memory>
#include <string>
#include <thread>
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
constexpr std::uint64_t kIdleBytes = 256u << 20;
constexpr unsigned kIdleSmokeMax = 100;
// What a manager counts for each, and for all else.
constexpr rlim_t kDescriptorsPerSession = 4;
constexpr rlim_t kDescriptorsBeside = 100;

// So many idle sessions may a manager have here.
unsigned idle_sessions_max() {
  rlimit limit;
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_max <= kDescriptorsBeside) return 0;
  return static_cast<unsigned>(
      std::min<rlim_t>((limit.rlim_max - kDescriptorsBeside) / kDescriptorsPerSession, 1'000'000));
}

constexpr std::chrono::milliseconds kIdleBefore{20'000};
constexpr std::chrono::milliseconds kIdleTime{15'000};

struct Contender {
  unsigned idle_sessions;
  std::unique_ptr<Server> server;
  double state_bytes = 0;  // growth by the idle sessions
  double other_bytes = 0;
  double idle_cpu = 0;  // seconds of CPU in a second, with nothing to do
  std::unique_ptr<Client> idle = {};
  std::unique_ptr<Client> busy = {};
  std::vector<double> p50_ns = {};
  std::vector<std::uint32_t> all_ns = {};
};

void measure(const Options& options, const std::vector<unsigned>& idle_sessions, Report& report) {
  const unsigned rounds = options.rounds_or(60);
  const std::uint64_t touches = std::uint64_t{rounds} * kTouchesPerTurn;
  const std::uint64_t pages = std::max<std::uint64_t>(touches + 1, kIdleBytes / kPageBytes);
  const Placement placement = same_cpu();
  const std::string image = options.directory + "/image";
  write_image(image, pages);

  std::vector<Contender> all;
  for (const unsigned wanted : idle_sessions) {
    if (options.smoke && wanted > kIdleSmokeMax) continue;
    const unsigned count = std::min(wanted, idle_sessions_max());
    all.push_back({count, std::make_unique<UffdkitServer>(options.uffdkit, options.directory, image,
                                                          std::vector<std::string>{"--fault-around", "1"})});
    Contender& contender = all.back();
    const pid_t manager = contender.server->pid();
    const MemoryUse before = memory_use(manager);
    if (count > 0)
      contender.idle = std::make_unique<Client>(*contender.server, kAnyCpu, kIdleBytes, 1, count);
    const MemoryUse after = memory_use(manager);
    contender.state_bytes = static_cast<double>(after.state_bytes - before.state_bytes);
    contender.other_bytes =
        static_cast<double>(after.private_bytes) - static_cast<double>(before.private_bytes);
    pin(manager, placement.server_cpu);
    contender.busy =
        std::make_unique<Client>(*contender.server, placement.client_cpu, pages * kPageBytes, touches);
  }
  // Clients that do nothing are looked at less and less often.
  std::this_thread::sleep_for(options.smoke ? std::chrono::milliseconds(100) : kIdleBefore);
  for (Contender& contender : all) contender.idle_cpu = -static_cast<double>(cpu_ns(contender.server->pid()));
  std::this_thread::sleep_for(options.smoke ? std::chrono::milliseconds(100) : kIdleTime);
  for (Contender& contender : all) {
    contender.idle_cpu += static_cast<double>(cpu_ns(contender.server->pid()));
    contender.idle_cpu /= std::chrono::duration<double, std::nano>(kIdleTime).count();
  }
  Random random(4);
  // Apart from each other, so that nothing looks like a stream.
  const std::uint64_t stride = pages / (touches + 1);
  const std::vector<std::uint64_t> order = shuffled(touches, random);
  for (unsigned round = 0; round < rounds; ++round) {
    std::vector<std::uint64_t> turn;
    for (unsigned i = 0; i < kTouchesPerTurn; ++i)
      turn.push_back((order[round * kTouchesPerTurn + i] + 1) * stride);
    for (std::size_t i = 0; i < all.size(); ++i) {
      Contender& contender = all[(i + round) % all.size()];
      const std::vector<std::uint32_t> ns = contender.busy->touch(turn);
      contender.p50_ns.push_back(median(ns));
      contender.all_ns.insert(contender.all_ns.end(), ns.begin(), ns.end());
    }
  }

  report.table(
      "sessions",
      fmt::format("A busy client, one page a fault, on one CPU with its manager, which has idle sessions "
                  "of {} MiB each, one page touched, besides.",
                  kIdleBytes >> 20),
      {{"idle_sessions", "idle sessions", 0},
       {"p50_us", "p50 us", 1},
       {"p99_us", "p99 us", 1},
       {"p50_ratio", "p50 / without", 2},
       {"state_kib_per_session", "state KiB a session", 1},
       {"other_kib_per_session", "other KiB a session", 1},
       {"idle_cpu_percent", "idle manager's CPU %", 3}});
  for (const Contender& contender : all) {
    nlohmann::ordered_json row = {{"idle_sessions", contender.idle_sessions},
                                  {"p50_us", median(contender.all_ns) / 1000},
                                  {"p99_us", quantile(contender.all_ns, 0.99) / 1000},
                                  {"p50_ratio", median_ratio(contender.p50_ns, all.front().p50_ns)},
                                  {"idle_cpu_percent", contender.idle_cpu * 100}};
    if (contender.idle_sessions > 0) {
      row["state_kib_per_session"] = contender.state_bytes / 1024 / contender.idle_sessions;
      row["other_kib_per_session"] = contender.other_bytes / 1024 / contender.idle_sessions;
    }
    report.row(std::move(row));
  }
  report.note("Memory in the kernel (descriptors, inodes, epoll entries) is not counted.");
  if (all.back().idle_sessions < idle_sessions.back())
    report.note(
        fmt::format("The limit on open files does not let the manager have {}.", idle_sessions.back()));
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  std::vector<unsigned> idle_sessions = {0, 1, 100, 1000, 5000};
  return run_bench(
      argc, argv, "What do idle sessions cost?",
      [&](CLI::App& app) {
        app.add_option("--idle", idle_sessions,
                       "Numbers of idle sessions; the first is what the others are compared with")
            ->capture_default_str();
      },
      [&](const Options& options, Report& report) { measure(options, idle_sessions, report); });
}
