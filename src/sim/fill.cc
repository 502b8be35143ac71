// UFFDIO_COPY, ZEROPAGE, CONTINUE and POISON: putting something where nothing is.
//
// All four go the same way, in this order: memory that is changing (EAGAIN, also in the out field), arguments
// (EFAULT, EINVAL; the out field stays), a process that is gone (ESRCH; likewise), then page by page. The out
// field then has the bytes that were done or, if none, the error. A call that stopped half-way says EAGAIN
// and hides the reason; going on from where it stopped tells it. Whoever waited in the part that was done is
// woken. Source: ioctl_userfaultfd(2); fs/userfaultfd.c, userfaultfd_copy(); mm/userfaultfd.c,
// mfill_atomic().
#include <cerrno>
#include <cstddef>
#include <cstring>

#include "sim/fault.h"
#include "sim/ioctls.h"

namespace uffdkit::sim {
namespace {

enum class Filling : std::uint8_t { copy, zero, resume, poison };

struct Fill {
  Filling how;
  std::uint64_t dst;
  std::uint64_t src;  // of a copy
  std::uint64_t len;
  bool armed;  // COPY_MODE_WP, CONTINUE_MODE_WP
};

bool none_or_marker(const Pte* pte) {
  return pte == nullptr || pte->marker();
}

// Copying comes before any look at the page table, on small pages: a source that cannot be read is EFAULT
// even where a page is present. Source: mm/userfaultfd.c, mfill_atomic_pte_copy(),
// mfill_atomic_install_pte(); mm/shmem.c, shmem_mfill_atomic_pte().
int copy_small(AddressSpace& space, Area& area, std::uint64_t page, std::uint64_t src, bool zeros,
               bool armed) {
  auto frame = std::make_shared<Frame>(kSmallPage);
  if (!zeros && !copy_from_host(frame->bytes.data(), src, kSmallPage)) return -EFAULT;
  if (area.beyond_end(page)) return -EFAULT;
  const std::uint64_t offset = area.offset_of(page);
  // Memory that is shared gets its page in the page cache, and one there is in the way even when nothing is
  // mapped. A private mapping gets an anonymous page, whatever the page cache holds.
  if (area.shared() && area.object->find(offset)) return -EEXIST;
  if (!none_or_marker(space.entry(page))) return -EEXIST;
  if (area.shared()) area.object->insert(offset, frame);
  space.set(page, Pte{.frame = std::move(frame),
                      .anon = !area.shared(),
                      .writable = area.writable && !armed,
                      .wp = armed});
  return 0;
}

// A private mapping gets the shared page of zeros, and refuses where even a marker is.
// Source: mm/userfaultfd.c, mfill_atomic_pte_zeropage().
int zero_small(AddressSpace& space, Area& area, std::uint64_t page) {
  if (area.shared()) return copy_small(space, area, page, 0, true, false);
  if (area.beyond_end(page)) return -EFAULT;
  if (space.entry(page) != nullptr) return -EEXIST;
  space.set(page, Pte{.zero = true});
  return 0;
}

// Maps what the page cache has. In a private mapping it is mapped read-only: a write makes a copy of it.
// Source: mm/userfaultfd.c, mfill_atomic_pte_continue().
int resume_page(AddressSpace& space, Area& area, std::uint64_t page, bool armed) {
  // Beyond the end of the file shmem says EINVAL and hugetlbfs that there is no page.
  if (!area.huge() && area.beyond_end(page)) return -EINVAL;
  FramePtr frame = area.object->find(area.offset_of(page));
  if (!frame) return -EFAULT;
  if (!none_or_marker(space.entry(page))) return -EEXIST;
  space.set(
      page,
      Pte{.frame = std::move(frame), .writable = area.shared() && area.writable && !armed, .wp = armed});
  return 0;
}

// Source: mm/userfaultfd.c, mfill_atomic_pte_poison().
int poison_page(AddressSpace& space, Area& area, std::uint64_t page) {
  if (area.beyond_end(page)) return -EFAULT;
  if (space.entry(page) != nullptr) return -EEXIST;
  space.set(page, Pte{.poison = true});
  return 0;
}

// With huge pages the page table is asked first, then memory is taken, then it is filled.
// Source: mm/hugetlb.c, hugetlb_mfill_atomic_pte().
int copy_huge(AddressSpace& space, Area& area, std::uint64_t page, std::uint64_t src, bool armed) {
  if (!none_or_marker(space.entry(page))) return -EEXIST;
  const std::uint64_t offset = area.offset_of(page);
  if (area.shared() && area.object->find(offset)) return -EEXIST;
  // An empty pool is EEXIST as well, where ENOMEM would be the truth: a known trap of 6.18.
  FramePtr frame = allocate_private(area, offset);
  if (!frame) return -EEXIST;
  if (!copy_from_host(frame->bytes.data(), src, kHugePage)) return -EFAULT;
  if (area.shared() && area.beyond_end(page)) return -EFAULT;
  if (area.shared()) area.object->insert(offset, frame);
  space.set(page, Pte{.frame = std::move(frame),
                      .anon = !area.shared(),
                      .writable = area.writable && !armed,
                      .wp = armed});
  return 0;
}

int fill_page(AddressSpace& space, Area& area, const Fill& fill, std::uint64_t done) {
  const std::uint64_t page = fill.dst + done;
  switch (fill.how) {
    case Filling::copy:
      return area.huge() ? copy_huge(space, area, page, fill.src + done, fill.armed)
                         : copy_small(space, area, page, fill.src + done, false, fill.armed);
    case Filling::zero:
      return zero_small(space, area, page);
    case Filling::resume:
      return resume_page(space, area, page, fill.armed);
    case Filling::poison:
      return poison_page(space, area, page);
  }
  return -EINVAL;
}

// Bytes done, or -errno if none.
std::int64_t fill_range(AddressSpace& space, const Fill& fill) {
  // The whole range in one registered area. Whose userfaultfd it is registered with is not asked.
  Area* area = space.find(fill.dst);
  if (area == nullptr) return -ENOENT;
  // The area becomes one with private pages even if the call is refused, which can keep it from ever merging
  // again. Source: mm/userfaultfd.c, uffd_lock_vma().
  if (!area->shared()) space.prepare_anonymous(*area);
  if (fill.dst + fill.len > area->end || !area->context) return -ENOENT;
  if (fill.armed && !area->registered_for(abi::kRegisterWp)) return -EINVAL;
  if (area->huge()) {
    if (fill.how == Filling::zero) return -EINVAL;  // there is no huge page of zeros to map
    if (fill.dst % kHugePage != 0 || fill.len % kHugePage != 0) return -EINVAL;
  } else if (!area->shmem() && (!area->anonymous() || fill.how == Filling::resume)) {
    return -EINVAL;
  }

  std::uint64_t done = 0;
  while (done < fill.len) {
    const int result = fill_page(space, *area, fill, done);
    if (result < 0) return done != 0 ? static_cast<std::int64_t>(done) : result;
    done += area->page();
  }
  return static_cast<std::int64_t>(done);
}

// The part that comes before the arguments are even read. Source: fs/userfaultfd.c; the out field since 6.16.
int refuse_changing(const Caller& caller, std::uint64_t out_field) {
  const std::int64_t answer = -EAGAIN;
  if (caller.options.version >= Version{6, 16} && !copy_to_host(out_field, &answer, sizeof(answer)))
    return -EFAULT;
  return -EAGAIN;
}

// The part that comes after them.
int run(Context& context, const Fill& fill, bool wake, std::uint64_t out_field) {
  const std::shared_ptr<AddressSpace> space = context.space();
  if (!space) return -ESRCH;
  const std::int64_t done = fill_range(*space, fill);
  if (!copy_to_host(out_field, &done, sizeof(done))) return -EFAULT;
  if (done < 0) return static_cast<int>(done);
  const auto bytes = static_cast<std::uint64_t>(done);
  if (wake) context.wake(fill.dst, fill.dst + bytes);
  return bytes == fill.len ? 0 : -EAGAIN;
}

// ZEROPAGE, CONTINUE and POISON have the same structure.
int ioctl_fill(Caller& caller, Context& context, std::uintptr_t argument, Filling how, std::uint64_t modes) {
  const std::uint64_t out_field = argument + offsetof(abi::FillArgs, done);
  if (context.changing > 0) return refuse_changing(caller, out_field);
  abi::FillArgs args;
  if (!copy_from_host(&args, argument, offsetof(abi::FillArgs, done))) return -EFAULT;
  if (!is_valid_range(args.range.start, args.range.len) || (args.mode & ~modes) != 0) return -EINVAL;
  const Fill fill{.how = how,
                  .dst = args.range.start,
                  .src = 0,
                  .len = args.range.len,
                  .armed = (args.mode & abi::kContinueWp) != 0};
  return run(context, fill, (args.mode & abi::kDontWake) == 0, out_field);
}

}  // namespace

int ioctl_copy(Caller& caller, Context& context, std::uintptr_t argument) {
  const std::uint64_t out_field = argument + offsetof(abi::CopyArgs, done);
  if (context.changing > 0) return refuse_changing(caller, out_field);
  abi::CopyArgs args;
  if (!copy_from_host(&args, argument, offsetof(abi::CopyArgs, done))) return -EFAULT;
  if (!is_valid_unaligned_range(args.src, args.len) || !is_valid_range(args.dst, args.len) ||
      (args.mode & ~(abi::kDontWake | abi::kCopyWp)) != 0)
    return -EINVAL;
  const Fill fill{.how = Filling::copy,
                  .dst = args.dst,
                  .src = args.src,
                  .len = args.len,
                  .armed = (args.mode & abi::kCopyWp) != 0};
  return run(context, fill, (args.mode & abi::kDontWake) == 0, out_field);
}

int ioctl_zeropage(Caller& caller, Context& context, std::uintptr_t argument) {
  return ioctl_fill(caller, context, argument, Filling::zero, abi::kDontWake);
}

int ioctl_continue(Caller& caller, Context& context, std::uintptr_t argument) {
  return ioctl_fill(caller, context, argument, Filling::resume, abi::kDontWake | abi::kContinueWp);
}

int ioctl_poison(Caller& caller, Context& context, std::uintptr_t argument) {
  return ioctl_fill(caller, context, argument, Filling::poison, abi::kDontWake);
}

}  // namespace uffdkit::sim
