// A client's memory that is moved, cut, grown and given back, and a plain model of what each of its bytes
// must be.
//
// It lies in an arena of addresses that nothing else takes, counted in pages of 4 KiB on huge pages too. The
// manager hears of all that happens there by events, except of holes that are punched into the file.
// Calls that find something wrong throw. Threads: touch() from any; the rest from one.
#pragma once

#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "support/image.h"

namespace uffdkit::test {

// The events that such a client asks for.
inline constexpr std::uint64_t kAllEvents =
    abi::kFeatureEventFork | abi::kFeatureEventRemap | abi::kFeatureEventRemove | abi::kFeatureEventUnmap;

class ChangingMemory {
 public:
  enum class Kind : std::uint8_t { anonymous, shared, huge_pages, shared_huge_pages };

  // The first `pages` pages of the image at the arena's start.
  ChangingMemory(const Image& image, Kind kind, std::size_t pages, std::size_t arena_pages);

  // Hands it over as Firecracker does.
  void hand_over(const std::string& socket) const;

  const Uffd& uffd() const { return uffd_; }
  std::size_t pages_per_unit() const;  // what mappings can be cut into
  std::byte* at(std::size_t page) const { return start_ + page * 4096; }
  bool is_mapped(std::size_t page) const { return cell_of_[page] != kNoCell; }

  void write(std::size_t page, unsigned char value);
  // Compares every byte of a page that is mapped.
  void check(std::size_t page);
  void check_all();
  void check_all(std::size_t first, std::size_t count);
  // One byte of a page, read by a system call, in which a page that is not there is waited for; nothing where
  // none is mapped.
  std::optional<std::byte> touch(std::size_t page, int scratch_pipe[2]) const;

  // madvise(2) by MADV_DONTNEED, MADV_FREE or MADV_REMOVE.
  void give_back(std::size_t first, std::size_t count, int advice);
  // fallocate(2) by FALLOC_FL_PUNCH_HOLE on the file, of which the manager hears nothing.
  void punch(std::size_t first, std::size_t count);
  // mremap(2) to a fixed place.
  void move(std::size_t first, std::size_t count, std::size_t to) { move(first, count, to, count, false); }
  void move(std::size_t first, std::size_t count, std::size_t to, std::size_t new_count, bool keep_old);
  // mremap(2) of a file's memory without a length: a second mapping of it.
  void map_again(std::size_t first, std::size_t count, std::size_t to);
  // mremap(2) in place; false if there is no room.
  bool resize(std::size_t first, std::size_t count, std::size_t new_count);
  void unmap(std::size_t first, std::size_t count);
  // mmap(2) by MAP_FIXED of memory that is not served.
  void map_over(std::size_t first, std::size_t count);

  // One change drawn from `random`, which touches no memory that the manager may have to bring.
  void change(std::mt19937_64& random);
  // Reads and writes a few pages.
  void use(std::mt19937_64& random);

 private:
  // What a page holds.
  struct Cell {
    std::optional<std::size_t> image_page{};  // the image's; nothing: `value`
    unsigned char value = 0;
    bool may_be_zero = false;  // as well
    bool is_there = false;     // was touched, and not given back since
    bool is_served = true;
  };
  static constexpr std::size_t kNoCell = SIZE_MAX;

  bool is_file() const { return kind_ == Kind::shared || kind_ == Kind::shared_huge_pages; }
  bool is_of_file(std::size_t page) const { return cell_of_[page] < file_pages_; }
  bool is_huge() const { return kind_ == Kind::huge_pages || kind_ == Kind::shared_huge_pages; }
  std::size_t new_cell(Cell cell);
  Cell& cell(std::size_t page) { return cells_[cell_of_[page]]; }
  const Cell& cell(std::size_t page) const { return cells_[cell_of_[page]]; }
  // What is mapped behind a page when its mapping grows.
  std::size_t cell_behind(std::size_t cell);
  bool is_mapped_anywhere(std::size_t cell) const;
  bool may_grow(std::size_t last, std::size_t count) const;
  void forget(std::size_t first, std::size_t count);
  // It was touched: all of a huge page is there.
  void is_there(std::size_t page);
  // How many pages from `page` on lie in one mapping, as the kernel has it.
  std::size_t pages_of_area(std::size_t page) const;
  // A run of mapped units that lies in one mapping.
  bool pick(std::mt19937_64& random, std::size_t units_max, std::size_t& first, std::size_t& count) const;
  bool is_free(std::size_t first, std::size_t count) const;
  // A place for so many pages, most often a free one, that does not overlap `first` and so many.
  std::optional<std::size_t> place(std::mt19937_64& random, std::size_t count, std::size_t first,
                                   std::size_t taken) const;

  const Image& image_;
  const Kind kind_;
  const std::size_t arena_pages_;
  const std::size_t pages_;
  const std::size_t file_pages_;
  UniqueFd file_;
  std::byte* start_;
  Uffd uffd_;
  std::vector<Cell> cells_;           // first those of the file's pages
  std::vector<std::size_t> cell_of_;  // by page of the arena
  bool has_left_behind_ = false;      // anything, by MREMAP_DONTUNMAP
  // The length of a second mapping is not told, nor where memory has grown: at random only one of these is
  // done.
  bool has_mapped_again_ = false;
  bool has_grown_ = false;
};

}  // namespace uffdkit::test
