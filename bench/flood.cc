// What does a client that floods the manager cost a quiet one?
//
// One manager; a quiet client is timed alone and beside each flood, in turns. The quiet client and the
// manager share a CPU and the flooding client has another, where there are two: what the quiet one loses is
// what the manager spends on the flood, not what the flooding client's threads take themselves.
#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "base/clock.h"
#include "harness/bench.h"
#include "harness/client.h"
#include "harness/image.h"
#include "harness/placement.h"
#include "harness/server.h"
#include "harness/statistics.h"
#include "harness/usage.h"
#include "support/floods.h"
#include "wire/unix_socket.h"

namespace uffdkit::bench {
namespace {

constexpr unsigned kTouchesPerTurn = 250;
constexpr std::size_t kFloodedPages = 2048;
constexpr std::chrono::seconds kPatience{30};

struct Contender {
  std::string name;
  std::function<void(const test::ClientMemory&)> flood;  // none: alone
  bool stalls = false;                                   // its image does not answer meanwhile
  bool asks = true;                                      // the manager for something
  bool takes_its_cpu = false;                            // it runs where the quiet one does
  std::vector<double> p50_ns = {};
  std::vector<double> p99_ns = {};
  std::vector<std::uint32_t> all_ns = {};
  std::uint64_t messages = 0;
  double manager_seconds = 0;
  double seconds = 0;
};

// What the manager says of itself.
nlohmann::json status(const std::string& control) {
  const Result<UniqueFd> socket = connect_unix(control, kPatience);
  if (!socket) throw std::runtime_error(socket.error().text());
  const std::string request = "{\"command\":\"status\"}\n";
  if (const auto sent = send_all(socket->get(), std::as_bytes(std::span(request)), {}, kPatience); !sent)
    throw std::runtime_error(sent.error().text());
  std::string answer;
  std::array<char, 4096> piece;
  while (!answer.ends_with('\n')) {
    // The socket does not block.
    pollfd readable{.fd = socket->get(), .events = POLLIN, .revents = 0};
    (void)::poll(&readable, 1, static_cast<int>(std::chrono::milliseconds(kPatience).count()));
    const ssize_t bytes = ::read(socket->get(), piece.data(), piece.size());
    if (bytes <= 0) throw std::runtime_error("the manager does not answer");
    answer.append(piece.data(), static_cast<std::size_t>(bytes));
  }
  return nlohmann::json::parse(answer);
}

// How many messages it has read.
std::uint64_t messages(const std::string& control) {
  const nlohmann::json total = status(control).at("total");
  return total.at("faults").get<std::uint64_t>() + total.at("events").get<std::uint64_t>();
}

void wait_until(const std::string& what, const std::function<bool()>& holds) {
  const std::int64_t give_up_ns = monotonic_ns() + std::chrono::nanoseconds(kPatience).count();
  while (!holds()) {
    if (monotonic_ns() > give_up_ns) throw std::runtime_error("it does not come about that " + what);
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

class Turns {
 public:
  explicit Turns(const Options& options, std::uint64_t touches)
      : flooded_(options.directory + "/flooded", kFloodedPages),
        stalled_(options.directory + "/stalled", kFloodedPages),
        socket_(options.directory + "/flooded.sock"),
        stalled_socket_(options.directory + "/stalled.sock"),
        control_(options.directory + "/control.sock"),
        wall_(options.directory + "/wall") {
    const std::string image = options.directory + "/image";
    write_image(image, touches + 1);
    manager_ = std::make_unique<UffdkitServer>(
        options.uffdkit, options.directory, image,
        std::vector<std::string>{"--firecracker", socket_ + "=" + flooded_.path(), "--firecracker",
                                 stalled_socket_ + "=" + stalled_.path(), "--control", control_,
                                 "--fault-around", "1", "--store-fault",
                                 fmt::format("stall,image={},while={}", stalled_.path(), wall_)});
    pin(manager_->pid(), placement_.server_cpu);
    quiet_ = std::make_unique<Client>(*manager_, placement_.server_cpu, (touches + 1) * kPageBytes,
                                      kTouchesPerTurn);
  }

  void take(Contender& contender, std::span<const std::uint64_t> pages) {
    std::unique_ptr<test::Child> flood;
    if (contender.stalls && !UniqueFd(::open(wall_.c_str(), O_CREAT | O_WRONLY | O_CLOEXEC, 0600)))
      throw std::system_error(errno, std::generic_category(), wall_);
    if (contender.flood) {
      const test::Image& image = contender.stalls ? stalled_ : flooded_;
      const auto run = [&](const test::ClientMemory& memory, const test::Channel&) {
        pin(0, contender.takes_its_cpu ? placement_.server_cpu : placement_.client_cpu);
        contender.flood(memory);
      };
      flood.reset(new test::Child(
          test::client(image, test::whole(image), contender.stalls ? stalled_socket_ : socket_, run)));
      const std::uint64_t calm = messages(control_);
      const std::uint64_t begun = contender.asks ? 100 : 0;
      wait_until("the client floods", [&] { return messages(control_) >= calm + begun; });
    }
    const std::uint64_t messages_before = messages(control_);
    const std::uint64_t cpu_before = cpu_ns(manager_->pid());
    const std::int64_t begin = monotonic_ns();
    const std::vector<std::uint32_t> ns = quiet_->touch(pages);
    contender.seconds += static_cast<double>(monotonic_ns() - begin) / 1e9;
    contender.manager_seconds += static_cast<double>(cpu_ns(manager_->pid()) - cpu_before) / 1e9;
    contender.messages += messages(control_) - messages_before;
    contender.p50_ns.push_back(median(ns));
    contender.p99_ns.push_back(quantile(ns, 0.99));
    contender.all_ns.insert(contender.all_ns.end(), ns.begin(), ns.end());
    if (flood) flood->kill();
    if (contender.stalls) (void)::unlink(wall_.c_str());
    // The end of the flooding client's session is no part of the next turn.
    wait_until("its session ends", [&] { return status(control_).at("sessions").size() == 1; });
  }

 private:
  const Placement placement_ = placements().size() > 2 ? placements()[1] : placements().front();
  const test::Image flooded_;
  const test::Image stalled_;
  const std::string socket_;
  const std::string stalled_socket_;
  const std::string control_;
  const std::string wall_;
  std::unique_ptr<Server> manager_;
  std::unique_ptr<Client> quiet_;
};

// As much of a CPU as a program takes that does some work for each of many requests: half of it, in pieces of
// some microseconds.
void work_half_of_the_time(const test::ClientMemory&) {
  while (true) {
    const std::int64_t begin = monotonic_ns();
    while (monotonic_ns() - begin < 50'000) continue;
    std::this_thread::sleep_for(std::chrono::microseconds(50));
  }
}

// What a client takes by running at all, where CPUs share more than memory.
void work_for_ever(const test::ClientMemory&) {
  const std::int64_t begin = monotonic_ns();
  while (monotonic_ns() >= begin) continue;
}

void measure(const Options& options, Report& report) {
  std::vector<Contender> all = {
      {.name = "alone", .flood = {}},
      {.name = "a process that uses the other CPU", .flood = work_for_ever, .asks = false},
      {.name = "a process that uses half of its CPU",
       .flood = work_half_of_the_time,
       .asks = false,
       .takes_its_cpu = true},
      {.name = "duplicates: 4 threads with a signal", .flood = test::fault_under_signals, .stalls = true},
      {.name = "removals: 4 threads give back", .flood = test::give_back_for_ever},
      {.name = "faults: 32 threads touch and give back", .flood = test::fault_for_ever}};
  const unsigned rounds = options.rounds_or(20);
  const std::uint64_t touches = std::uint64_t{rounds} * kTouchesPerTurn * all.size();
  Turns turns(options, touches);
  Random random(6);
  const std::vector<std::uint64_t> order = shuffled(touches, random);
  std::size_t next = 0;
  for (unsigned round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < all.size(); ++i) {
      std::vector<std::uint64_t> pages;
      for (unsigned touch = 0; touch < kTouchesPerTurn; ++touch) pages.push_back(order[next++] + 1);
      turns.take(all[(i + round) % all.size()], pages);
    }

  report.table("flood",
               fmt::format("A quiet client, one page a fault, on one CPU with the manager, beside one that "
                           "floods it from another CPU; {} touches each, in turns of {}.",
                           rounds * kTouchesPerTurn, kTouchesPerTurn),
               {{"flood", "beside it"},
                {"p50_us", "p50 us", 1},
                {"p99_us", "p99 us", 1},
                {"p50_ratio", "p50 / alone", 2},
                {"p99_ratio", "p99 / alone", 2},
                {"messages_per_second", "messages a second", 0},
                {"manager_cpu_percent", "manager's CPU %", 1}});
  for (const Contender& contender : all)
    report.row({{"flood", contender.name},
                {"p50_us", median(contender.all_ns) / 1000},
                {"p99_us", quantile(contender.all_ns, 0.99) / 1000},
                {"p50_ratio", median_ratio(contender.p50_ns, all.front().p50_ns)},
                {"p99_ratio", median_ratio(contender.p99_ns, all.front().p99_ns)},
                {"messages_per_second", static_cast<double>(contender.messages) / contender.seconds},
                {"manager_cpu_percent", contender.manager_seconds / contender.seconds * 100}});
  report.note("Ratios are medians over rounds. Messages are those of all clients, the quiet one's too.");
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench(
      argc, argv, "What does a client that floods the manager cost a quiet one?", [](CLI::App&) {}, measure);
}
