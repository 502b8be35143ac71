// madvise(2): DONTNEED, FREE, REMOVE.
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

}  // namespace uffdkit::sim
