#include "support/changing_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "support/client.h"
#include "support/huge_pages.h"
#include "support/mapping.h"

namespace uffdkit::test {
namespace {

// Below all that the kernel and the sanitizers use by themselves, so that nothing is ever mapped into a hole.
constexpr std::uintptr_t kArena = 0x2000'0000;

[[noreturn]] void fail(const std::string& call) {
  throw std::system_error(errno, std::generic_category(), call);
}

Uffd create_uffd() {
  Result<Uffd> uffd = Uffd::create({.kernel_faults = true, .required = Features(kAllEvents)});
  if (!uffd) throw std::runtime_error(uffd.error().text());
  return std::move(*uffd);
}

}  // namespace

ChangingMemory::ChangingMemory(const Image& image, Kind kind, std::size_t pages, std::size_t arena_pages)
    : image_(image),
      kind_(kind),
      arena_pages_(arena_pages),
      pages_(pages),
      file_pages_(kind == Kind::shared              ? arena_pages
                  : kind == Kind::shared_huge_pages ? pages
                                                    : 0),
      start_(reinterpret_cast<std::byte*>(kArena)),
      uffd_(create_uffd()),
      cell_of_(arena_pages, kNoCell) {
  constexpr unsigned kHugeFile = MFD_HUGETLB | (21u << MAP_HUGE_SHIFT);
  // Linux 6.18 keeps for ever what is reserved for private huge pages of which part is moved.
  constexpr int kHugeMap = MAP_HUGETLB | (21 << MAP_HUGE_SHIFT) | MAP_NORESERVE;
  if (is_file()) file_ = memory_file(file_pages_ * 4096, is_huge() ? kHugeFile : 0);
  const int flags = MAP_FIXED_NOREPLACE | (is_file() ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS) |
                    (kind == Kind::huge_pages ? kHugeMap : 0);
  if (mmap(start_, pages * 4096, PROT_READ | PROT_WRITE, flags, file_ ? file_.get() : -1, 0) != start_)
    fail("mmap");
  if (!is_huge() && madvise(start_, pages * 4096, MADV_NOHUGEPAGE) != 0) fail("madvise");
  const auto registered = uffd_.register_range({Address(kArena), ByteCount(pages * 4096)}, kMissing);
  if (!registered) throw std::runtime_error(registered.error().text());
  for (std::size_t page = 0; page < pages; ++page) cell_of_[page] = new_cell({.image_page = page});
  // What the file has beyond is zero, and cannot be mapped but by growing.
  while (cells_.size() < file_pages_) new_cell({});
}

void ChangingMemory::hand_over(const std::string& socket) const {
  const int page_bytes = is_huge() ? 2 << 20 : 4096;
  const auto region = nlohmann::json::array({{{"base_host_virt_addr", kArena},
                                              {"size", pages_ * 4096},
                                              {"offset", 0},
                                              {"page_size", page_bytes},
                                              {"page_size_kib", page_bytes}}});
  const UniqueFd connection = connect_to(socket);
  const int fd = uffd_.fd();
  send_with_fds(connection.get(), region.dump(), {&fd, 1});
}

std::size_t ChangingMemory::pages_per_unit() const {
  return is_huge() ? HugePages::kBytes / 4096 : 1;
}

std::size_t ChangingMemory::new_cell(Cell cell) {
  cells_.push_back(cell);
  return cells_.size() - 1;
}

// ---- use --------------------------------------------------------------------------------------------------

void ChangingMemory::is_there(std::size_t page) {
  const std::size_t unit = pages_per_unit();
  const std::size_t first = page / unit * unit;
  for (std::size_t i = first; i < first + unit; ++i) cell(i).is_there = true;
}

void ChangingMemory::write(std::size_t page, unsigned char value) {
  std::memset(at(page), value, 4096);
  is_there(page);
  cell(page).image_page.reset();
  cell(page).value = value;
  cell(page).may_be_zero = false;
}

void ChangingMemory::check(std::size_t page) {
  const Cell& expected = cell(page);
  const std::span<const std::byte, 4096> bytes(at(page), 4096);
  const auto is_all = [&](unsigned char value) {
    return std::ranges::all_of(bytes, [&](std::byte byte) { return byte == std::byte{value}; });
  };
  const bool right = expected.image_page ? image_.holds(*expected.image_page, bytes) : is_all(expected.value);
  if (!right && !(expected.may_be_zero && is_all(0))) {
    std::ostringstream text;
    text << "page " << page << " begins with " << std::to_integer<int>(bytes[0]) << ", not as ";
    if (expected.image_page)
      text << "page " << *expected.image_page << " of the image";
    else
      text << "with " << int{expected.value};
    throw std::runtime_error(text.str());
  }
  is_there(page);
}

void ChangingMemory::check_all(std::size_t first, std::size_t count) {
  for (std::size_t page = first; page < first + count; ++page)
    if (is_mapped(page)) check(page);
}

void ChangingMemory::check_all() {
  check_all(0, arena_pages_);
}

std::optional<std::byte> ChangingMemory::touch(std::size_t page, int scratch_pipe[2]) const {
  if (::write(scratch_pipe[1], at(page), 1) != 1) {
    require(errno == EFAULT, "a system call on a page fails otherwise than by EFAULT");
    return std::nullopt;
  }
  std::byte byte{};
  if (::read(scratch_pipe[0], &byte, 1) != 1) fail("read");
  return byte;
}

// ---- changes ----------------------------------------------------------------------------------------------

void ChangingMemory::give_back(std::size_t first, std::size_t count, int advice) {
  if (madvise(at(first), count * 4096, advice) != 0) fail("madvise");
  for (std::size_t page = first; page < first + count; ++page) {
    Cell& given = cell(page);
    const bool stays = advice == MADV_DONTNEED && is_of_file(page);
    if (stays && given.is_there) continue;  // the file has it still
    // Nobody may know yet that what was left behind is the file's.
    if (has_left_behind_ && is_of_file(page) && given.image_page && !given.is_there) {
      given.may_be_zero = true;
      continue;
    }
    if (advice == MADV_FREE || stays) {
      given.may_be_zero = true;
    } else {
      given = {.is_served = given.is_served};
    }
  }
}

void ChangingMemory::punch(std::size_t first, std::size_t count) {
  const std::size_t from = cell_of_[first];
  if (fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(from * 4096),
                static_cast<off_t>(count * 4096)) != 0)
    fail("fallocate");
  for (std::size_t page = from; page < from + count; ++page) {
    // What nobody has touched may never have been there, and is the image's then.
    if (cells_[page].image_page && !cells_[page].is_there)
      cells_[page].may_be_zero = true;
    else
      cells_[page] = {};
  }
}

