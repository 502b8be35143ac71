// PAGEMAP_SCAN: which pages are what, and arming those that were found, in one step each.
//
// A page's categories are read off its page table entry. "Written" is nothing but "not armed", so it says
// something only of memory that is registered for asynchronous protection (WP_ASYNC).
// Source: ioctl_pagemap_scan(2); Documentation/admin-guide/mm/pagemap.rst; fs/proc/task_mmu.c.
#include "sim/pagemap.h"

#include <poll.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <vector>

namespace uffdkit::sim {
namespace {

constexpr std::uint64_t kCategories = abi::kPageWpAllowed | abi::kPageWritten | abi::kPageFile |
                                      abi::kPagePresent | abi::kPageSwapped | abi::kPagePfnZero |
                                      abi::kPageHuge | abi::kPageSoftDirty;

// What may be armed: registered for asynchronous protection. Source: pagemap_scan_test_walk().
bool may_be_armed(const Area& area) {
  return area.registered_for(abi::kRegisterWp) && (area.context->features & abi::kFeatureWpAsync) != 0;
}

// A marker counts as swapped out; small pages that are empty count as written. `has_table`: that there is no
// page is said by a page table; where there is none, nothing is known but what the area is.
// Source: pagemap_page_category(), pagemap_hugetlb_category(), pagemap_scan_pte_hole().
std::uint64_t categories_of(const Area& area, const Pte* pte, bool has_table) {
  std::uint64_t found = may_be_armed(area) ? abi::kPageWpAllowed : 0;
  if (!has_table) return found;
  if (area.huge()) found |= abi::kPageHuge;
  if (pte == nullptr) return area.huge() ? found : found | abi::kPageWritten;
  if (!pte->wp) found |= abi::kPageWritten;
  if (!pte->present()) return found | abi::kPageSwapped;
  found |= abi::kPagePresent;
  if (pte->zero) return found | abi::kPagePfnZero;
  return pte->anon ? found : found | abi::kPageFile;
}

class Scan {
 public:
  Scan(AddressSpace& space, const abi::ScanArgs& args) : space_(space), args_(args) {
    args_.walk_end = args_.end;
  }

  // 0 or -errno.
  int run() {
    for (Area* area : space_.in_range(args_.start, args_.end)) {
      if (!may_be_armed(*area)) {
        if ((args_.flags & abi::kScanCheckWpAsync) != 0) return -EPERM;
        if (arms()) continue;
      }
      if (const int result = run(*area); result <= 0) return result;
    }
    return 0;
  }

  const std::vector<abi::PageRegion>& regions() const { return regions_; }
  std::uint64_t walk_end() const { return args_.walk_end; }

 private:
  bool arms() const { return (args_.flags & abi::kScanWpMatching) != 0; }
  bool reports() const { return args_.vec_len != 0; }

  // Whether so many bytes are more pages than may still be found.
  bool cannot_report(std::uint64_t bytes) const {
    return args_.max_pages != 0 && args_.max_pages - pages_found_ < bytes / kSmallPage;
  }

  bool matches(std::uint64_t categories) const {
    categories ^= args_.category_inverted;
    return (categories & args_.category_mask) == args_.category_mask &&
           (args_.category_anyof_mask == 0 || (categories & args_.category_anyof_mask) != 0);
  }

  // Whether there is a page table at all. Here one is there as long as it has an entry; the kernel keeps them
  // until what is mapped around them is gone. Empty pages are written where there is one, and not where
  // there is none. Source: pagemap_scan_pte_hole().
  bool has_table(const Area& area, std::uint64_t page) const {
    const std::uint64_t covered = area.huge() ? kHugePage * 512 : kHugePage;
    const std::uint64_t first = page / covered * covered;
    const auto& pages = space_.pages();
    const auto entry = pages.lower_bound(first);
    return entry != pages.end() && entry->first < first + covered;
  }

  // 1: go on with the next area; 0: the scan ends here; or -errno.
  int run(Area& area) {
    const std::uint64_t end = std::min(args_.end, area.end);
    std::uint64_t at = std::max(args_.start, area.start);
    while (at < end) {
      const std::uint64_t page = at / area.page() * area.page();
      const std::uint64_t next = std::min(page + area.page(), end);
      const std::uint64_t stop = visit(area, page, at, next);
      if (stop != next) {
        args_.walk_end = stop;
        return 0;
      }
      at = next;
    }
    return 1;
  }

