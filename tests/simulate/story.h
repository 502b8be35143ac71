// What becomes of a seed: random numbers that decide, what has happened by them, and what was wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "simulate/random.h"

namespace uffdkit::simulate {

struct Found {
  std::string wrong;                // empty: nothing
  std::vector<std::string> events;  // what was done, one a line
  std::size_t bytes_checked = 0;    // that threads read
  std::uint64_t trace = 0;          // tells runs apart that went different ways; of the manager's only
};

class Story final : public Random {
 public:
  using Random::Random;
  void note(std::string event) { found_.events.push_back(std::move(event)); }
  // Only the first counts: what comes after may come of it.
  void fail(std::string what) {
    if (is_right()) found_.wrong = std::move(what);
  }
  bool is_right() const { return found_.wrong.empty(); }
  void count_checked_byte() { ++found_.bytes_checked; }
  // What says nothing to a reader, but must be the same each time.
  void hear(const std::string& text) { heard_ += text; }
  std::uint64_t trace() const { return std::hash<std::string>()(heard_); }

  // Its end.
  Found tell() { return std::move(found_); }

 private:
  Found found_;
  std::string heard_;
};

}  // namespace uffdkit::simulate
