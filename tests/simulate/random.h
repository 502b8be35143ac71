// The random numbers of a seed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <vector>

namespace uffdkit::simulate {

class Random {
 public:
  explicit Random(std::uint64_t seed) : numbers_(seed) {}
  std::uint64_t draw(std::uint64_t below) { return numbers_() % below; }
  bool one_in(std::uint64_t n) { return draw(n) == 0; }
  template <class T>
  void shuffle(std::vector<T>& values) {
    std::ranges::shuffle(values, numbers_);
  }

 private:
  std::mt19937_64 numbers_;
};

}  // namespace uffdkit::simulate