void ChangingMemory::forget(std::size_t first, std::size_t count) {
  for (std::size_t page = first; page < first + count; ++page) {
    const std::size_t old = std::exchange(cell_of_[page], kNoCell);
    // A page of the file is kept there if it was, and no part of the image if it was not.
    if (old < file_pages_ && !cells_[old].is_there && (has_left_behind_ || !is_mapped_anywhere(old)))
      cells_[old].may_be_zero = true;
  }
}

void ChangingMemory::move(std::size_t first, std::size_t count, std::size_t to, std::size_t new_count,
                          bool keep_old) {
  const int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (keep_old ? MREMAP_DONTUNMAP : 0);
  if (mremap(at(first), count * 4096, new_count * 4096, flags, at(to)) != at(to)) fail("mremap");
  has_left_behind_ = has_left_behind_ || keep_old;
  forget(to, new_count);
  if (new_count < count) forget(first + new_count, count - new_count);
  for (std::size_t i = 0; i < std::min(count, new_count); ++i) {
    cell_of_[to + i] = cell_of_[first + i];
    if (!keep_old) cell_of_[first + i] = kNoCell;
    if (keep_old && !is_of_file(first + i))
      cell_of_[first + i] = new_cell({.is_served = cell(first + i).is_served});
  }
  has_grown_ = has_grown_ || new_count > count;
  for (std::size_t i = count; i < new_count; ++i) cell_of_[to + i] = cell_behind(cell_of_[to + i - 1]);
}

void ChangingMemory::map_again(std::size_t first, std::size_t count, std::size_t to) {
  if (mremap(at(first), 0, count * 4096, MREMAP_MAYMOVE | MREMAP_FIXED, at(to)) != at(to)) fail("mremap");
  has_mapped_again_ = true;
  const std::size_t from = cell_of_[first];
  forget(to, count);
  for (std::size_t i = 0; i < count; ++i) cell_of_[to + i] = from + i;
}

bool ChangingMemory::resize(std::size_t first, std::size_t count, std::size_t new_count) {
  if (mremap(at(first), count * 4096, new_count * 4096, 0) != at(first)) {
    if (errno == ENOMEM) return false;
    fail("mremap");
  }
  if (new_count < count) forget(first + new_count, count - new_count);
  has_grown_ = has_grown_ || new_count > count;
  for (std::size_t i = count; i < new_count; ++i) cell_of_[first + i] = cell_behind(cell_of_[first + i - 1]);
  return true;
}

void ChangingMemory::unmap(std::size_t first, std::size_t count) {
  if (munmap(at(first), count * 4096) != 0) fail("munmap");
  forget(first, count);
}

void ChangingMemory::map_over(std::size_t first, std::size_t count) {
  if (mmap(at(first), count * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) !=
      at(first))
    fail("mmap");
  if (madvise(at(first), count * 4096, MADV_NOHUGEPAGE) != 0) fail("madvise");
  forget(first, count);
  for (std::size_t page = first; page < first + count; ++page)
    cell_of_[page] = new_cell({.is_served = false});
}

std::size_t ChangingMemory::cell_behind(std::size_t cell) {
  return cell < file_pages_ ? cell + 1 : new_cell({.is_served = cells_[cell].is_served});
}

