// What does a disk give that is read at random, by threads that wait and by io_uring, and how long does one
// read take then?
#include <fcntl.h>
#include <fmt/format.h>
#include <liburing.h>
#include <sys/resource.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "harness/bench.h"
#include "harness/image.h"
#include "harness/statistics.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 512;
  std::uint64_t reads = 4000;
};

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

// One measurement: reads of `bytes` at these offsets, `depth` of them at once. What each took goes to `ns`.
struct Job {
  int file;
  std::size_t bytes;
  unsigned depth;
  const std::vector<std::uint64_t>& offsets;
  std::vector<std::uint32_t>& ns;
};

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<std::byte, Free>;

// As O_DIRECT wants it.
Buffer make_buffer(std::size_t bytes) {
  void* memory = std::aligned_alloc(4096, bytes);
  if (memory == nullptr) fail("aligned_alloc");
  return Buffer(static_cast<std::byte*>(memory));
}

// ---- by threads -------------------------------------------------------------------------------------------

void read_by_threads(const Job& job) {
  std::atomic<std::size_t> next{0};
  std::atomic<bool> failed{false};
  const auto read = [&] {
    const Buffer buffer = make_buffer(job.bytes);
    for (std::size_t i = next++; i < job.offsets.size(); i = next++) {
      const std::int64_t start = monotonic_ns();
      const ssize_t bytes = ::pread(job.file, buffer.get(), job.bytes, static_cast<off_t>(job.offsets[i]));
      if (bytes != static_cast<ssize_t>(job.bytes)) failed = true;
      job.ns[i] = static_cast<std::uint32_t>(monotonic_ns() - start);
    }
  };
  {
    std::vector<std::jthread> threads;
    for (unsigned i = 0; i < job.depth; ++i) threads.emplace_back(read);
  }
  if (failed) fail("pread");
}

// One thread, which tells the kernel of the next `depth` reads before it waits for the first of them.
void read_advised(const Job& job) {
  const Buffer buffer = make_buffer(job.bytes);
  std::vector<std::int64_t> told(job.offsets.size());
  const auto tell = [&](std::size_t i) {
    if (i >= job.offsets.size()) return;
    told[i] = monotonic_ns();
    (void)::posix_fadvise(job.file, static_cast<off_t>(job.offsets[i]), static_cast<off_t>(job.bytes),
                          POSIX_FADV_WILLNEED);
  };
  for (std::size_t i = 0; i < job.depth; ++i) tell(i);
  for (std::size_t i = 0; i < job.offsets.size(); ++i) {
    if (::pread(job.file, buffer.get(), job.bytes, static_cast<off_t>(job.offsets[i])) !=
        static_cast<ssize_t>(job.bytes))
      fail("pread");
    job.ns[i] = static_cast<std::uint32_t>(monotonic_ns() - told[i]);
    tell(i + job.depth);
  }
}

// ---- by io_uring ------------------------------------------------------------------------------------------

void read_by_ring(const Job& job) {
  io_uring ring;
  if (const int result = ::io_uring_queue_init(job.depth, &ring, 0); result < 0) {
    errno = -result;
    fail("io_uring_queue_init");
  }
  const std::unique_ptr<io_uring, decltype(&::io_uring_queue_exit)> ended(&ring, &::io_uring_queue_exit);
  const Buffer buffer = make_buffer(job.bytes * job.depth);
  std::vector<std::int64_t> begun(job.offsets.size());
  std::vector<std::size_t> free_buffers;
  std::vector<std::size_t> buffer_of(job.offsets.size());
  for (unsigned i = 0; i < job.depth; ++i) free_buffers.push_back(i);
  std::size_t next = 0;
  std::size_t done = 0;
  while (done < job.offsets.size()) {
    for (; next < job.offsets.size() && !free_buffers.empty(); ++next) {
      begun[next] = monotonic_ns();
      buffer_of[next] = free_buffers.back();
      free_buffers.pop_back();
      io_uring_sqe* entry = ::io_uring_get_sqe(&ring);
      ::io_uring_prep_read(entry, job.file, buffer.get() + buffer_of[next] * job.bytes,
                           static_cast<unsigned>(job.bytes), job.offsets[next]);
      entry->user_data = next;
    }
    if (const int result = ::io_uring_submit_and_wait(&ring, 1); result < 0) {
      errno = -result;
      fail("io_uring_submit_and_wait");
    }
    const std::int64_t now = monotonic_ns();
    unsigned head = 0;
    unsigned count = 0;
    const io_uring_cqe* completion = nullptr;
    io_uring_for_each_cqe(&ring, head, completion) {
      if (completion->res != static_cast<std::int32_t>(job.bytes)) fail("read by io_uring");
      job.ns[completion->user_data] = static_cast<std::uint32_t>(now - begun[completion->user_data]);
      free_buffers.push_back(buffer_of[completion->user_data]);
      ++count;
    }
    ::io_uring_cq_advance(&ring, count);
    done += count;
  }
}

