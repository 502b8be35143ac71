// UFFDIO_WRITEPROTECT: arming pages, so that the next write to each is a fault, and disarming them.
#include <algorithm>
#include <cerrno>

#include "sim/ioctls.h"

namespace uffdkit::sim {

// It has no out field, may span areas, and stops at the first one that is not registered for it: what lay
// before that is done and stays done. Source: ioctl_userfaultfd(2), UFFDIO_WRITEPROTECT; mm/userfaultfd.c,
// mwriteprotect_range().
int ioctl_writeprotect(Context& context, std::uintptr_t argument) {
  if (context.changing > 0) return -EAGAIN;
  abi::WriteprotectArgs args;
  if (!copy_from_host(&args, argument, sizeof(args))) return -EFAULT;
  if (!is_valid_range(args.range.start, args.range.len)) return -EINVAL;
  if ((args.mode & ~(abi::kWriteprotectWp | abi::kWriteprotectDontWake)) != 0) return -EINVAL;
  const bool arm = (args.mode & abi::kWriteprotectWp) != 0;
  const bool wake = (args.mode & abi::kWriteprotectDontWake) == 0;
  if (arm && !wake) return -EINVAL;  // arming wakes nobody anyway
  const std::shared_ptr<AddressSpace> space = context.space();
  if (!space) return -ESRCH;

  const std::uint64_t start = args.range.start;
  const std::uint64_t end = start + args.range.len;
  int result = -ENOENT;
  for (Area* area : space->in_range(start, end)) {
    // Whose userfaultfd it is registered with is not asked.
    if (!area->registered_for(abi::kRegisterWp)) return -ENOENT;
    if (area->huge() && (start % kHugePage != 0 || args.range.len % kHugePage != 0)) return -EINVAL;
    space->protect(*area, std::max(start, area->start), std::min(end, area->end), arm);
    result = 0;
  }
  if (result == 0 && !arm && wake) context.wake(start, end);
  return result;
}

}  // namespace uffdkit::sim
