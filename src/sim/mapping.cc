// mmap(2), munmap(2) and mprotect(2).
#include <algorithm>
#include <cerrno>

#include "sim/events.h"
#include "sim/machine.h"

namespace uffdkit::sim {
namespace {

bool cuts_huge_area(AddressSpace& space, std::uint64_t start, std::uint64_t end) {
  const auto cut = [&](std::uint64_t at) {
    const Area* area = space.find(at);
    return area != nullptr && area->huge() && area->start != at && at % kHugePage != 0;
  };
  return cut(start) || cut(end);
}

// Whether areas can be cut at both ends of a range. The first cut is made before the second is looked at, and
// stays. Source: mm/vma.c, vms_gather_munmap_vmas().
bool cut_out(AddressSpace& space, std::uint64_t start, std::uint64_t end) {
  if (cuts_huge_area(space, start, start)) return false;
  space.cut(start);
  return !cuts_huge_area(space, end, end);
}

// The parts of [start, end) that lie in one area each.
std::vector<AddressRange> parts_of(AddressSpace& space, std::uint64_t start, std::uint64_t end) {
  std::vector<AddressRange> parts;
  for (const Area* area : space.in_range(start, end)) {
    const std::uint64_t from = std::max(start, area->start);
    parts.push_back({Address(from), ByteCount(std::min(end, area->end) - from)});
  }
  return parts;
}

}  // namespace

// Source: mmap(2), "ERRORS"; mm/mmap.c, do_mmap(); mm/hugetlb.c, hugetlb_reserve_pages().
std::int64_t map_area(Machine& machine, AddressSpace& space, const MapRequest& request) {
  const std::uint64_t page = page_size(request.memory).bytes().value;
  const std::uint64_t length = round_up(request.length.value, page);
  if (length == 0 || request.offset % page != 0) return -EINVAL;
  Area area{.start = 0, .end = 0, .memory = request.memory, .object = nullptr, .offset = request.offset};
  if (!area.anonymous()) {
    const auto kind = area.huge()    ? PageCache::Kind::hugetlb
                      : area.shmem() ? PageCache::Kind::shmem
                                     : PageCache::Kind::file;
    area.object = request.object ? std::dynamic_pointer_cast<PageCache>(request.object)
                                 : machine.new_object(kind, ByteCount(request.offset + length));
    if (!area.object || area.object->kind() != kind) return -EINVAL;
  }
  area.readable = request.readable;
  area.writable = request.writable;
  area.may_write = !(area.shared() && request.read_only_descriptor);
  if (area.writable && !area.may_write) return -EACCES;

  area.start = request.fixed ? request.fixed->value : space.find_place(length, page);
  area.end = area.start + length;
  if (area.start % page != 0 || area.start < AddressSpace::kLowest || area.end > AddressSpace::kHighest)
    return -EINVAL;
  if (!space.is_free(area.start, area.end)) return -EEXIST;
  if (area.anonymous()) area.offset = area.start;
  if (area.memory == Memory::hugetlb_shared && !area.object->reserve(area.offset, area.offset + length))
    return -ENOMEM;
  if (area.memory == Memory::hugetlb_private) {
    area.reservation = std::make_shared<Reservation>(area.object->pool());
    if (!area.reservation->extend(area.offset, area.offset + length, {})) return -ENOMEM;
  }
  const std::uint64_t start = area.start;
  space.insert(std::move(area));
  return static_cast<std::int64_t>(start);
}

// What a fixed mapping replaces is told of when all is done. Source: mm/vma.c, __mmap_region();
// fs/userfaultfd.c, userfaultfd_unmap_complete().
Operation map_memory(ThreadImpl& thread, MapRequest request) {
  AddressSpace& space = *thread.process().space();
  std::vector<UnmapNotice> notices;
  if (request.fixed) {
    const std::uint64_t start = request.fixed->value;
    const std::uint64_t end = start + round_up(request.length.value, page_size(request.memory).bytes().value);
    if (!page_aligned(start) || !cut_out(space, start, end)) co_return result(-EINVAL);
    take_away(space, start, end, notices);
  }
  const std::int64_t address = map_area(thread.process().machine(), space, request);
  for (UnmapNotice& notice : notices) {
    EventWait event(std::move(notice.changing), thread,
                    event_message(abi::kEventUnmap, notice.start, notice.end));
    while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
  }
  co_return result(address);
}

// Source: mm/vma.c, do_vmi_align_munmap(); mm/mmap.c, __vm_munmap().
Operation unmap_memory(ThreadImpl& thread, AddressRange range) {
  AddressSpace& space = *thread.process().space();
  const std::uint64_t start = range.start.value;
  const std::uint64_t end = start + round_up(range.length.value, kSmallPage);
  if (!page_aligned(start) || start >= end) co_return result(-EINVAL);
  if (!cut_out(space, start, end)) co_return result(-EINVAL);
  std::vector<UnmapNotice> notices;
  take_away(space, start, end, notices);
  for (UnmapNotice& notice : notices) {
    EventWait event(std::move(notice.changing), thread,
                    event_message(abi::kEventUnmap, notice.start, notice.end));
    while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
  }
  co_return result(0);
}

// Source: mm/mprotect.c, do_mprotect_pkey(), mprotect_fixup().
Operation protect_memory(ThreadImpl& thread, AddressRange range, bool readable, bool writable) {
  AddressSpace& space = *thread.process().space();
  const std::uint64_t start = range.start.value;
  const std::uint64_t end = start + round_up(range.length.value, kSmallPage);
  if (!page_aligned(start)) co_return result(-EINVAL);
  if (start == end) co_return result(0);
  // Area by area: what comes before a hole, or before an area that refuses, is changed all the same.
  std::uint64_t at = start;
  for (const AddressRange part : parts_of(space, start, end)) {
    const std::uint64_t from = part.start.value;
    const std::uint64_t to = part.end().value;
    if (from > at) break;
    at = to;
    const Area& area = *space.find(from);
    if (area.readable == readable && area.writable == writable) continue;
    if (writable && !area.may_write) co_return result(-EACCES);
    if (cuts_huge_area(space, from, to)) co_return result(-EINVAL);
    space.change(from, to, [&](Area& changed) {
      changed.readable = readable;
      changed.writable = writable;
    });
    if (writable) continue;  // the next write to each page finds out by itself
    auto& pages = space.pages();
    for (auto it = pages.lower_bound(from); it != pages.end() && it->first < to; ++it)
      it->second.writable = false;
  }
  co_return result(at < end ? -ENOMEM : 0);
}

}  // namespace uffdkit::sim
