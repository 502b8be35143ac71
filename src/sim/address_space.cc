#include "sim/address_space.h"

#include <algorithm>

#include "base/check.h"
#include "sim/context.h"

namespace uffdkit::sim {
namespace {

bool same_anon_group(const Area& a, const Area& b) {
  return a.anon_group == b.anon_group || a.anon_group == 0 || b.anon_group == 0;
}

// Alike in all but the modes of access.
bool continues(const Area& a, const Area& b) {
  return a.end == b.start && a.memory == b.memory && a.object == b.object &&
         a.offset + (a.end - a.start) == b.offset && a.may_write == b.may_write && a.context == b.context &&
         a.modes == b.modes && a.reservation == b.reservation && a.dont_fork == b.dont_fork &&
         a.huge_advised == b.huge_advised;
}

bool same_traits(const Area& a, const Area& b) {
  return a.context == b.context && a.modes == b.modes && a.readable == b.readable &&
         a.writable == b.writable && a.dont_fork == b.dont_fork && a.huge_advised == b.huge_advised;
}

// Neighbours become one area when nothing tells them apart: that is what lets one COPY span ranges that were
// registered one after the other. Mappings of huge pages never do. Source: mm/vma.c,
// vma_merge_existing_range().
bool can_merge(const Area& a, const Area& b) {
  return !a.huge() && continues(a, b) && a.readable == b.readable && a.writable == b.writable &&
         same_anon_group(a, b);
}

}  // namespace

Area* AddressSpace::find(std::uint64_t address) {
  auto after = areas_.upper_bound(address);
  if (after == areas_.begin()) return nullptr;
  Area& area = std::prev(after)->second;
  return address < area.end ? &area : nullptr;
}

std::vector<Area*> AddressSpace::in_range(std::uint64_t start, std::uint64_t end) {
  std::vector<Area*> found;
  if (start >= end) return found;
  auto it = areas_.upper_bound(start);
  if (it != areas_.begin() && std::prev(it)->second.end > start) --it;
  for (; it != areas_.end() && it->second.start < end; ++it) found.push_back(&it->second);
  return found;
}

std::uint64_t AddressSpace::find_place(std::uint64_t length, std::uint64_t alignment) const {
  // Above everything that is mapped; far below the end of the address space.
  constexpr std::uint64_t kFirst = 0x100000000;
  std::uint64_t place = kFirst;
  for (const auto& [start, area] : areas_) {
    if (area.end <= kFirst) continue;
    if (start >= place + length + alignment) break;
    place = (area.end + 2 * alignment - 1) / alignment * alignment;
  }
  return place;
}

void AddressSpace::insert(Area area) {
  CHECK(is_free(area.start, area.end));
  const std::uint64_t start = area.start;
  const std::uint64_t end = area.end;
  areas_.emplace(start, std::move(area));
  merge(start, end);
}

void AddressSpace::cut(std::uint64_t address) {
  Area* area = find(address);
  if (area == nullptr || area->start == address) return;
  split_ends(address, address);
  Area right = *area;
  right.offset = area->offset_of(address);
  right.start = address;
  area->end = address;
  areas_.emplace(address, std::move(right));
}

void AddressSpace::merge(std::uint64_t start, std::uint64_t end) {
  auto it = areas_.lower_bound(start);
  if (it != areas_.begin()) --it;
  while (it != areas_.end() && it->second.start <= end) {
    const auto next = std::next(it);
    if (next == areas_.end()) break;
    if (!can_merge(it->second, next->second)) {
      it = next;
      continue;
    }
    it->second.end = next->second.end;
    if (it->second.anon_group == 0) it->second.anon_group = next->second.anon_group;
    areas_.erase(next);
  }
}

void AddressSpace::change(std::uint64_t start, std::uint64_t end, const std::function<void(Area&)>& edit) {
  std::vector<std::uint64_t> starts;
  for (const Area* area : in_range(start, end)) starts.push_back(std::max(start, area->start));
  for (const std::uint64_t from : starts) {
    Area edited = *find(from);
    const std::uint64_t to = std::min(end, edited.end);
    edit(edited);
    if (same_traits(*find(from), edited)) continue;
    cut(from);
    cut(to);
    Area& part = *find(from);
    part.context = edited.context;
    part.modes = edited.modes;
    part.readable = edited.readable;
    part.writable = edited.writable;
    part.dont_fork = edited.dont_fork;
    part.huge_advised = edited.huge_advised;
  }
  merge(start, end);
}

void AddressSpace::remove(std::uint64_t start, std::uint64_t end) {
  cut(start);
  cut(end);
  split(start, end);
  for (Area* area : in_range(start, end)) {
    pages_.erase(pages_.lower_bound(area->start), pages_.lower_bound(area->end));
    areas_.erase(area->start);
  }
}

void AddressSpace::prepare_anonymous(Area& area) {
  if (area.anon_group != 0) return;
  const auto here = areas_.find(area.start);
  if (const auto next = std::next(here); next != areas_.end() && continues(area, next->second))
    area.anon_group = next->second.anon_group;
  if (area.anon_group == 0 && here != areas_.begin() && continues(std::prev(here)->second, area))
    area.anon_group = std::prev(here)->second.anon_group;
  if (area.anon_group == 0) area.anon_group = ++last_anon_group_;
}

Pte* AddressSpace::entry(std::uint64_t page) {
  const auto found = pages_.find(page);
  return found == pages_.end() ? nullptr : &found->second;
}

const Pte* AddressSpace::entry(std::uint64_t page) const {
  const auto found = pages_.find(page);
  return found == pages_.end() ? nullptr : &found->second;
}

// Anonymous memory forgets that it was armed: the page is gone for good. Anything with a page cache below it
// remembers, by a marker, because the page may come back from there. Poison goes with the page.
// Source: mm/memory.c, zap_pte_range(); mm/hugetlb.c, __unmap_hugepage_range().
void AddressSpace::zap(const Area& area, std::uint64_t start, std::uint64_t end, PrivateCopies copies) {
  // A marker that is there stays even where protection is not registered any more; a page leaves one only
  // where it is, but for huge pages.
  const bool page_leaves_marker = area.huge() || area.registered_for(abi::kRegisterWp);
  split(start, end);
  auto it = pages_.lower_bound(start);
  while (it != pages_.end() && it->first < end) {
    const Pte& pte = it->second;
    const bool keep_copy = copies == PrivateCopies::keep && (pte.anon || pte.poison);
    if (keep_copy) {
      ++it;
    } else if (pte.wp && !area.anonymous() && (pte.marker() || page_leaves_marker)) {
      (it++)->second = Pte{.wp = true};
    } else {
      it = pages_.erase(it);
    }
  }
}

// Markers on empty pages: always above a page cache; on anonymous memory only since WP_UNPOPULATED, for those
// who asked for it. Source: mm/mprotect.c, change_pte_range(); ioctl_userfaultfd(2),
// UFFD_FEATURE_WP_UNPOPULATED.
void AddressSpace::protect(const Area& area, std::uint64_t start, std::uint64_t end, bool arm) {
  const bool marks_empty =
      !area.anonymous() || (area.context && (area.context->features & abi::kFeatureWpUnpopulated) != 0);
  split_ends(start, end);
  for (std::uint64_t page = start; page < end; page += area.page()) {
    Pte* pte = entry(page);
    if (pte == nullptr) {
      if (arm && marks_empty) set(page, Pte{.wp = true});
    } else if (pte->poison) {
      continue;  // any access ends in SIGBUS already
    } else if (pte->marker()) {
      if (!arm) clear(page);
    } else {
      pte->wp = arm;
      if (arm) pte->writable = false;  // disarmed, the next write finds out by itself whether it may go ahead
    }
  }
}

// Source: mm/huge_memory.c, __split_huge_pmd() and its callers; Documentation/mm/transhuge.rst.
void AddressSpace::split(std::uint64_t start, std::uint64_t end) {
  if (start >= end) return;
  huge_.erase(huge_.lower_bound(start / kHugePage * kHugePage), huge_.lower_bound(end));
}

void AddressSpace::split_ends(std::uint64_t start, std::uint64_t end) {
  for (const std::uint64_t at : {start, end})
    if (at % kHugePage != 0) huge_.erase(at / kHugePage * kHugePage);
}

std::vector<std::uint64_t> AddressSpace::huge_in_range(std::uint64_t start, std::uint64_t end) const {
  std::vector<std::uint64_t> found;
  for (auto it = huge_.lower_bound(start); it != huge_.end() && *it + kHugePage <= end; ++it)
    found.push_back(*it);
  return found;
}

void AddressSpace::unmap_file_range(const PageCache& object, std::uint64_t first, std::uint64_t end,
                                    PrivateCopies copies) {
  for (auto& [start, area] : areas_) {
    if (area.object.get() != &object) continue;
    const std::uint64_t area_first = area.offset;
    const std::uint64_t area_end = area.offset + (area.end - area.start);
    const std::uint64_t from = std::max(first, area_first);
    const std::uint64_t to = std::min(end, area_end);
    if (from >= to) continue;
    zap(area, area.start + (from - area_first), area.start + (to - area_first), copies);
  }
}

}  // namespace uffdkit::sim
