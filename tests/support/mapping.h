// Memory of a test's own, unmapped at the end.
#pragma once

#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <array>
#include <cstddef>
#include <span>

namespace uffdkit::test {

class Mapping {
 public:
  // Anonymous private memory, without transparent huge pages: one page is one page.
  static Mapping anonymous(std::size_t bytes);
  // `bytes` of a file from its start; `map_flags` is MAP_SHARED or MAP_PRIVATE and what goes with it.
  static Mapping of_file(int fd, std::size_t bytes, int map_flags);
  // Whatever mmap(2) gives for these; throws std::system_error where it fails.
  static Mapping map(void* where, std::size_t bytes, int protection, int map_flags, int fd,
                     std::ptrdiff_t offset = 0);

  Mapping(Mapping&& other) noexcept;
  Mapping& operator=(Mapping&&) = delete;
  ~Mapping();

  std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  AddressRange range() const { return pages(0, size_ / 4096); }
  // The address of the 4 KiB page with this number.
  Address page(std::size_t index) const { return pages(index, 1).start; }
  // `count` pages of 4 KiB from page `first`.
  AddressRange pages(std::size_t first, std::size_t count) const;
  // The bytes of one 4 KiB page. Reading them may fault.
  std::span<std::byte, 4096> bytes(std::size_t page) const {
    return std::span<std::byte, 4096>(data_ + page * 4096, 4096);
  }
  // Reads or writes the first byte of a page, as a thread of a client would: atomically, while others may do
  // the same.
  std::byte read(std::size_t page) const;
  void write(std::size_t page, std::byte value) const;

 private:
  Mapping(std::byte* data, std::size_t size) : data_(data), size_(size) {}
  std::byte* data_;
  std::size_t size_;
};

// A file in memory (memfd_create) of this size. `memfd_flags`: 0, or MFD_HUGETLB and a size.
UniqueFd memory_file(std::size_t bytes, unsigned memfd_flags = 0);

// A 4 KiB page full of one value.
std::array<std::byte, 4096> page_of(unsigned char value);

}  // namespace uffdkit::test
