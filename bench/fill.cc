// How fast is memory filled that nobody waits for, next to a loop that does nothing else?
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "base/clock.h"
#include "harness/bench.h"
#include "harness/client.h"
#include "harness/image.h"
#include "harness/placement.h"
#include "harness/server.h"
#include "harness/statistics.h"
#include "support/child.h"

namespace uffdkit::bench {
namespace {

constexpr std::uint64_t kRunBytes = 64 * kPageBytes;

struct Settings {
  std::uint64_t mib = 1024;
};

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// A process that fills one client's memory from its start to its end, 64 pages at a time.
class RawFiller final : public Server {
 public:
  enum class From : std::uint8_t { file, mapping };

  RawFiller(From from, const std::string& image, std::uint64_t bytes)
      : child_([&](const test::Channel& parent) { return run(from, image, bytes, parent); }) {}
  pid_t pid() const override { return child_.pid(); }
  bool non_blocking() const override { return true; }
  UniqueFd hand_over(int uffd, AddressRange memory) const override {
    child_.channel().send_fd(memory.start.value, uffd);
    return {};
  }
  // Fills all but the first page, which the client has; nanoseconds that it took.
  std::uint64_t fill() const {
    child_.channel().send(0);
    return child_.channel().receive();
  }

 private:
  static void copy(int uffd, std::uint64_t to, const char* from, std::uint64_t bytes) {
    uffdio_copy copy = {
        .dst = to, .src = reinterpret_cast<std::uintptr_t>(from), .len = bytes, .mode = 0, .copy = 0};
    if (::ioctl(uffd, UFFDIO_COPY, &copy) != 0) fail("UFFDIO_COPY");
  }

  static int run(From from, const std::string& image, std::uint64_t bytes, const test::Channel& parent) {
    const UniqueFd file(::open(image.c_str(), O_RDONLY | O_CLOEXEC));
    if (!file) fail("open " + image);
    void* mapped = ::mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file.get(), 0);
    if (mapped == MAP_FAILED) fail("map " + image);
    const auto* image_bytes = static_cast<const char*>(mapped);
    std::vector<char> buffer(kRunBytes);
    std::uint64_t start = 0;
    const UniqueFd uffd = parent.receive_fd(start);
    copy(uffd.get(), start, image_bytes, kPageBytes);

    (void)parent.receive();
    const std::int64_t begin = monotonic_ns();
    for (std::uint64_t at = kPageBytes; at < bytes;) {
      const std::uint64_t run = std::min(kRunBytes - at % kRunBytes, bytes - at);
      const char* source = image_bytes + at;
      if (from == From::file) {
        if (::pread(file.get(), buffer.data(), run, static_cast<off_t>(at)) != static_cast<ssize_t>(run))
          fail("read " + image);
        source = buffer.data();
      }
      copy(uffd.get(), start + at, source, run);
      at += run;
    }
    parent.send(static_cast<std::uint64_t>(monotonic_ns() - begin));
    return 0;
  }

  test::Child child_;
};

// Has a manager complete the memory of its client; nanoseconds from the signal to its exit.
std::uint64_t complete(const UffdkitServer& server) {
  const UniqueFd process(static_cast<int>(::syscall(SYS_pidfd_open, server.pid(), 0)));
  if (!process) fail("pidfd_open");
  const std::int64_t begin = monotonic_ns();
  if (::kill(server.pid(), SIGTERM) != 0) fail("end the manager");
  pollfd exited{.fd = process.get(), .events = POLLIN, .revents = 0};
  constexpr int kLimitMs = 120'000;
  if (::poll(&exited, 1, kLimitMs) != 1) throw std::runtime_error("the manager does not end");
  return static_cast<std::uint64_t>(monotonic_ns() - begin);
}

struct Contender {
  std::string name;
  std::function<double()> seconds;  // of one fill
  std::vector<double> all = {};
};

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t mib = options.smoke ? std::min<std::uint64_t>(settings.mib, 8) : settings.mib;
  const std::uint64_t bytes = mib << 20;
  const unsigned rounds = options.rounds_or(7);
  const std::string image = options.directory + "/image";
  write_image(image, bytes / kPageBytes);

  const auto check = [&](Client& client) {
    if (client.resident_pages() != bytes / kPageBytes) throw std::runtime_error("not all was filled");
    Random random(7);
    std::vector<std::uint64_t> some(64);
    for (std::uint64_t& page : some) page = random() % (bytes / kPageBytes);
    (void)client.touch(some);
  };
  const auto raw = [&](RawFiller::From from) {
    const RawFiller filler(from, image, bytes);
    Client client(filler, kAnyCpu, bytes, 64);
    const std::uint64_t ns = filler.fill();
    check(client);
    return static_cast<double>(ns) / 1e9;
  };
  const auto ours = [&] {
    const UffdkitServer server(options.uffdkit, options.directory, image, {"--fault-around", "1"});
    Client client(server, kAnyCpu, bytes, 64);
    const std::uint64_t ns = complete(server);
    check(client);
    return static_cast<double>(ns) / 1e9;
  };
  std::vector<Contender> contenders = {
      {"raw pread+COPY, 64 pages at a time", [&] { return raw(RawFiller::From::file); }},
      {"raw COPY of a mapping, nothing read", [&] { return raw(RawFiller::From::mapping); }},
      {"uffdkit, at its end", ours}};

  report.table(
      "fill", fmt::format("Filling {} MiB that nobody touches, {} rounds; image in page cache.", mib, rounds),
      {{"contender", "who fills"},
       {"seconds", "seconds", 3},
       {"least", "least", 3},
       {"most", "most", 3},
       {"gib_per_second", "GiB/s", 2},
       {"speed_ratio", "speed / raw", 2}});
  for (unsigned round = 0; round < rounds; ++round)
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      Contender& contender = contenders[(i + round) % contenders.size()];
      contender.all.push_back(contender.seconds());
    }
  for (const Contender& contender : contenders)
    report.row({{"contender", contender.name},
                {"seconds", median(contender.all)},
                {"least", *std::ranges::min_element(contender.all)},
                {"most", *std::ranges::max_element(contender.all)},
                {"gib_per_second", static_cast<double>(mib) / 1024 / median(contender.all)},
                {"speed_ratio", median_ratio(contenders.front().all, contender.all)}});
  report.note(
      "uffdkit fills all that is missing when it is told to end, and then unregisters the memory; its time "
      "is "
      "from the signal to its exit. It looks at every byte, to map pages of zeros as such.");
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "How fast is memory filled that nobody waits for?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the image in MiB", 1, 1 << 16);
      },
      measure);
}
