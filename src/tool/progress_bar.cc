#include "tool/progress_bar.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

namespace uffdkit::tool {

std::string size_text(std::uint64_t bytes) {
  static constexpr std::array kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  if (bytes < 1024) return fmt::format("{} bytes", bytes);
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  for (; value >= 1024 && unit + 1 < kUnits.size(); value /= 1024) ++unit;
  return fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string progress_line(const std::string& what, std::uint64_t done, std::uint64_t all, double seconds) {
  const double speed = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  const std::string pace = size_text(static_cast<std::uint64_t>(speed)) + "/s";
  if (all == 0) return fmt::format("{} {}, {}", what, size_text(done), pace);
  const double part = std::min(1.0, static_cast<double>(done) / static_cast<double>(all));
  constexpr std::size_t kWidth = 30;
  const auto full = static_cast<std::size_t>(part * kWidth);
  std::string line =
      fmt::format("{} [{}{}] {:3.0f} %, {} of {}, {}", what, std::string(full, '#'),
                  std::string(kWidth - full, ' '), part * 100, size_text(done), size_text(all), pace);
  if (speed > 0 && done < all)
    line += fmt::format(", {:.0f} s left", static_cast<double>(all - done) / speed);
  return line;
}

ProgressBar::ProgressBar(std::string what) : what_(std::move(what)), shown_(::isatty(STDERR_FILENO) == 1) {}

ProgressBar::~ProgressBar() {
  if (shown_) fmt::print(stderr, "\r\033[K");
}

void ProgressBar::show(std::uint64_t done, std::uint64_t all) {
  const auto now = std::chrono::steady_clock::now();
  if (!shown_ || now < next_) return;
  next_ = now + std::chrono::milliseconds(100);
  const double seconds = std::chrono::duration<double>(now - start_).count();
  fmt::print(stderr, "\r{}\033[K", progress_line(what_, done, all, seconds));
  std::fflush(stderr);
}

}  // namespace uffdkit::tool
