// What threads do: accesses, and the system calls that change an address space. Where the kernel would sleep
// they co_await.
//
// An operation that a userfaultfd asked to hear of (its events) raises `changing` first, sleeps until the
// event has been read, and lets `changing` fall when it runs again. Events come after the deed for munmap,
// mremap and fork, and before it for madvise, whose pages are still there while the event waits.
#include <signal.h>

#include <algorithm>
#include <cerrno>

#include "sim/fault.h"
#include "sim/machine.h"

namespace uffdkit::sim {
namespace {

constexpr Completion result(std::int64_t value) {
  return {.kind = Completion::Kind::result, .result = value};
}

abi::Msg event_message(std::uint8_t event, std::uint64_t start, std::uint64_t end) {
  abi::Msg message{};
  message.event = event;
  message.arg.remove = {.start = start, .end = end};
  return message;
}

abi::Msg remap_message(std::uint64_t from, std::uint64_t to, std::uint64_t length) {
  abi::Msg message{};
  message.event = abi::kEventRemap;
  message.arg.remap = {.from = from, .to = to, .len = length};
  return message;
}

abi::Msg fork_message() {
  abi::Msg message{};
  message.event = abi::kEventFork;
  return message;
}

bool wants(const Area& area, std::uint64_t feature) {
  return area.context && (area.context->features & feature) != 0;
}

constexpr bool page_aligned(std::uint64_t number) {
  return number % kSmallPage == 0;
}
constexpr std::uint64_t round_up(std::uint64_t number, std::uint64_t unit) {
  return (number + unit - 1) / unit * unit;
}

// ---- accesses -------------------------------------------------------------------------------------------

// How a fault that nobody resolves ends: as a signal in user mode, as EFAULT of the system call in kernel
// mode.
Completion refuse(ThreadImpl& thread, const Access& access, FaultAnswer::Kind kind) {
  if (access.kernel_mode) return result(-EFAULT);
  using Kind = FaultAnswer::Kind;
  const bool machine_check = kind == Kind::poisoned && thread.process().machine().options.memory_failure;
  switch (kind) {
    case Kind::no_area:
      return {.kind = Completion::Kind::sigsegv, .result = SEGV_MAPERR, .address = access.address};
    case Kind::no_permission:
      return {.kind = Completion::Kind::sigsegv, .result = SEGV_ACCERR, .address = access.address};
    default:
      return {.kind = Completion::Kind::sigbus,
              .result = machine_check ? BUS_MCEERR_AR : BUS_ADRERR,
              .address = access.address};
  }
}

Completion carry_out(const Area& area, Pte& pte, const Access& access) {
  Completion completion{.kind = Completion::Kind::value};
  const std::uint64_t at = access.address.value % area.page();
  if (access.write) pte.frame->bytes[at] = access.value;
  completion.value = pte.frame ? pte.frame->bytes[at] : std::byte{};
  return completion;
}

// ---- taking memory away ---------------------------------------------------------------------------------

struct UnmapNotice {
  Changing changing;
  std::uint64_t start;
  std::uint64_t end;
};

// Removes what is mapped in a range; who asked for it hears of it, once for each userfaultfd and of the whole
// range. Source: fs/userfaultfd.c, userfaultfd_unmap_prep().
void take_away(AddressSpace& space, std::uint64_t start, std::uint64_t end,
               std::vector<UnmapNotice>& notices) {
  if (start == end) return;
  for (Area* area : space.in_range(start, end)) {
    if (!wants(*area, abi::kFeatureEventUnmap)) continue;
    const bool told = std::ranges::any_of(notices, [&](const UnmapNotice& notice) {
      return notice.changing.context() == area->context && notice.start == start && notice.end == end;
    });
    if (!told) notices.push_back({.changing = Changing(area->context), .start = start, .end = end});
  }
  space.remove(start, end);
}

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

Operation access_memory(ThreadImpl& thread, Access access) {
  for (;;) {
    AddressSpace& space = *thread.process().space();
    if (Pte* pte = reachable(space, access.address.value, access.write))
      co_return carry_out(*space.find(access.address.value), *pte, access);

    FaultAnswer fault = handle_fault(space, {.address = access.address.value,
                                             .write = access.write,
                                             .user_mode = !access.kernel_mode,
                                             .thread_id = static_cast<std::uint32_t>(thread.tid())});
    if (fault.kind == FaultAnswer::Kind::retry) continue;
    if (fault.kind == FaultAnswer::Kind::spin) {
      co_await thread.yield();
      continue;
    }
    if (fault.kind != FaultAnswer::Kind::sleep) co_return refuse(thread, access, fault.kind);
    {
      FaultWait queued(fault.context, thread, fault.message);
      // A pending signal lets nobody sleep. In user mode its handler runs and the access starts again; a
      // system call has nowhere to go and spins, with a new message each time, until the page is there.
      if (thread.signal_pending())
        co_await thread.yield();
      else
        co_await thread.sleep_in_fault(*fault.context);
    }
    if (!access.kernel_mode) thread.handle_signal();
  }
}

// ---- mmap, munmap, mprotect -----------------------------------------------------------------------------

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

// ---- madvise --------------------------------------------------------------------------------------------

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

// ---- mremap ---------------------------------------------------------------------------------------------

namespace {

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

// ---- fork -----------------------------------------------------------------------------------------------

namespace {

struct ForkNotice {
  Changing changing;
  ContextPtr parent;
  ContextPtr child;
};

// The entry that a child gets, and what becomes of the parent's. Private pages are shared from now on, to be
// copied by the next write. Armed pages stay armed only where the child is registered for it. Source:
// mm/memory.c, copy_present_pte(), copy_nonpresent_pte().
std::optional<Pte> share_entry(Pte& parent, const Area& child_area) {
  const bool armed = parent.wp && child_area.registered_for(abi::kRegisterWp);
  if (parent.marker()) {
    if (!parent.poison && !armed) return std::nullopt;
    return Pte{.wp = armed && !parent.poison, .poison = parent.poison};
  }
  if (!child_area.shared()) {
    parent.writable = false;
    if (parent.anon) parent.frame->exclusive = false;
  }
  Pte child = parent;
  child.wp = armed;
  return child;
}

// Source: kernel/fork.c, dup_mmap(); fs/userfaultfd.c, dup_userfaultfd(); mm/memory.c, vma_needs_copy().
void share_memory(AddressSpace& parent, const std::shared_ptr<AddressSpace>& child,
                  std::vector<ForkNotice>& notices) {
  for (const auto& [start, parent_area] : parent.areas()) {
    Area area = parent_area;
    area.reservation = nullptr;  // only who made the mapping owns it
    area.context = nullptr;
    area.modes = 0;
    if (wants(parent_area, abi::kFeatureEventFork)) {
      const auto known = std::ranges::find(notices, parent_area.context, &ForkNotice::parent);
      if (known == notices.end()) {
        auto context = std::make_shared<Context>(parent_area.context->flags, child);
        context->enabled = true;
        context->features = parent_area.context->features;
        notices.push_back({.changing = Changing(parent_area.context),
                           .parent = parent_area.context,
                           .child = std::move(context)});
        area.context = notices.back().child;
      } else {
        area.context = known->child;
      }
      area.modes = parent_area.modes;
    }
    // What the child can fault in again by itself is not copied.
    const bool copied = area.registered_for(abi::kRegisterWp) || area.anon_group != 0;
    child->areas().emplace(start, area);
    if (!copied) continue;
    auto& pages = parent.pages();
    for (auto it = pages.lower_bound(area.start); it != pages.end() && it->first < area.end; ++it)
      if (std::optional<Pte> pte = share_entry(it->second, area)) child->set(it->first, std::move(*pte));
  }
}

// A child that is not running yet; it never will if its parent dies before the event is read.
class Unborn {
 public:
  explicit Unborn(Process& child) : child_(&child) {}
  Unborn(const Unborn&) = delete;
  Unborn& operator=(const Unborn&) = delete;
  ~Unborn() {
    if (child_ != nullptr) child_->kill();
  }
  Process& release() { return *std::exchange(child_, nullptr); }

 private:
  Process* child_;
};

}  // namespace

Operation fork_process(ThreadImpl& thread) {
  ProcessImpl& parent = thread.process();
  Machine& machine = parent.machine();
  std::vector<ForkNotice> notices;
  const std::shared_ptr<AddressSpace> memory = machine.new_space();
  Unborn unborn(machine.new_process(parent.credentials(),
                                    std::make_shared<DescriptorTable>(*parent.descriptors()), memory));
  share_memory(*parent.space(), memory, notices);
  for (ForkNotice& notice : notices) {
    EventWait event(std::move(notice.changing), thread, fork_message(), std::move(notice.child));
    while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
  }
  Process& child = unborn.release();
  child.spawn_thread();
  co_return Completion{.kind = Completion::Kind::result, .result = child.pid(), .child = &child};
}

}  // namespace uffdkit::sim
