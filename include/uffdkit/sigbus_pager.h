// Layer: engine
// Memory of one's own process whose pages come on demand from a store, without a thread for it: the thread
// that touches a missing page gets SIGBUS, and brings the page itself, inside the signal handler.
//
//   auto pager = uffdkit::SigbusPager::create();
//   auto region = pager->map(uffdkit::open_file_store("image.mem").value());
//   use(region->bytes());
//
// Nobody needs a permission for it, no thread is switched to, and the threads that fault do so side by side.
// In return there is much that it cannot do, and Pager (pager.h) can:
// - A system call never waits for a page: given memory that is not there it fails with EFAULT, and so does
//   what another process reads of it. bring() makes memory ready for system calls.
// - A thread that blocks SIGBUS, or runs in a handler that does, is killed by the kernel at a missing page;
//   bring() works there. A stack within a region needs sigaltstack(2).
// - No event tells of changes, so the program must not munmap(2), mremap(2) or map over any part of a region:
//   mremap(2) would make its missing pages read as zero, without a word. mprotect(2) is fine. Pages are given
//   back by discard(), never by madvise(2), after which they would show the store's bytes again.
// - Only stores that can be read inside a signal handler: SignalSafeStore
//   (signal_safe_store.h). While a page is read,
//   its thread takes no signal and cannot be cancelled.
// - After fork(2) the child has no part of the regions: touching them is SIGSEGV there.
//
// The process's handler of SIGBUS belongs to the pagers from the first to the end of the last. What is not
// theirs (a mapped file that was cut short, a broken page of the machine, kill(2)) goes to the handler that
// was there before, or ends the process if there was none. A page that the store cannot give goes there too,
// with its address in si_addr; a handler that returns has it tried again. Whoever installs a handler later
// must pass on what is not his.
//
// Both classes are handles, which may be destroyed in any order. Threads: every call from any thread; none
// from a signal handler. Since Linux 4.14 (UFFD_FEATURE_SIGBUS; userfaultfd(2)).
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace uffdkit {

struct SigbusPagerOptions {
  // Pages of 4 KiB that are brought with each fault, its own included: a power of two from 1 to 512. The
  // pager has 16 buffers of this size; further threads that fault at the same time wait for one.
  PageCount fault_around{16};
};

struct SigbusMapOptions {
  StoreOffset offset = {};  // of the region's first byte in the store, a multiple of 4096
  ByteCount length = {};    // a multiple of 4096; 0 for all of the store from `offset` on
};

// What a pager has done so far.
struct SigbusPagerStatus {
  std::uint64_t faults;         // signals for missing pages
  std::uint64_t faults_failed;  // of these, passed on: the store or the kernel could not give the page
  std::uint64_t pages_copied;   // 4 KiB pages filled with bytes
  std::uint64_t pages_zeroed;   // 4 KiB pages mapped as zero
};

// A mapping whose pages come from a store. Private: what is written to it stays in it. The destructor unmaps
// it, so no thread may use it any more then.
class SigbusRegion {
 public:
  SigbusRegion(SigbusRegion&&) noexcept;
  SigbusRegion& operator=(SigbusRegion&&) noexcept;
  ~SigbusRegion();

  std::byte* data() const;
  ByteCount size() const;
  std::span<std::byte> bytes() const { return {data(), size().value}; }

  // Brings all pages that `part` touches, so that a system call can use it. Errors: `part` is not in the
  // region; a page cannot be had (says which; those before it are there); the process is a child of the
  // region's.
  Result<void> bring(std::span<const std::byte> part) const;

  // Gives the pages of `part` back to the kernel: from the call's end on they read as zero, whatever threads
  // did there meanwhile. Errors: `part` is not in the region, or not whole pages; the memory is locked
  // (mlock(2)); the process is a child of the region's.
  Result<void> discard(std::span<std::byte> part) const;

 private:
  friend class SigbusPager;
  class Impl;
  explicit SigbusRegion(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class SigbusPager {
 public:
  // Errors: no userfaultfd can be had (says why, way by way); the kernel lacks the feature; bad options;
  // a handler of SIGBUS was installed after the pagers' own and is still there.
  static Result<SigbusPager> create(const SigbusPagerOptions& options = {});
  SigbusPager(SigbusPager&&) noexcept;
  SigbusPager& operator=(SigbusPager&&) noexcept;
  ~SigbusPager();

  // Maps a region of `store`. Nothing is read until it is touched. Errors: the store is no SignalSafeStore;
  // the range is not in the store or not aligned; no address space; more than 512 regions in the process; the
  // process is a child of the pager's.
  Result<SigbusRegion> map(std::shared_ptr<Store> store, const SigbusMapOptions& options = {});

  SigbusPagerStatus status() const;

 private:
  friend class SigbusRegion;
  struct Impl;
  explicit SigbusPager(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace uffdkit
