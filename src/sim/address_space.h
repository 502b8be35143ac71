// What a process's memory is made of: areas (the kernel's VMAs), and the page table beneath them.
//
// Invariants: areas do not overlap; every page table entry lies in an area; an area belongs to at most one
// userfaultfd; neighbours that are alike are one area.
#pragma once

#include <functional>

#include "sim/memory.h"

namespace uffdkit::sim {

class Context;
using ContextPtr = std::shared_ptr<Context>;

// A run of addresses that were mapped alike.
struct Area {
  std::uint64_t start;
  std::uint64_t end;
  Memory memory;
  PageCachePtr object = nullptr;  // nullptr: anonymous
  std::uint64_t offset;           // in the object; anonymous: an address that only says which areas may merge
  bool readable = true;
  bool writable = true;
  bool may_write = true;  // false: a shared mapping that can never be made writable
  bool dont_fork = false;
  bool huge_advised = false;  // MADV_HUGEPAGE
  // Which areas' private pages belong together; 0 as long as there is none. Areas with different ones never
  // merge. Source: mm/vma.c, is_mergeable_anon_vma().
  std::uint64_t anon_group = 0;
  std::shared_ptr<Reservation> reservation = nullptr;  // of a private hugetlb mapping

  // Registration.
  ContextPtr context = nullptr;
  std::uint64_t modes = 0;  // abi::kRegister...

  bool huge() const { return memory == Memory::hugetlb_shared || memory == Memory::hugetlb_private; }
  bool shmem() const { return memory == Memory::shmem_shared || memory == Memory::shmem_private; }
  bool anonymous() const { return memory == Memory::anonymous; }
  bool shared() const {
    return memory == Memory::shmem_shared || memory == Memory::hugetlb_shared ||
           memory == Memory::file_shared;
  }
  std::uint64_t page() const { return huge() ? kHugePage : kSmallPage; }
  std::uint64_t offset_of(std::uint64_t address) const { return offset + (address - start); }
  // The page at `address` lies beyond the end of its file.
  bool beyond_end(std::uint64_t address) const { return object && offset_of(address) >= object->size(); }
  bool registered_for(std::uint64_t mode) const { return (modes & mode) != 0; }
};

class AddressSpace {
 public:
  enum class PrivateCopies : bool { keep, drop };

  // Where mmap_min_addr and the 47-bit user address space end.
  static constexpr std::uint64_t kLowest = 65536;
  static constexpr std::uint64_t kHighest = 0x7ffffffff000;

  // False once its process has exited or called exec: userfaultfds outlive it, and find nothing.
  bool alive = true;
  bool reads_map_zero_page = true;  // of KernelOptions

  // ---- areas
  std::map<std::uint64_t, Area>& areas() { return areas_; }
  const std::map<std::uint64_t, Area>& areas() const { return areas_; }
  // The area with `address` in it; nullptr if there is none.
  Area* find(std::uint64_t address);
  // All areas with a part in [start, end), in order. The pointers last until areas change.
  std::vector<Area*> in_range(std::uint64_t start, std::uint64_t end);
  bool is_free(std::uint64_t start, std::uint64_t end) { return in_range(start, end).empty(); }
  // A free place for `length`, with a hole on either side.
  std::uint64_t find_place(std::uint64_t length, std::uint64_t alignment) const;
  // Adds an area, and merges it with neighbours that are alike.
  void insert(Area area);
  // Changes registration, protection and advice of all areas in [start, end): `edit` is given a copy of each.
  // Areas are cut at the ends of the range where something did change, and merged where they have become
  // alike.
  void change(std::uint64_t start, std::uint64_t end, const std::function<void(Area&)>& edit);
  // Makes two areas of the one with `address` in it, unless it starts there.
  void cut(std::uint64_t address);
  // Removes areas and their pages.
  void remove(std::uint64_t start, std::uint64_t end);
  // Gives the area a group for its private pages, a neighbour's if they could merge.
  void prepare_anonymous(Area& area);

  // ---- pages
  std::map<std::uint64_t, Pte>& pages() { return pages_; }
  const std::map<std::uint64_t, Pte>& pages() const { return pages_; }
  // The entry of the page that starts at `page`; nullptr: none.
  Pte* entry(std::uint64_t page);
  const Pte* entry(std::uint64_t page) const;
  void set(std::uint64_t page, Pte pte) { pages_[page] = std::move(pte); }
  void clear(std::uint64_t page) {
    split(page, page + kSmallPage);
    pages_.erase(page);
  }
  // Takes pages out of the page table, as MADV_DONTNEED does.
  void zap(const Area& area, std::uint64_t start, std::uint64_t end, PrivateCopies copies);
  // Arms or disarms [start, end) of an area: the uffd-wp bit of present pages, and markers for empty ones
  // where `area` takes them.
  void protect(const Area& area, std::uint64_t start, std::uint64_t end, bool arm);
  // Takes a range of a file out of every area that maps it.
  void unmap_file_range(const PageCache& object, std::uint64_t first, std::uint64_t end,
                        PrivateCopies copies);

  // ---- transparent huge pages: 2 MiB of small pages that one entry maps, until that has to be split
  bool mapped_huge(std::uint64_t page) const { return huge_.contains(page / kHugePage * kHugePage); }
  // The 2 MiB from `start`, whose pages are all present.
  void map_huge(std::uint64_t start) { huge_.insert(start); }
  // Splits those that have a part in [start, end).
  void split(std::uint64_t start, std::uint64_t end);
  // Splits those that are cut by an end of [start, end).
  void split_ends(std::uint64_t start, std::uint64_t end);
  // Those that lie in [start, end).
  std::vector<std::uint64_t> huge_in_range(std::uint64_t start, std::uint64_t end) const;

 private:
  void merge(std::uint64_t start, std::uint64_t end);

  std::map<std::uint64_t, Area> areas_;
  std::map<std::uint64_t, Pte> pages_;
  std::set<std::uint64_t> huge_;  // where they start
  std::uint64_t last_anon_group_ = 0;
};

}  // namespace uffdkit::sim
