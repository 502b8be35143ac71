// Loads and stores of a thread: the part of the fault path that runs in the thread itself. It asks the fault
// handler (fault.cc), sleeps where that says so, and tries again: a woken thread knows nothing.
#include <signal.h>

#include <cerrno>

#include "sim/events.h"
#include "sim/fault.h"
#include "sim/machine.h"

namespace uffdkit::sim {
namespace {

// How a fault that nobody resolves ends: as a signal in user mode, as EFAULT of the system call in kernel
// mode. Source: arch/x86/mm/fault.c, do_user_addr_fault(), do_sigbus(), kernelmode_fixup_or_oops().
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
  completion.value = pte.frame ? pte.frame->bytes[at] : std::byte{};
  if (!access.write || (access.expected && *access.expected != completion.value)) return completion;
  pte.frame->bytes[at] = access.value;
  if (!access.expected) completion.value = access.value;
  return completion;
}

// A private page that others may share is copied before it is pinned, so that the device sees what the
// process sees; it stays armed. Source: mm/gup.c, gup_must_unshare(); mm/memory.c, wp_page_copy(), and
// mm/hugetlb.c, hugetlb_wp(), with FAULT_FLAG_UNSHARE.
bool pin_page(ProcessImpl& process, Area& area, Pte& pte, std::uint64_t page) {
  if (pte.zero || (!area.shared() && !pte.frame->exclusive)) {
    FramePtr copy =
        area.huge() ? allocate_private(area, area.offset_of(page)) : std::make_shared<Frame>(kSmallPage);
    if (!copy) return false;
    if (pte.frame) copy->bytes = pte.frame->bytes;
    process.space()->split(page, page + area.page());
    pte = Pte{.frame = std::move(copy), .anon = true, .wp = pte.wp};
  }
  process.pin(pte.frame);
  return true;
}

}  // namespace

// Source: fs/userfaultfd.c, handle_userfault(); arch/x86/mm/fault.c, fault_signal_pending().
Operation access_memory(ThreadImpl& thread, Access access) {
  for (;;) {
    AddressSpace& space = *thread.process().space();
    if (Pte* pte = reachable(space, access.address.value, access.write)) {
      Area& area = *space.find(access.address.value);
      const std::uint64_t page = access.address.value / area.page() * area.page();
      if (access.pin && !pin_page(thread.process(), area, *pte, page)) co_return result(-ENOMEM);
      co_return carry_out(area, *pte, access);
    }

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

}  // namespace uffdkit::sim
