#include "sim/fault.h"

#include <algorithm>

namespace uffdkit::sim {
namespace {

using Kind = FaultAnswer::Kind;

FaultAnswer answer(Kind kind) {
  return {.kind = kind};
}

// ---- handing a fault to the userfaultfd -----------------------------------------------------------------

// Source: fs/userfaultfd.c, handle_userfault() and userfault_msg().
FaultAnswer to_userfaultfd(const Area& area, const FaultRequest& request, std::uint64_t reason) {
  const Context& context = *area.context;
  // Who asked for SIGBUS hears nothing else, whatever the reason.
  if ((context.features & abi::kFeatureSigbus) != 0) return answer(Kind::refused);
  // A user-mode-only userfaultfd never makes the kernel wait: the system call fails instead.
  if ((context.flags & abi::kUserModeOnly) != 0 && !request.user_mode) return answer(Kind::refused);

  FaultAnswer answer{.kind = Kind::sleep, .context = area.context};
  answer.message.event = abi::kEventPagefault;
  auto& fault = answer.message.arg.pagefault;
  fault.flags = reason | (request.write ? abi::kPagefaultWrite : 0);
  const bool exact = (context.features & abi::kFeatureExactAddress) != 0;
  fault.address = exact ? request.address : request.address / area.page() * area.page();
  fault.ptid = (context.features & abi::kFeatureThreadId) != 0 ? request.thread_id : 0;
  return answer;
}

constexpr std::uint64_t kMissingReason = 0;

// ---- a page that is there, but not for writing ----------------------------------------------------------

// A write to a present page: armed pages are the userfaultfd's; others become writable, by a copy where they
// are shared with somebody. Source: mm/memory.c, do_wp_page(); mm/hugetlb.c, hugetlb_wp().
FaultAnswer write_to_protected(AddressSpace& space, Area& area, Pte& pte, const FaultRequest& request) {
  if (pte.wp && area.registered_for(abi::kRegisterWp)) {
    if ((area.context->features & abi::kFeatureWpAsync) == 0)
      return to_userfaultfd(area, request, abi::kPagefaultWp);
    // Asynchronous: the cleared bit is the record of the write.
    pte.wp = false;
    if (!area.huge()) space.split(request.address, request.address + 1);
  }
  // An armed huge page whose mapping was registered again without write-protect faults: the fault handler
  // leaves it to a userfaultfd that is not asked, and the writer faults for ever, at full speed. A trap
  // of 6.18. Source: mm/hugetlb.c, hugetlb_wp().
  if (pte.wp && area.huge()) return answer(Kind::spin);
  if (area.shared()) {
    pte.writable = true;
    return answer(Kind::retry);
  }
  if (pte.anon && (pte.frame->exclusive || pte.frame.use_count() == 1)) {
    pte.frame->exclusive = true;
    pte.writable = true;
    return answer(Kind::retry);
  }
  space.prepare_anonymous(area);
  FramePtr copy = area.huge()
                      ? allocate_private(area, area.offset_of(request.address / area.page() * area.page()))
                      : std::make_shared<Frame>(kSmallPage);
  if (!copy) return answer(Kind::refused);
  if (pte.frame) copy->bytes = pte.frame->bytes;
  if (!area.huge()) space.split(request.address, request.address + 1);
  pte = Pte{.frame = std::move(copy), .anon = true, .writable = true};
  return answer(Kind::retry);
}

// ---- a page that is not there ---------------------------------------------------------------------------

// A fault maps 2 MiB at once where that was advised and where nothing is mapped of them yet.
// Source: mm/huge_memory.c, do_huge_pmd_anonymous_page(); Documentation/admin-guide/mm/transhuge.rst.
bool map_huge_anonymous(AddressSpace& space, const Area& area, std::uint64_t address, bool write) {
  const std::uint64_t start = address / kHugePage * kHugePage;
  if (!area.huge_advised || start < area.start || start + kHugePage > area.end) return false;
  const auto first = space.pages().lower_bound(start);
  if (first != space.pages().end() && first->first < start + kHugePage) return false;
  const bool own = write || !space.reads_map_zero_page;
  for (std::uint64_t page = start; page < start + kHugePage; page += kSmallPage)
    space.set(page,
              own ? Pte{.frame = std::make_shared<Frame>(kSmallPage), .anon = true, .writable = area.writable}
                  : Pte{.zero = true});
  space.map_huge(start);
  return true;
}

// Source: mm/memory.c, do_anonymous_page().
FaultAnswer missing_anonymous(AddressSpace& space, Area& area, std::uint64_t page, bool armed,
                              const FaultRequest& request) {
  const bool own = request.write || !space.reads_map_zero_page;
  if (own) space.prepare_anonymous(area);
  if (area.registered_for(abi::kRegisterMissing)) return to_userfaultfd(area, request, kMissingReason);
  if (!armed && map_huge_anonymous(space, area, page, request.write)) return answer(Kind::retry);
  if (own)
    space.set(page, Pte{.frame = std::make_shared<Frame>(kSmallPage),
                        .anon = true,
                        .writable = area.writable && !armed,
                        .wp = armed});
  else
    space.set(page, Pte{.zero = true, .wp = armed});
  return answer(Kind::retry);
}

// A read maps what the page cache has around the page as well, 64 KiB at a time, without asking anybody;
// markers and mappings with protection or minor faults keep it from that. Source: mm/memory.c,
// do_fault_around(); include/linux/userfaultfd_k.h, uffd_disable_fault_around().
void fault_around(AddressSpace& space, const Area& area, std::uint64_t address) {
  if (area.registered_for(abi::kRegisterWp | abi::kRegisterMinor)) return;
  constexpr std::uint64_t kWindow = std::uint64_t{64} * 1024;
  const std::uint64_t first = std::max(address / kWindow * kWindow, area.start);
  const std::uint64_t end = std::min(address / kWindow * kWindow + kWindow, area.end);
  for (std::uint64_t page = first; page < end; page += kSmallPage) {
    if (space.entry(page) != nullptr || area.beyond_end(page)) continue;
    if (FramePtr frame = area.object->find(area.offset_of(page)))
      space.set(page, Pte{.frame = std::move(frame), .writable = area.shared() && area.writable});
  }
}

// The page of the page cache for an address, made if need be; or whose business it is.
// Source: mm/shmem.c, shmem_get_folio_gfp(); mm/hugetlb.c, hugetlb_no_page().
FaultAnswer find_in_cache(const Area& area, std::uint64_t page, const FaultRequest& request,
                          FramePtr& frame) {
  if (area.beyond_end(page)) return answer(Kind::refused);
  const std::uint64_t offset = area.offset_of(page);
  frame = area.object->find(offset);
  if (frame) {
    if (area.registered_for(abi::kRegisterMinor)) return to_userfaultfd(area, request, abi::kPagefaultMinor);
    return answer(Kind::retry);
  }
  if (area.registered_for(abi::kRegisterMissing)) return to_userfaultfd(area, request, kMissingReason);
  frame = area.object->fill(offset);
  return answer(frame ? Kind::retry : Kind::refused);
}

// Source: mm/memory.c, do_read_fault(), do_cow_fault(), do_shared_fault().
FaultAnswer missing_with_cache(AddressSpace& space, Area& area, std::uint64_t page, bool armed,
                               const FaultRequest& request) {
  const bool copies = request.write && !area.shared();
  if (copies) space.prepare_anonymous(area);
  if (!request.write) {
    fault_around(space, area, request.address);
    if (const Pte* pte = space.entry(page); pte != nullptr && pte->present()) return answer(Kind::retry);
  }
  FramePtr frame;
  FaultAnswer found = find_in_cache(area, page, request, frame);
  if (found.kind != Kind::retry) return found;
  if (copies) {
    auto copy = std::make_shared<Frame>(kSmallPage);
    copy->bytes = frame->bytes;
    space.set(page, Pte{.frame = std::move(copy), .anon = true, .writable = !armed, .wp = armed});
  } else {
    space.set(
        page,
        Pte{.frame = std::move(frame), .writable = area.shared() && area.writable && !armed, .wp = armed});
  }
  return found;
}

// A private mapping of huge pages whose file has no page gets an anonymous one; a page of the file is mapped
// read-only first, and copied by the write's next fault. Source: mm/hugetlb.c, hugetlb_no_page().
FaultAnswer missing_huge(Area& area, AddressSpace& space, std::uint64_t page, bool armed,
                         const FaultRequest& request) {
  if (area.beyond_end(page)) return answer(Kind::refused);
  const std::uint64_t offset = area.offset_of(page);
  FramePtr frame = area.object->find(offset);
  bool anon = false;
  if (frame) {
    if (area.registered_for(abi::kRegisterMinor)) return to_userfaultfd(area, request, abi::kPagefaultMinor);
  } else {
    if (area.registered_for(abi::kRegisterMissing)) return to_userfaultfd(area, request, kMissingReason);
    anon = !area.shared();
    if (anon) space.prepare_anonymous(area);
    frame = anon ? allocate_private(area, offset) : area.object->fill(offset);
    if (!frame) return answer(Kind::refused);
  }
  space.set(page, Pte{.frame = std::move(frame),
                      .anon = anon,
                      .writable = area.shared() && area.writable && !armed,
                      .wp = armed});
  return answer(Kind::retry);
}

}  // namespace

FramePtr allocate_private(Area& area, std::uint64_t offset) {
  if (area.shared()) return area.object->allocate(offset);
  const HugePoolPtr pool = area.object->pool();
  if (!pool->take(area.reservation && area.reservation->use(offset))) return nullptr;
  return std::make_shared<Frame>(kHugePage, pool);
}

Pte* reachable(AddressSpace& space, std::uint64_t address, bool write) {
  const Area* area = space.find(address);
  if (area == nullptr || !(write ? area->writable : area->readable || area->writable)) return nullptr;
  Pte* pte = space.entry(address / area->page() * area->page());
  return pte != nullptr && pte->present() && (!write || pte->writable) ? pte : nullptr;
}

// Source: arch/x86/mm/fault.c, do_user_addr_fault(); mm/memory.c, handle_pte_fault().
FaultAnswer handle_fault(AddressSpace& space, const FaultRequest& request) {
  // The protection of the mapping comes before everything: userfaultfd never sees what mprotect(2) forbids.
  Area* area = space.find(request.address);
  if (area == nullptr) return answer(Kind::no_area);
  if (!(request.write ? area->writable : area->readable || area->writable))
    return answer(Kind::no_permission);

  const std::uint64_t page = request.address / area->page() * area->page();
  Pte* pte = space.entry(page);
  if (pte != nullptr && pte->present()) return write_to_protected(space, *area, *pte, request);
  if (pte != nullptr && pte->poison) return answer(Kind::poisoned);
  // A marker of protection that is not registered any more means nothing.
  if (pte != nullptr && !area->registered_for(abi::kRegisterWp)) space.clear(page);
  // An armed page is missing in the first place; what is put there is armed in turn, and the write's next
  // fault is a write-protect fault.
  const bool armed = pte != nullptr && area->registered_for(abi::kRegisterWp);
  if (area->anonymous()) return missing_anonymous(space, *area, page, armed, request);
  if (area->huge()) return missing_huge(*area, space, page, armed, request);
  return missing_with_cache(space, *area, page, armed, request);
}

}  // namespace uffdkit::sim