// ---- the question -----------------------------------------------------------------------------------------

struct Way {
  const char* name;
  bool direct;
  void (*run)(const Job&);
};
constexpr Way kWays[] = {{"pread by threads", false, read_by_threads},
                         {"pread, told of before", false, read_advised},
                         {"io_uring", false, read_by_ring},
                         {"pread by threads, O_DIRECT", true, read_by_threads},
                         {"io_uring, O_DIRECT", true, read_by_ring}};

std::int64_t own_cpu_ns() {
  rusage usage{};
  (void)::getrusage(RUSAGE_SELF, &usage);
  const auto ns = [](const timeval& time) {
    return std::int64_t{time.tv_sec} * 1'000'000'000 + time.tv_usec * 1000;
  };
  return ns(usage.ru_utime) + ns(usage.ru_stime);
}

struct Samples {
  std::vector<double> per_second;
  std::vector<double> p50;
  std::vector<double> p99;
  std::vector<double> cpu;
};

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::string path = options.directory + "/file";
  const std::uint64_t bytes = (options.smoke ? 8 : settings.mib) << 20;
  write_image(path, bytes / kPageBytes);
  const unsigned rounds = options.rounds_or(3);
  Random random(3);
  report.table(
      "cold_reads",
      fmt::format("Reads at random of a file of {} MiB that is not in the page cache, one a place; {} "
                  "rounds.",
                  bytes >> 20, rounds),
      {{"kib", "KiB a read"},
       {"depth", "at once"},
       {"way", "how"},
       {"per_second", "reads/s", 0},
       {"mib_per_second", "MiB/s", 0},
       {"ratio", "speed / pread by threads", 2},
       {"p50", "p50 us", 0},
       {"p99", "p99 us", 0},
       {"cpu", "CPU us a read", 1}});
  for (const std::uint64_t size : {std::uint64_t{4096}, std::uint64_t{16384}, std::uint64_t{65536}})
    for (const unsigned depth : {1u, 4u, 16u, 32u}) {
      std::vector<Samples> samples(std::size(kWays));
      for (unsigned round = 0; round < rounds; ++round)
        for (std::size_t i = 0; i < std::size(kWays); ++i) {
          const std::size_t which = (i + round) % std::size(kWays);
          const Way& way = kWays[which];
          std::vector<std::uint64_t> offsets = shuffled(bytes / size, random);
          offsets.resize(std::min<std::size_t>(offsets.size(), options.smoke ? 32 : settings.reads));
          for (std::uint64_t& offset : offsets) offset *= size;
          drop_from_page_cache(path);
          const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | (way.direct ? O_DIRECT : 0)));
          if (!file) fail("open " + path);
          std::vector<std::uint32_t> ns(offsets.size());
          const std::int64_t cpu = own_cpu_ns();
          const std::int64_t start = monotonic_ns();
          way.run({.file = file.get(), .bytes = size, .depth = depth, .offsets = offsets, .ns = ns});
          const auto took = static_cast<double>(monotonic_ns() - start);
          const auto count = static_cast<double>(offsets.size());
          samples[which].per_second.push_back(count * 1e9 / took);
          samples[which].p50.push_back(quantile(ns, 0.5) / 1000);
          samples[which].p99.push_back(quantile(ns, 0.99) / 1000);
          samples[which].cpu.push_back(static_cast<double>(own_cpu_ns() - cpu) / 1000 / count);
        }
      for (std::size_t i = 0; i < std::size(kWays); ++i) {
        const double per_second = median(samples[i].per_second);
        report.row({{"kib", std::to_string(size >> 10)},
                    {"depth", std::to_string(depth)},
                    {"way", kWays[i].name},
                    {"per_second", per_second},
                    {"mib_per_second", per_second * static_cast<double>(size) / (1 << 20)},
                    {"ratio", median_ratio(samples[i].per_second, samples[0].per_second)},
                    {"p50", median(samples[i].p50)},
                    {"p99", median(samples[i].p99)},
                    {"cpu", median(samples[i].cpu)}});
      }
    }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "What does a disk give that is read at random?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "Size of the file in MiB", 1, 1 << 20);
        add_number(app, "--reads", settings.reads, "Reads of each kind", 1, 1 << 20);
      },
      measure);
}
