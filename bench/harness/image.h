// A memory image whose every page says which one it is, so that clients can check what they were given.
#pragma once

#include <cstdint>
#include <span>
#include <string>

namespace uffdkit::bench {

inline constexpr std::uint64_t kPageBytes = 4096;

// The first eight bytes of a page of the image; its first byte is never zero.
constexpr std::uint64_t stamp(std::uint64_t page) {
  return (page * 2 + 1) * 0x9e3779b97f4a7c15;
}

// Writes an image of `pages` pages, all data, which stay in the page cache. Throws where it cannot.
void write_image(const std::string& path, std::uint64_t pages);
// Writes a sparse image of `bytes` bytes, in which only `data` are pages of data.
void write_sparse_image(const std::string& path, std::uint64_t bytes, std::span<const std::uint64_t> data);

}  // namespace uffdkit::bench
