// madvise(2): DONTNEED, FREE, REMOVE, which discard pages; DONTFORK, HUGEPAGE, NOHUGEPAGE, which are kept
// with the area; PAGEOUT; COLLAPSE.
#include <algorithm>
#include <cerrno>

#include "sim/events.h"
#include "sim/machine.h"

namespace uffdkit::sim {
namespace {

// DONTNEED and FREE of [start, end) of one area: 0 and perhaps a smaller end, or -errno. Huge pages go whole.
// Source: mm/madvise.c, madvise_dontneed_free_valid_vma().
int check_discard(const Area& area, Advice advice, std::uint64_t start, std::uint64_t& end) {
  if (!area.huge()) return 0;
  if (advice != Advice::dont_need || start % kHugePage != 0) return -EINVAL;
  end = end / kHugePage * kHugePage;
  return 0;
}

// Source: mm/madvise.c, madvise_remove().
int check_remove(const Area& area) {
  if (area.anonymous()) return -EINVAL;
  return area.shared() && area.may_write ? 0 : -EACCES;
}

}  // namespace

// Area by area, with an event for each. While the event waits the pages are still there, and anything may
// happen to the area. Source: mm/madvise.c, madvise_walk_vmas(), madvise_dontneed_free(), madvise_remove().
Operation advise_memory(ThreadImpl& thread, AddressRange range, Advice advice) {
  AddressSpace& space = *thread.process().space();
  const std::uint64_t range_end = range.start.value + round_up(range.length.value, kSmallPage);
  if (!page_aligned(range.start.value)) co_return result(-EINVAL);
  bool hole = false;
  std::uint64_t start = range.start.value;
  while (start < range_end) {
    const std::vector<Area*> rest = space.in_range(start, range_end);
    if (rest.empty()) co_return result(-ENOMEM);
    Area* area = rest.front();
    if (start < area->start) {
      hole = true;
      start = area->start;
    }
    const std::uint64_t area_end = area->end;
    std::uint64_t end = std::min(area_end, range_end);
    bool slept = false;
    int error = advice == Advice::remove ? check_remove(*area) : check_discard(*area, advice, start, end);
    if (error < 0) co_return result(error);

    const PageCachePtr object = area->object;
    const std::uint64_t offset = area->offset_of(start);
    if (start < end) {
      if (wants(*area, abi::kFeatureEventRemove)) {
        {
          slept = true;
          EventWait event(Changing(area->context), thread, event_message(abi::kEventRemove, start, end));
          while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
        }
        area = space.find(start);
        if (advice != Advice::remove) {
          if (area == nullptr) co_return result(-ENOMEM);
          error = check_discard(*area, advice, start, end);
          if (error < 0) co_return result(error);
          end = std::min(end, area->end);
        }
      }
      if (advice == Advice::remove) {
        object->punch_hole(offset, ByteCount(end - start));
      } else if (advice == Advice::free) {
        // Pages that were freed lazily stay until memory is short, which it never is here; poison goes at
        // once. That this is for anonymous memory only is found out after the event.
        if (!area->anonymous()) co_return result(-EINVAL);
        std::erase_if(space.pages(), [&](const auto& entry) {
          return entry.first >= start && entry.first < end && entry.second.poison;
        });
      } else {
        space.zap(*area, start, end, AddressSpace::PrivateCopies::drop);
      }
    }
    // What became of the rest of the area during the sleep is looked at anew.
    start = slept ? end : area_end;
  }
  co_return result(hole ? -ENOMEM : 0);
}

Operation mark_memory(ThreadImpl& thread, AddressRange range, Advice advice) {
  AddressSpace& space = *thread.process().space();
  const std::uint64_t start = range.start.value;
  const std::uint64_t end = start + round_up(range.length.value, kSmallPage);
  if (!page_aligned(start)) co_return result(-EINVAL);
  std::uint64_t at = start;
  bool refused = false;
  for (const Area* area : space.in_range(start, end)) {
    if (area->start > at) break;
    refused = refused || (area->huge() && advice != Advice::dont_fork);
    at = area->end;
  }
  if (refused) co_return result(-EINVAL);
  space.change(start, end, [advice](Area& area) {
    if (advice == Advice::dont_fork)
      area.dont_fork = true;
    else
      area.huge_advised = advice == Advice::huge_page;
  });
  co_return result(at < end ? -ENOMEM : 0);
}

// No event tells of it: the pages are still those of the process, and armed ones stay so by a marker.
// Source: mm/madvise.c, madvise_pageout().
Operation page_out_memory(ThreadImpl& thread, AddressRange range) {
  AddressSpace& space = *thread.process().space();
  const std::uint64_t start = range.start.value;
  const std::uint64_t end = start + round_up(range.length.value, kSmallPage);
  if (!page_aligned(start)) co_return result(-EINVAL);
  std::uint64_t at = start;
  for (const Area* area : space.in_range(start, end)) {
    if (area->start > at) break;
    if (area->huge()) co_return result(-EINVAL);
    at = std::min(end, area->end);
    if (!area->anonymous())
      space.zap(*area, std::max(start, area->start), at, AddressSpace::PrivateCopies::keep);
  }
  co_return result(at < end ? -ENOMEM : 0);
}

// Every 2 MiB that lie in the range and in one area become one page, if all of their pages are there: mapped,
// or in the page cache of a shared file. What is armed is left alone. Source: mm/khugepaged.c,
// madvise_collapse(), hpage_collapse_scan_pmd(), hpage_collapse_scan_file().
Operation collapse_memory(ThreadImpl& thread, AddressRange range) {
  AddressSpace& space = *thread.process().space();
  if (thread.process().machine().options.version < Version{6, 1}) co_return result(-EINVAL);
  const std::uint64_t end = (range.start.value + range.length.value) / kHugePage * kHugePage;
  int error = 0;
  for (std::uint64_t start = round_up(range.start.value, kHugePage); start < end; start += kHugePage) {
    Area* area = space.find(start);
    if (area == nullptr) co_return result(-ENOMEM);
    if (area->end < start + kHugePage || area->huge() || !(area->anonymous() || area->shmem()))
      co_return result(-EINVAL);
    const bool from_cache = area->memory == Memory::shmem_shared;
    bool all = true;
    for (std::uint64_t page = start; page < start + kHugePage; page += kSmallPage) {
      const Pte* pte = space.entry(page);
      const bool there = pte != nullptr && pte->present() && !pte->zero;
      if (pte != nullptr && pte->wp) all = false;
      if (!there && !(from_cache && area->object->find(area->offset_of(page)))) all = false;
    }
    if (!all) {
      error = -EBUSY;
      continue;
    }
    for (std::uint64_t page = start; page < start + kHugePage; page += kSmallPage) {
      if (space.entry(page) != nullptr) continue;
      space.set(page, Pte{.frame = area->object->find(area->offset_of(page)), .writable = area->writable});
    }
    space.map_huge(start);
  }
  co_return result(error);
}

}  // namespace uffdkit::sim
