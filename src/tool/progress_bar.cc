#include "tool/progress_bar.h"

#include <fmt/format.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <utility>

namespace uffdkit::tool {
namespace {

std::size_t terminal_columns() {
  constexpr std::size_t kUnknown = 80;
  winsize size{};
  return ::ioctl(STDERR_FILENO, TIOCGWINSZ, &size) == 0 && size.ws_col > 0 ? size.ws_col : kUnknown;
}

}  // namespace

std::string size_text(std::uint64_t bytes) {
  static constexpr std::array kUnits = {"KiB", "MiB", "GiB", "TiB", "PiB"};
  if (bytes < 1024) return fmt::format("{} bytes", bytes);
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  for (; value >= 1024 && unit + 1 < kUnits.size(); value /= 1024) ++unit;
  return fmt::format("{:.1f} {}", value, kUnits[unit]);
}

std::string progress_line(const std::string& what, std::uint64_t done, std::uint64_t all, double seconds,
                          std::size_t columns) {
  // A line that is as long as the terminal is wide would be two on some of them.
  const std::size_t length_max = std::max<std::size_t>(columns, 1) - 1;
  const double speed = seconds > 0 ? static_cast<double>(done) / seconds : 0;
  const std::string pace = size_text(static_cast<std::uint64_t>(speed)) + "/s";
  if (all == 0) return fmt::format("{} {}, {}", what, size_text(done), pace).substr(0, length_max);
  const double part = std::min(1.0, static_cast<double>(done) / static_cast<double>(all));
  std::string text =
      fmt::format(" {:3.0f} %, {} of {}, {}", part * 100, size_text(done), size_text(all), pace);
  if (speed > 0 && done < all)
    text += fmt::format(", {:.0f} s left", static_cast<double>(all - done) / speed);
  constexpr std::size_t kWidthMin = 5;
  constexpr std::size_t kWidthMax = 30;
  constexpr std::size_t kFrame = 3;  // a space and two brackets
  const std::size_t taken = what.size() + kFrame + text.size();
  const std::size_t width = std::min(kWidthMax, length_max - std::min(length_max, taken));
  if (width < kWidthMin) return (what + text).substr(0, length_max);
  const auto full = static_cast<std::size_t>(part * static_cast<double>(width));
  return fmt::format("{} [{}{}]{}", what, std::string(full, '#'), std::string(width - full, ' '), text);
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
  fmt::print(stderr, "\r{}\033[K", progress_line(what_, done, all, seconds, terminal_columns()));
  std::fflush(stderr);
}

}  // namespace uffdkit::tool
