// UFFDIO_API, REGISTER, UNREGISTER and WAKE: the handshake, and whose memory is whose.
#include <algorithm>
#include <cerrno>
#include <cstddef>

#include "sim/access_rules.h"
#include "sim/ioctls.h"

namespace uffdkit::sim {
namespace {

// Which memory can be registered for which faults. Asynchronous write protection needs no handler, so it
// works anywhere, if it is all that is asked for. Source: include/linux/userfaultfd_k.h, vma_can_userfault().
bool can_register(const Area& area, std::uint64_t modes, const Context& context, Version version) {
  if ((modes & abi::kRegisterMinor) != 0) {
    const bool cached = area.huge() ? version >= Version{5, 13} : area.shmem() && version >= Version{5, 14};
    if (!cached) return false;
  }
  if ((context.features & abi::kFeatureWpAsync) != 0 && modes == abi::kRegisterWp) return true;
  if ((modes & abi::kRegisterWp) != 0 && !area.anonymous() && version < Version{5, 19}) return false;
  return area.anonymous() || area.huge() || area.shmem();
}

// What the kernel says can be done with a range. It is told by the modes asked for and by whether there are
// huge pages, not by what will work: MOVE is there for shared memory, COPY for minor faults only. Source:
// fs/userfaultfd.c, UFFD_API_RANGE_IOCTLS.
std::uint64_t reported_ioctls(Version version, std::uint64_t modes, bool huge) {
  std::uint64_t ioctls = abi::kHasWake | abi::kHasCopy;
  if (!huge) ioctls |= abi::kHasZeropage;
  if (!huge && version >= Version{6, 8}) ioctls |= abi::kHasMove;
  if (version >= Version{6, 6}) ioctls |= abi::kHasPoison;
  if ((modes & abi::kRegisterWp) != 0) ioctls |= abi::kHasWriteprotect;
  if ((modes & abi::kRegisterMinor) != 0) ioctls |= abi::kHasContinue;
  return ioctls;
}

// The start of a range must lie on a huge page if the first mapping in it has them.
// Source: fs/userfaultfd.c, userfaultfd_register().
bool starts_inside_huge_page(const Area& first, std::uint64_t start) {
  return first.huge() && start % kHugePage != 0;
}

bool ends_inside_huge_page(const Area& area, std::uint64_t end) {
  return area.huge() && end < area.end && end % kHugePage != 0;
}

}  // namespace

// Once only on each descriptor; a failure zeroes the whole structure. Source: ioctl_userfaultfd(2),
// UFFDIO_API.
int ioctl_api(Caller& caller, Context& context, std::uintptr_t argument) {
  abi::ApiArgs args;
  if (!copy_from_host(&args, argument, sizeof(args))) return -EFAULT;
  const std::uint64_t available = features_of(caller.options.version);
  std::uint64_t wanted = args.features;
  // Asynchronous protection means nothing if empty pages cannot be armed, so it brings that along.
  if ((wanted & abi::kFeatureWpAsync) != 0) wanted |= abi::kFeatureWpUnpopulated;

  int result = 0;
  if (const int allowed = may_enable(caller.who, wanted); args.api == abi::kApi && allowed < 0)
    result = allowed;
  else if (args.api != abi::kApi || (wanted & ~available) != 0 || context.enabled)
    result = -EINVAL;

  constexpr std::uint64_t kIoctls = 0x8000000000000003;  // API, REGISTER, UNREGISTER
  args =
      result == 0 ? abi::ApiArgs{.api = abi::kApi, .features = available, .ioctls = kIoctls} : abi::ApiArgs{};
  if (!copy_to_host(argument, &args, sizeof(args))) return -EFAULT;
  if (result < 0) return result;
  context.features = wanted;
  context.enabled = true;
  return 0;
}

// Source: ioctl_userfaultfd(2), UFFDIO_REGISTER; fs/userfaultfd.c, userfaultfd_register(),
// userfaultfd_register_range().
int ioctl_register(Caller& caller, Context& context, std::uintptr_t argument) {
  abi::RegisterArgs args;
  if (!copy_from_host(&args, argument, offsetof(abi::RegisterArgs, ioctls))) return -EFAULT;
  constexpr std::uint64_t kModes = abi::kRegisterMissing | abi::kRegisterWp | abi::kRegisterMinor;
  if (args.mode == 0 || (args.mode & ~kModes) != 0) return -EINVAL;
  if (!is_valid_range(args.range.start, args.range.len)) return -EINVAL;
  const std::shared_ptr<AddressSpace> space = context.space();
  if (!space) return -ENOMEM;

  // Everything is checked before anything is changed. Holes do not matter, as long as there is something.
  const std::uint64_t start = args.range.start;
  const std::uint64_t end = start + args.range.len;
  const std::vector<Area*> areas = space->in_range(start, end);
  if (areas.empty() || starts_inside_huge_page(*areas.front(), start)) return -EINVAL;
  bool huge = false;
  for (const Area* area : areas) {
    if (!can_register(*area, args.mode, context, caller.options.version)) return -EINVAL;
    // COPY would write into memory that its owner may not write. Source: ioctl_userfaultfd(2), EPERM.
    if (!area->may_write) return -EPERM;
    if (ends_inside_huge_page(*area, end)) return -EINVAL;
    if (area->context && area->context.get() != &context) return -EBUSY;
    huge = huge || area->huge();
  }

  const ContextPtr self = context.shared_from_this();
  space->change(start, end, [&](Area& area) {
    // A range that has all of these modes and more keeps them: to narrow them, unregister first.
    if (area.context == self && (area.modes & args.mode) == args.mode) return;
    area.context = self;
    area.modes = args.mode;
  });
  const std::uint64_t ioctls = reported_ioctls(caller.options.version, args.mode, huge);
  return copy_to_host(argument + offsetof(abi::RegisterArgs, ioctls), &ioctls, sizeof(ioctls)) ? 0 : -EFAULT;
}

int ioctl_unregister(Caller& caller, Context& context, std::uintptr_t argument) {
  abi::RangeArgs args;
  if (!copy_from_host(&args, argument, sizeof(args))) return -EFAULT;
  if (!is_valid_range(args.start, args.len)) return -EINVAL;
  const std::shared_ptr<AddressSpace> space = context.space();
  if (!space) return -ENOMEM;

  const std::uint64_t end = args.start + args.len;
  const std::vector<Area*> areas = space->in_range(args.start, end);
  if (areas.empty() || starts_inside_huge_page(*areas.front(), args.start)) return -EINVAL;
  // Since 6.17 another's ranges are left alone; before, whoever held any userfaultfd of the process could
  // take them. Source: fs/userfaultfd.c, userfaultfd_unregister().
  const bool foreign_refused = caller.options.version >= Version{6, 17};
  for (const Area* area : areas) {
    if (!can_register(*area, area->modes, context, caller.options.version)) return -EINVAL;
    if (foreign_refused && area->context && area->context.get() != &context) return -EINVAL;
  }

  // Only those who may wait for missing pages are woken. Threads in write-protect and minor faults sleep on
  // until somebody calls WAKE, though nobody will ever resolve them: a known gap of the kernel, at least up
  // to 6.18. Source: fs/userfaultfd.c, userfaultfd_unregister().
  const auto clear = [&](const Area& area) {
    const std::uint64_t from = std::max(args.start, area.start);
    const std::uint64_t to = std::min(end, area.end);
    if (area.registered_for(abi::kRegisterMissing)) area.context->wake(from, to);
    if (area.registered_for(abi::kRegisterWp)) space->protect(area, from, to, false);
  };
  // That an area of huge pages cannot be cut here is found out when the rest is done.
  const Area* last = areas.back();
  const bool cut = last->context && ends_inside_huge_page(*last, end);
  if (cut) clear(*last);
  space->change(args.start, cut ? last->start : end, [&](Area& area) {
    if (!area.context) return;
    clear(area);
    area.context = nullptr;
    area.modes = 0;
  });
  return cut ? -EINVAL : 0;
}

// Needs neither a live process nor memory that is mapped. Source: ioctl_userfaultfd(2), UFFDIO_WAKE.
int ioctl_wake(Context& context, std::uintptr_t argument) {
  abi::RangeArgs args;
  if (!copy_from_host(&args, argument, sizeof(args))) return -EFAULT;
  if (!is_valid_range(args.start, args.len)) return -EINVAL;
  context.wake(args.start, args.start + args.len);
  return 0;
}

}  // namespace uffdkit::sim