  // Looks at one page, of which [at, next) is in the range. Returns `next`, or where the scan ends.
  std::uint64_t visit(Area& area, std::uint64_t page, std::uint64_t at, std::uint64_t next) {
    const Pte* pte = space_.entry(page);
    const bool hole = pte == nullptr && !has_table(area, page);
    std::uint64_t categories = categories_of(area, pte, !hole);
    if (space_.mapped_huge(page)) {
      // Arming a part of a huge page splits it. Source: pagemap_scan_thp_entry().
      const std::uint64_t first = page / kHugePage * kHugePage;
      const bool partly = first < args_.start || first + kHugePage > args_.end || cannot_report(kHugePage);
      const bool written = (categories & abi::kPageWritten) != 0;
      if (arms() && partly && written && matches(categories | abi::kPageHuge))
        space_.split(page, next);
      else
        categories |= abi::kPageHuge;
    }
    // Arming without a report takes all pages, whatever was asked. Source: pagemap_scan_pmd_entry().
    const bool without_question = !hole && !area.huge() && arms() && !reports();
    if (!without_question && !matches(categories)) return next;
    std::uint64_t stop = next;
    if (reports()) stop = report(categories & args_.return_mask, at, next);
    if (stop == at || !arms() || (!hole && (categories & abi::kPageWritten) == 0)) return stop;
    // A part of a huge page cannot be armed: it is as if it had not been looked at, but for where the scan
    // says that it ended. Source: pagemap_scan_hugetlb_entry().
    if (area.huge() && !hole && stop - at != kHugePage) {
      if (reports()) take_back(at, stop);
      args_.walk_end = at;
      return next;
    }
    arm(area, page);
    return stop;
  }

  // Source: pagemap_scan_output(), pagemap_scan_push_range().
  std::uint64_t report(std::uint64_t categories, std::uint64_t at, std::uint64_t next) {
    const std::uint64_t left = args_.max_pages == 0 ? UINT64_MAX : args_.max_pages - pages_found_;
    const std::uint64_t end = at + std::min(left, (next - at) / kSmallPage) * kSmallPage;
    if (end == at) return at;
    if (!regions_.empty() && regions_.back().end == at && regions_.back().categories == categories) {
      regions_.back().end = end;
    } else {
      if (regions_.size() == args_.vec_len) return at;
      regions_.push_back({.start = at, .end = end, .categories = categories});
    }
    pages_found_ += (end - at) / kSmallPage;
    return end;
  }

  // Source: pagemap_scan_backout_range().
  void take_back(std::uint64_t at, std::uint64_t end) {
    if (regions_.back().start == at)
      regions_.pop_back();
    else
      regions_.back().end = at;
    pages_found_ -= (end - at) / kSmallPage;
  }

  // A poisoned page can be armed too, which WRITEPROTECT leaves out. Source: make_uffd_wp_pte().
  void arm(Area& area, std::uint64_t page) {
    Pte* pte = space_.entry(page);
    if (pte != nullptr && pte->poison && !area.huge())
      pte->wp = true;
    else
      space_.protect(area, page, page + area.page(), true);
  }

  AddressSpace& space_;
  abi::ScanArgs args_;
  std::vector<abi::PageRegion> regions_;
  std::uint64_t pages_found_ = 0;
};

// Source: pagemap_scan_get_args().
int check(const abi::ScanArgs& args) {
  if (args.size != sizeof(args)) return -EINVAL;
  if ((args.flags & ~(abi::kScanWpMatching | abi::kScanCheckWpAsync)) != 0) return -EINVAL;
  const std::uint64_t asked =
      args.category_inverted | args.category_mask | args.category_anyof_mask | args.return_mask;
  if ((asked & ~kCategories) != 0) return -EINVAL;
  if (args.start % kSmallPage != 0) return -EINVAL;
  if (args.end < args.start || args.end > AddressSpace::kHighest) return -EFAULT;
  return args.vec == 0 && args.vec_len != 0 ? -EINVAL : 0;
}

}  // namespace

int PagemapFile::ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) {
  if (request != abi::kIoctlPagemapScan || caller.options.version < Version{6, 7}) return -ENOTTY;
  abi::ScanArgs args;
  if (!copy_from_host(&args, argument, sizeof(args))) return -EFAULT;
  if (const int checked = check(args); checked < 0) return checked;
  args.end = (args.end + kSmallPage - 1) / kSmallPage * kSmallPage;

  Scan scan(*space_, args);
  int result = scan.run();
  const auto& regions = scan.regions();
  if (!regions.empty() && !copy_to_host(args.vec, regions.data(), regions.size() * sizeof(regions[0])))
    result = -EFAULT;
  const std::uint64_t walk_end = scan.walk_end();
  if (!copy_to_host(argument + offsetof(abi::ScanArgs, walk_end), &walk_end, sizeof(walk_end)))
    return -EFAULT;
  return result < 0 ? result : static_cast<int>(regions.size());
}

std::ptrdiff_t PagemapFile::read(Caller& /*caller*/, std::uintptr_t /*buffer*/, std::size_t /*bytes*/) {
  return -EINVAL;
}

int PagemapFile::poll() const {
  return POLLIN;
}

}  // namespace uffdkit::sim
