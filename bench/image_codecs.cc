// What does it cost to decompress a frame of an image, by its size, zstd's level, and with lz4 in zstd's
// place?
#include <fcntl.h>
#include <fmt/format.h>
#include <lz4.h>
#include <time.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>
#include <zstd.h>

#include <memory>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "harness/bench.h"
#include "harness/image.h"

namespace uffdkit::bench {
namespace {

struct Settings {
  std::uint64_t mib = 32;
};

// CPU time of this thread, so that whatever else runs counts for little.
double cpu_seconds() {
  timespec now;
  ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) / 1e9;
}

class Codec {
 public:
  virtual ~Codec() = default;
  virtual std::string name() const = 0;
  // Compresses `from` to the start of `to`; its length then.
  virtual std::size_t compress(std::span<const char> from, std::span<char> to) = 0;
  // Whether all of `to` came out.
  virtual bool decompress(std::span<const char> from, std::span<char> to) = 0;
};

class Zstd final : public Codec {
 public:
  explicit Zstd(int level) : level_(level) {}
  std::string name() const override { return fmt::format("zstd {}", level_); }
  std::size_t compress(std::span<const char> from, std::span<char> to) override {
    return ZSTD_compressCCtx(in_.get(), to.data(), to.size(), from.data(), from.size(), level_);
  }
  bool decompress(std::span<const char> from, std::span<char> to) override {
    return ZSTD_decompressDCtx(out_.get(), to.data(), to.size(), from.data(), from.size()) == to.size();
  }

 private:
  const int level_;
  const std::unique_ptr<ZSTD_CCtx, decltype(&ZSTD_freeCCtx)> in_{ZSTD_createCCtx(), &ZSTD_freeCCtx};
  const std::unique_ptr<ZSTD_DCtx, decltype(&ZSTD_freeDCtx)> out_{ZSTD_createDCtx(), &ZSTD_freeDCtx};
};

class Lz4 final : public Codec {
 public:
  std::string name() const override { return "lz4"; }
  std::size_t compress(std::span<const char> from, std::span<char> to) override {
    const int bytes = LZ4_compress_default(from.data(), to.data(), static_cast<int>(from.size()),
                                           static_cast<int>(to.size()));
    return static_cast<std::size_t>(bytes);
  }
  bool decompress(std::span<const char> from, std::span<char> to) override {
    return LZ4_decompress_safe(from.data(), to.data(), static_cast<int>(from.size()),
                               static_cast<int>(to.size())) == static_cast<int>(to.size());
  }
};

std::vector<char> read_memory(const std::string& path, std::uint64_t bytes) {
  std::vector<char> memory(bytes);
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (::read(file.get(), memory.data(), bytes) != static_cast<ssize_t>(bytes))
    throw std::runtime_error("cannot read " + path);
  return memory;
}

void measure_one(Codec& codec, const std::vector<char>& memory, std::size_t frame_bytes, Report& report) {
  std::vector<std::vector<char>> frames(memory.size() / frame_bytes);
  std::vector<char> buffer(ZSTD_compressBound(frame_bytes) + 1024);
  std::size_t compressed = 0;
  const double start = cpu_seconds();
  for (std::size_t i = 0; i < frames.size(); ++i) {
    const std::size_t bytes = codec.compress(std::span(memory).subspan(i * frame_bytes, frame_bytes), buffer);
    frames[i].assign(buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(bytes));
    compressed += bytes;
  }
  const double middle = cpu_seconds();
  std::vector<char> to(frame_bytes);
  for (const std::vector<char>& frame : frames)
    if (!codec.decompress(frame, to))
      throw std::runtime_error(codec.name() + " does not give back what it took");
  const double end = cpu_seconds();
  const auto mib = static_cast<double>(memory.size()) / (1 << 20);
  report.row({{"frame_kib", frame_bytes >> 10},
              {"codec", codec.name()},
              {"ratio", static_cast<double>(memory.size()) / static_cast<double>(compressed)},
              {"compress_mib_per_second", mib / (middle - start)},
              {"decompress_mib_per_second", mib / (end - middle)},
              {"us_per_frame", (end - middle) / static_cast<double>(frames.size()) * 1e6}});
}

void measure(const Options& options, const Settings& settings, Report& report) {
  const std::uint64_t bytes = (options.smoke ? 1 : settings.mib) << 20;
  const std::string path = options.directory + "/memory";
  write_program_image(path, bytes / kPageBytes);
  const std::vector<char> memory = read_memory(path, bytes);
  report.table(
      "codecs",
      fmt::format("{} MiB of program files as memory, one thread; per second of its CPU time.", bytes >> 20),
      {{"frame_kib", "frame KiB", 0},
       {"codec", "codec and level"},
       {"ratio", "memory / compressed", 2},
       {"compress_mib_per_second", "compress MiB/s", 0},
       {"decompress_mib_per_second", "decompress MiB/s", 0},
       {"us_per_frame", "us a frame", 0}});
  for (std::size_t kib = 16; kib <= 256; kib *= 2) {
    for (const int level : {-5, -1, 3, 9})
      if (level == -1 || kib == 64) {
        Zstd zstd(level);
        measure_one(zstd, memory, kib << 10, report);
      }
    Lz4 lz4;
    measure_one(lz4, memory, kib << 10, report);
  }
}

}  // namespace
}  // namespace uffdkit::bench

int main(int argc, char** argv) {
  using namespace uffdkit::bench;
  return run_bench<Settings>(
      argc, argv, "What does it cost to decompress a frame of an image?",
      [](CLI::App& app, Settings& settings) {
        add_number(app, "--mib", settings.mib, "How much memory", 1, 1024);
      },
      measure);
}
