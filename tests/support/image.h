// A memory image of which every byte follows from its page's number, so that whoever is served from it can
// check what arrived.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace uffdkit::test {

class Image {
 public:
  // Writes the file: `pages` pages of 4 KiB, with single pages of zeros, small holes and, beyond 4 MiB, a
  // hole of 2 MiB. Another seed gives other bytes. The page cache holds all of it afterwards.
  Image(std::string path, std::size_t pages, std::uint64_t seed = 1);

  const std::string& path() const { return path_; }
  std::size_t pages() const { return pages_; }

  // What page `page` holds.
  void fill(std::size_t page, std::span<std::byte, 4096> bytes) const;
  // Whether these are the bytes of page `page`. Reads them in order of address, each once.
  bool holds(std::size_t page, std::span<const std::byte, 4096> bytes) const;
  // Whether page `page` is zero in the image.
  static bool is_zero(std::size_t page) { return page % 8 == 5 || is_hole(page); }

  // Whether the file has a hole there.
  static bool is_hole(std::size_t page) { return (page / 4) % 8 == 6 || (page / 512) % 4 == 2; }

  // Takes what it can out of the page cache, so that the next reads have to wait for the disk.
  void make_cold() const;
  // Shortens the file to so many pages.
  void cut(std::size_t pages) const;

 private:
  std::uint64_t word(std::size_t page, std::size_t index) const;

  std::string path_;
  std::size_t pages_;
  std::uint64_t seed_;
};

}  // namespace uffdkit::test
