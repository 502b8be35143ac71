// What is made of samples.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

namespace uffdkit::bench {

// The value below which `fraction` of the samples lie; there must be samples.
template <class T>
double quantile(std::vector<T> samples, double fraction) {
  const auto index = static_cast<std::size_t>(fraction * static_cast<double>(samples.size() - 1) + 0.5);
  std::nth_element(samples.begin(), samples.begin() + static_cast<std::ptrdiff_t>(index), samples.end());
  return static_cast<double>(samples[index]);
}

template <class T>
double median(std::vector<T> samples) {
  return quantile(std::move(samples), 0.5);
}

template <class T>
double mean(const std::vector<T>& samples) {
  return std::accumulate(samples.begin(), samples.end(), 0.0) / static_cast<double>(samples.size());
}

// The median of a[i] / b[i]: rounds that ran one beside the other are compared, so that what disturbs the
// machine for a while disturbs both sides of a ratio.
inline double median_ratio(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> ratios;
  for (std::size_t i = 0; i < a.size(); ++i) ratios.push_back(a[i] / b[i]);
  return median(ratios);
}

// The same sequence in every run, so that runs can be compared.
using Random = std::mt19937_64;

inline std::vector<std::uint64_t> shuffled(std::uint64_t count, Random& random) {
  std::vector<std::uint64_t> numbers(count);
  std::iota(numbers.begin(), numbers.end(), 0);
  std::shuffle(numbers.begin(), numbers.end(), random);
  return numbers;
}

}  // namespace uffdkit::bench
