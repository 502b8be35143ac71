// UFFDIO_MOVE: pages of anonymous memory change their address without being copied.
#include <cerrno>
#include <cstddef>

#include "sim/ioctls.h"

namespace uffdkit::sim {
namespace {

// Source: mm/userfaultfd.c, validate_move_areas().
bool can_move(const Area& src, const Area& dst, const Context& context) {
  return src.readable == dst.readable && src.writable == dst.writable && src.writable &&
         dst.context.get() == &context && src.anonymous() && dst.anonymous();
}

// Source: mm/userfaultfd.c, move_pages_ptes().
int move_page(AddressSpace& space, std::uint64_t src, std::uint64_t dst, bool holes_allowed) {
  if (space.entry(dst) != nullptr) return -EEXIST;
  Pte* from = space.entry(src);
  if (from == nullptr) return holes_allowed ? 0 : -ENOENT;  // counts as moved; the destination stays missing
  if (from->marker()) return -EFAULT;
  // A page that fork(2) once shared stays refused, even after the child is gone, until somebody writes to it.
  // So does one that is pinned.
  if (!from->zero && (!from->anon || !from->frame->exclusive || from->frame->pins > 0)) return -EBUSY;
  // The uffd-wp bit is lost on the way: an armed page arrives writable. A known gap, 6.8 to 6.18.
  Pte moved{.frame = from->frame, .zero = from->zero, .anon = from->anon, .writable = !from->zero};
  space.clear(src);
  space.set(dst, std::move(moved));
  return 0;
}

// A huge page moves whole from one place for huge pages to another that is empty; otherwise it is split
// first. Source: mm/userfaultfd.c, move_pages(), move_splits_huge_pmd().
bool moves_whole(AddressSpace& space, std::uint64_t src, std::uint64_t dst, std::uint64_t left) {
  if (!space.mapped_huge(src) || src % kHugePage != 0 || dst % kHugePage != 0 || left < kHugePage)
    return false;
  const auto at_dst = space.pages().lower_bound(dst);
  return at_dst == space.pages().end() || at_dst->first >= dst + kHugePage;
}

std::int64_t move_range(AddressSpace& space, const Context& context, const abi::CopyArgs& args) {
  Area* src = space.find(args.src);
  Area* dst = space.find(args.dst);
  if (dst != nullptr && !dst->shared()) space.prepare_anonymous(*dst);
  if (src == nullptr || dst == nullptr) return -ENOENT;
  if (src->shared() || args.src + args.len > src->end) return -EINVAL;
  if (dst->shared() || args.dst + args.len > dst->end) return -EINVAL;
  if (!can_move(*src, *dst, context)) return -EINVAL;

  const bool holes_allowed = (args.mode & abi::kMoveAllowSrcHoles) != 0;
  std::uint64_t whole_to = 0;
  for (std::uint64_t done = 0; done < args.len; done += kSmallPage) {
    const std::uint64_t to = args.dst + done;
    if (to >= whole_to && moves_whole(space, args.src + done, to, args.len - done)) whole_to = to + kHugePage;
    const int result = move_page(space, args.src + done, to, holes_allowed);
    if (result < 0) return done != 0 ? static_cast<std::int64_t>(done) : result;
    if (to + kSmallPage == whole_to) space.map_huge(whole_to - kHugePage);
  }
  return static_cast<std::int64_t>(args.len);
}

}  // namespace

// Order of the answers as in fill.cc, except that another process is told EINVAL before its arguments are
// looked at: pages never leave their process. Source: ioctl_userfaultfd(2), UFFDIO_MOVE; fs/userfaultfd.c,
// userfaultfd_move().
int ioctl_move(Caller& caller, Context& context, std::uintptr_t argument) {
  const std::uint64_t out_field = argument + offsetof(abi::CopyArgs, done);
  if (context.changing > 0) {
    const std::int64_t answer = -EAGAIN;
    if (caller.options.version >= Version{6, 16} && !copy_to_host(out_field, &answer, sizeof(answer)))
      return -EFAULT;
    return -EAGAIN;
  }
  abi::CopyArgs args;
  if (!copy_from_host(&args, argument, offsetof(abi::CopyArgs, done))) return -EFAULT;
  const std::shared_ptr<AddressSpace> space = context.space();
  if (!caller.space || caller.space != space) return -EINVAL;
  if (!is_valid_range(args.dst, args.len) || !is_valid_range(args.src, args.len) ||
      (args.mode & ~(abi::kDontWake | abi::kMoveAllowSrcHoles)) != 0)
    return -EINVAL;

  const std::int64_t done = move_range(*space, context, args);
  if (!copy_to_host(out_field, &done, sizeof(done))) return -EFAULT;
  if (done < 0) return static_cast<int>(done);
  const auto bytes = static_cast<std::uint64_t>(done);
  if ((args.mode & abi::kDontWake) == 0) context.wake(args.dst, args.dst + bytes);
  return bytes == args.len ? 0 : -EAGAIN;
}

}  // namespace uffdkit::sim
