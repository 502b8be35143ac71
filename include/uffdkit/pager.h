// Layer: engine
// Memory of one's own process whose pages come on demand from a store.
//
//   auto pager = uffdkit::Pager::create();
//   auto region = pager->map(uffdkit::open_file_store("image.mem").value());
//   use(region->bytes());
//
// A Pager has a handler thread; a Region is a mapping that it serves. Both are handles: they may be destroyed
// in any order, the last one ends the handler. Threads: every call from any thread but the handler's own (a
// Store's methods run on it and must not call back). What it cannot do: after fork(2) the child sees the
// pages that were there, and zeros for the others; map again in the child. Faults inside system calls
// (read(2) into a region) are served if the process may create a full userfaultfd; see
// PagerOptions::kernel_faults. Since Linux 4.11: the pager must hear of madvise, mremap and munmap
// (UFFD_FEATURE_EVENT_REMOVE, _REMAP, _UNMAP; userfaultfd(2)). Who touches a page that cannot be read
// gets SIGBUS since 6.6 (UFFDIO_POISON); before that the program is killed, for which it takes 5.3 (pidfd).
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace uffdkit {

struct PagerOptions {
  // Serve faults of system calls on the regions too. It needs access to /dev/userfaultfd, CAP_SYS_PTRACE or
  // vm.unprivileged_userfaultfd=1. Without it anybody may make a pager, but a system call on a page that is
  // not there fails with EFAULT. The difference exists since Linux 5.11 (UFFD_USER_MODE_ONLY,
  // ioctl_userfaultfd(2)).
  bool kernel_faults = true;
  // Pages of 4 KiB that are brought with each fault, its own included: a power of two from 1 to 512.
  PageCount fault_around{16};
};

struct MapOptions {
  StoreOffset offset = {};  // of the region's first byte in the store, a multiple of 4096
  ByteCount length = {};    // a multiple of the page size; 0 for all of the store from `offset` on
  bool huge_pages = false;  // 2 MiB pages of the machine's pool; offset and length are multiples of that then
};

// What a pager has done so far.
struct PagerStatus {
  std::uint64_t faults;          // fault messages
  std::uint64_t pages_copied;    // 4 KiB pages filled with bytes
  std::uint64_t pages_zeroed;    // 4 KiB pages mapped as zero
  std::uint64_t pages_removed;   // 4 KiB pages given back by madvise(2)
  std::uint64_t pages_poisoned;  // 4 KiB pages that the store could not give: they answer with SIGBUS
  std::uint64_t bytes_read;      // from stores
};

// A mapping whose pages come from a store. Private: what is written to it stays in it. Pages that are given
// back by madvise(2) read as zero from then on. The program may munmap(2), mremap(2) and mprotect(2) parts of
// it. The destructor unmaps what is left of it, wherever mremap(2) has moved it to, so no thread may use it
// any more then; what mremap(2) has added to it, or has left behind (MREMAP_DONTUNMAP), is the program's.
class Region {
 public:
  Region(Region&&) noexcept;
  Region& operator=(Region&&) noexcept;
  ~Region();

  std::byte* data() const;
  ByteCount size() const;
  std::span<std::byte> bytes() const { return {data(), size().value}; }

 private:
  friend class Pager;
  class Impl;
  explicit Region(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

class Pager {
 public:
  // Errors: no userfaultfd can be had (says why, way by way), no threads, bad options.
  static Result<Pager> create(const PagerOptions& options = {});
  Pager(Pager&&) noexcept;
  Pager& operator=(Pager&&) noexcept;
  ~Pager();

  // Maps a region of `store`. Nothing is read until it is touched. A page that the store cannot give answers
  // with SIGBUS. Errors: the range is not in the store or not aligned; no address space; no huge pages.
  Result<Region> map(std::shared_ptr<Store> store, const MapOptions& options = {});

  PagerStatus status() const;

 private:
  friend class Region;
  struct Impl;
  explicit Pager(std::shared_ptr<Impl> impl);
  std::shared_ptr<Impl> impl_;
};

}  // namespace uffdkit