// ---- at random --------------------------------------------------------------------------------------------

std::size_t ChangingMemory::pages_of_area(std::size_t page) const {
  const auto address = reinterpret_cast<std::uintptr_t>(at(page));
  std::ifstream maps("/proc/self/maps");
  for (std::string line; std::getline(maps, line);) {
    std::uintptr_t start = 0;
    std::uintptr_t end = 0;
    if (std::sscanf(line.c_str(), "%lx-%lx", &start, &end) == 2 && start <= address && address < end)
      return (end - address) / 4096;
  }
  return 0;
}

bool ChangingMemory::pick(std::mt19937_64& random, std::size_t units_max, std::size_t& first,
                          std::size_t& count) const {
  const std::size_t unit = pages_per_unit();
  for (int tries = 0; tries < 100; ++tries) {
    first = random() % (arena_pages_ / unit) * unit;
    // What is mapped over huge pages is of small ones, with which other things can be done.
    if (!is_mapped(first) || (is_huge() && !cell(first).is_served)) continue;
    count = std::min((1 + random() % units_max) * unit, pages_of_area(first));
    return true;
  }
  return false;
}

bool ChangingMemory::is_free(std::size_t first, std::size_t count) const {
  for (std::size_t page = first; page < first + count; ++page)
    if (page >= arena_pages_ || is_mapped(page)) return false;
  return true;
}

bool ChangingMemory::is_mapped_anywhere(std::size_t cell) const {
  return std::ranges::find(cell_of_, cell) != cell_of_.end();
}

std::optional<std::size_t> ChangingMemory::place(std::mt19937_64& random, std::size_t count,
                                                 std::size_t first, std::size_t taken) const {
  const std::size_t unit = pages_per_unit();
  const bool may_destroy = random() % 4 == 0;
  for (int tries = 0; tries < 100; ++tries) {
    const std::size_t to = random() % (arena_pages_ / unit) * unit;
    if (to + count > arena_pages_ || (to < first + taken && first < to + count)) continue;
    if (may_destroy || is_free(to, count)) return to;
  }
  return std::nullopt;
}

// What a file's mapping has grown over is known to be the image from when it is touched, and nobody can tell
// if it is moved before that.
bool ChangingMemory::may_grow(std::size_t last, std::size_t count) const {
  if (is_huge() || has_mapped_again_) return false;  // with huge pages the kernel cannot
  for (std::size_t cell = cell_of_[last] + 1; is_of_file(last) && cell <= cell_of_[last] + count; ++cell)
    if (cell >= file_pages_ || is_mapped_anywhere(cell)) return false;
  return true;
}

void ChangingMemory::change(std::mt19937_64& random) {
  std::size_t first = 0;
  std::size_t count = 0;
  if (!pick(random, is_huge() ? 3 : 70, first, count)) return;
  const std::size_t unit = pages_per_unit();
  const std::size_t less = (count / unit - random() % (count / unit)) * unit;
  const std::size_t more = count + (1 + random() % 20) * unit;
  switch (random() % 12) {
    case 0:
    case 1:
      return give_back(first, count, MADV_DONTNEED);
    case 2:
      if (kind_ == Kind::anonymous) return give_back(first, count, MADV_FREE);
      [[fallthrough]];
    case 3:
    case 4: {
      if (!is_of_file(first)) return give_back(first, count, MADV_DONTNEED);
      // At any page, also within a huge one.
      const std::size_t from = first + random() % count;
      const std::size_t of_these = 1 + random() % (first + count - from);
      if (random() % 2 == 0) return give_back(from, of_these, MADV_REMOVE);
      return punch(from, of_these);
    }
    case 5:
    case 6:
      if (const auto to = place(random, less, first, count)) move(first, count, *to, less, false);
      return;
    case 7:
      if (const auto to = place(random, more, first, count); to && may_grow(first + count - 1, more - count))
        move(first, count, *to, more, false);
      return;
    case 8:
      if (is_free(first + count, more - count) && may_grow(first + count - 1, more - count))
        resize(first, count, more);
      return;
    case 9:
      resize(first, count, less);
      return;
    case 10:
      if (is_huge() || (is_file() && !is_of_file(first))) return;
      if (const auto to = place(random, count, first, count)) {
        if (is_file() && !has_grown_ && random() % 2 == 0) return map_again(first, count, *to);
        move(first, count, *to, count, true);
      }
      return;
    default:
      if (random() % 2 == 0) return unmap(first, less);
      return map_over(first, less);
  }
}

void ChangingMemory::use(std::mt19937_64& random) {
  for (int times = 0; times < 8; ++times) {
    const std::size_t page = random() % arena_pages_;
    if (!is_mapped(page)) continue;
    if (random() % 3 == 0)
      write(page, static_cast<unsigned char>(1 + random() % 255));
    else
      check(page);
  }
}

}  // namespace uffdkit::test
