// How far long work has come, on one line of standard error.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>

namespace uffdkit::tool {

// Shows nothing unless standard error is a terminal. Threads: one at a time.
class ProgressBar {
 public:
  // `what` is being done: "create".
  explicit ProgressBar(std::string what);
  // Takes the line away.
  ~ProgressBar();
  ProgressBar(const ProgressBar&) = delete;
  ProgressBar& operator=(const ProgressBar&) = delete;

  // So many bytes are done, of `all`; 0 if that is not known.
  void show(std::uint64_t done, std::uint64_t all);

 private:
  const std::string what_;
  const bool shown_;
  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point next_ = start_;
};

// The line: "create [#####     ]  50 %, 1.0 GiB of 2.0 GiB, 512.0 MiB/s, 2 s left", of less than `columns`
// characters: the bar is as long as there is room for, and at last left out, then the end of the line.
std::string progress_line(const std::string& what, std::uint64_t done, std::uint64_t all, double seconds,
                          std::size_t columns);

// "1.5 GiB"
std::string size_text(std::uint64_t bytes);

}  // namespace uffdkit::tool
