// mremap(2).
#include <algorithm>
#include <cerrno>

#include "sim/events.h"
#include "sim/machine.h"

namespace uffdkit::sim {
namespace {

abi::Msg remap_message(std::uint64_t from, std::uint64_t to, std::uint64_t length) {
  abi::Msg message{};
  message.event = abi::kEventRemap;
  message.arg.remap = {.from = from, .to = to, .len = length};
  return message;
}

// The area at the new place, with the pages of the old one. Registration goes along if the userfaultfd asked
// to hear of it, and is dropped without a word if it did not; then armed pages are disarmed as well
// (since 6.13). Source: mm/mremap.c, copy_vma_and_data(); fs/userfaultfd.c, mremap_userfaultfd_prep().
void move_pages(AddressSpace& space, const Area& from, std::uint64_t old_start, std::uint64_t old_length,
                std::uint64_t new_start, std::uint64_t new_length, bool disarm) {
  const bool keeps_registration = wants(from, abi::kFeatureEventRemap);
  const bool disarms = from.context && !keeps_registration && disarm;
  Area moved = from;
  moved.start = new_start;
  moved.end = new_start + new_length;
  // Anonymous memory without pages of its own is as good as mapped there.
  moved.offset = from.anonymous() && from.anon_group == 0 ? new_start : from.offset_of(old_start);
  // Huge pages stay huge where the new place can have them. Source: mm/mremap.c, move_huge_pmd().
  std::vector<std::uint64_t> huge;
  if ((new_start - old_start) % kHugePage == 0) huge = space.huge_in_range(old_start, old_start + old_length);
  space.split(old_start, old_start + old_length);
  auto& pages = space.pages();
  const auto first = pages.lower_bound(old_start);
  const auto end = pages.lower_bound(old_start + old_length);
  std::vector<std::pair<std::uint64_t, Pte>> taken(first, end);
  pages.erase(first, end);
  space.insert(std::move(moved));
  for (auto& [page, pte] : taken) {
    if (disarms && pte.marker() && pte.wp) continue;
    if (disarms) pte.wp = false;
    space.set(page - old_start + new_start, std::move(pte));
  }
  for (const std::uint64_t start : huge) space.map_huge(start - old_start + new_start);
  if (keeps_registration) return;
  // The area is dropped from registration after it has merged with its new neighbours, which are dropped with
  // it: moving a page next to its own area leaves all of that area unregistered.
  Area& merged = *space.find(new_start);
  merged.context = nullptr;
  merged.modes = 0;
}

bool overlap(std::uint64_t a, std::uint64_t a_length, std::uint64_t b, std::uint64_t b_length) {
  return a < b + b_length && b < a + a_length;
}

// What a call of mremap leaves to be told, in this order.
struct RemapNotices {
  struct Moved {
    Changing changing;
    std::uint64_t from;
    std::uint64_t to;
    std::uint64_t length;
  };
  std::vector<UnmapNotice> at_target;
  std::vector<Moved> moved;
  std::vector<UnmapNotice> left_behind;
};

// Moves [start, start + old_length), which lies in one area, to `target`, where nothing is mapped.
void move_area(AddressSpace& space, std::uint64_t start, std::uint64_t old_length, std::uint64_t target,
               std::uint64_t new_length, bool dont_unmap, Version version, RemapNotices& notices) {
  const Area& area = *space.find(start);
  if (wants(area, abi::kFeatureEventRemap))
    notices.moved.push_back(
        {.changing = Changing(area.context), .from = start, .to = target, .length = old_length});
  move_pages(space, area, start, old_length, target, new_length, version >= Version{6, 13});
  if (!dont_unmap) take_away(space, start, start + old_length, notices.left_behind);
}

// Since 6.17 a move that changes no size may take several areas along, with the holes between them; but none
// that a userfaultfd has, and of huge pages only one. What comes before one that stops it has been moved.
// Source: mm/mremap.c, remap_move(), vma_multi_allowed().
std::int64_t move_many(AddressSpace& space, std::uint64_t start, std::uint64_t length, std::uint64_t target,
                       bool dont_unmap, Version version, RemapNotices& notices) {
  const std::uint64_t end = start + length;
  std::uint64_t at = start;
  while (at < end) {
    const std::vector<Area*> rest = space.in_range(at, end);
    if (rest.empty()) break;
    const Area& area = *rest.front();
    const std::uint64_t from = std::max(at, area.start);
    if (at == start && from != start) return -EFAULT;
    const std::uint64_t area_end = area.end;
    const std::uint64_t part = std::min(end, area_end) - from;
    if (area.context && (from != start || area_end < end)) return -EFAULT;
    const std::uint64_t to = target + (from - start);
    if (area.huge() && (from % kHugePage != 0 || to % kHugePage != 0)) return -EINVAL;
    take_away(space, to, to + part, notices.at_target);
    move_area(space, from, part, to, part, dont_unmap, version, notices);
    at = area_end;
  }
  return static_cast<std::int64_t>(target);
}

// The whole call but the telling: the address, or -errno. Source: mm/mremap.c, do_mremap().
std::int64_t remap_areas(AddressSpace& space, const Remap& remap, Version version, RemapNotices& notices) {
  const std::uint64_t start = remap.from.start.value;
  std::uint64_t old_length = round_up(remap.from.length.value, kSmallPage);
  std::uint64_t new_length = round_up(remap.new_length.value, kSmallPage);
  if (!page_aligned(start) || new_length == 0 || old_length == 0) return -EINVAL;
  if ((remap.to || remap.dont_unmap) && !remap.may_move) return -EINVAL;
  if (remap.dont_unmap && old_length != new_length) return -EINVAL;
  if (remap.to && (!page_aligned(remap.to->value) || overlap(start, old_length, remap.to->value, new_length)))
    return -EINVAL;
  const Area* area = space.find(start);
  if (area == nullptr) return -EFAULT;
  if (remap.to && old_length == new_length && version >= Version{6, 17})
    return move_many(space, start, old_length, remap.to->value, remap.dont_unmap, version, notices);
  if (area->huge()) {
    old_length = round_up(old_length, kHugePage);
    new_length = round_up(new_length, kHugePage);
    if (start % kHugePage != 0 || (remap.to && remap.to->value % kHugePage != 0)) return -EINVAL;
    if (new_length > old_length || remap.dont_unmap) return -EINVAL;
  }
  const bool stays = !remap.to && !remap.dont_unmap;
  if (stays && new_length <= old_length) {
    take_away(space, start + new_length, start + old_length, notices.left_behind);
    return static_cast<std::int64_t>(start);
  }

  // What a shrinking call cuts off may belong to anybody; what it keeps must be of one area.
  if (start + std::min(old_length, new_length) > area->end) return -EFAULT;
  if (stays && start + old_length == area->end && space.is_free(start + old_length, start + new_length)) {
    // What is grown in place belongs to the area, and so to its userfaultfd.
    Area grown = *area;
    grown.offset = grown.offset_of(start + old_length);
    grown.start = start + old_length;
    grown.end = start + new_length;
    space.insert(std::move(grown));
    return static_cast<std::int64_t>(start);
  }
  if (!remap.may_move) return -ENOMEM;
  const std::uint64_t target = remap.to ? remap.to->value : space.find_place(new_length, kSmallPage);
  if (remap.to) take_away(space, target, target + new_length, notices.at_target);
  if (new_length < old_length) {
    take_away(space, start + new_length, start + old_length, notices.left_behind);
    old_length = new_length;
  }
  move_area(space, start, old_length, target, new_length, remap.dont_unmap, version, notices);
  return static_cast<std::int64_t>(target);
}

}  // namespace

// Source of the order of the events: mm/mremap.c, notify_uffd().
Operation remap_memory(ThreadImpl& thread, Remap remap) {
  RemapNotices notices;
  const Version version = thread.process().machine().options.version;
  const std::int64_t address = remap_areas(*thread.process().space(), remap, version, notices);
  for (UnmapNotice& notice : notices.at_target) {
    EventWait event(std::move(notice.changing), thread,
                    event_message(abi::kEventUnmap, notice.start, notice.end));
    while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
  }
  for (RemapNotices::Moved& moved : notices.moved) {
    EventWait event(std::move(moved.changing), thread, remap_message(moved.from, moved.to, moved.length));
    while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
  }
  for (UnmapNotice& notice : notices.left_behind) {
    EventWait event(std::move(notice.changing), thread,
                    event_message(abi::kEventUnmap, notice.start, notice.end));
    while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
  }
  co_return result(address);
}

}  // namespace uffdkit::sim
