// Numbers of a fixed size in files, as they lie in memory. Pure.
#pragma once

#include <bit>
#include <cstddef>
#include <cstring>
#include <span>
#include <vector>

#include "base/check.h"

namespace uffdkit::image {

static_assert(std::endian::native == std::endian::little, "numbers are stored as they lie in memory");

template <class T>
void put(std::vector<std::byte>& to, T value) {
  const auto* bytes = reinterpret_cast<const std::byte*>(&value);
  to.insert(to.end(), bytes, bytes + sizeof value);
}

template <class T>
T get(std::span<const std::byte> from, std::size_t at) {
  T value;
  CHECK(at + sizeof value <= from.size());
  std::memcpy(&value, from.data() + at, sizeof value);
  return value;
}

}  // namespace uffdkit::image
