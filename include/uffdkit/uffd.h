// Layer: kernel
// A userfaultfd: created, or received from another process, and all that can be asked of it.
//
// Threads: every call may come from any thread at any time; the kernel orders them. Destruction must be last.
// Lifetime: closing the last descriptor of a userfaultfd unregisters all of its memory and lets every waiting
// thread go on, with zero pages where none was installed. A Uffd owns one descriptor.
// Ranges are addresses of the process that created the userfaultfd. start and length must be multiples of the
// page size (of the huge page size on hugetlbfs); anything else is Stop::invalid.
// Nothing here allocates except for the text of an Error. Source, unless another is named:
// ioctl_userfaultfd(2).
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/error.h>
#include <uffdkit/features.h>
#include <uffdkit/message.h>
#include <uffdkit/system_calls.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <span>
#include <string>
#include <vector>

namespace uffdkit {

// ---- what comes of filling pages ------------------------------------------------------------------------

// Why a call that fills, moves or protects pages stopped where it did.
enum class Stop : std::uint8_t {
  complete,   // all done
  changing,   // EAGAIN, nothing done: the address space is changing. An event is unread, or its process has
              // not run since it was read. Drain the messages, then try again later; the kernel sends no new
              // message for it
  cut_short,  // EAGAIN after some bytes: the cause is hidden. Go on at start + done to hear it
  present,    // EEXIST: a page is there already (at start + 0). Nobody was woken: call wake()
  not_ready,  // ENOENT: not mapped, not registered, the range crosses two mappings, or (MOVE) the source is a
              // hole
  gone,       // ESRCH: the process has exited or called exec
  no_memory,  // ENOMEM: no memory, or the client's memory cgroup is at its limit
  bad_memory,  // EFAULT: the source cannot be read, or the range lies beyond the end of its file; CONTINUE:
               // no page in the page cache
  busy,        // EBUSY (MOVE): the source page is shared or pinned
  poisoned,    // EHWPOISON or EIO: the page has a hardware memory error
  invalid,     // EINVAL: alignment, mode or kind of memory; a bug of the caller
  other,       // any other errno: see os_error
};

// How much was done and why it stopped; both are always known.
struct Outcome {
  ByteCount done;    // bytes from the start of the range that were completed, and whose waiters were woken
  Stop stop;         // complete exactly when `done` is the whole range
  int os_error = 0;  // errno of the call, or the negative count of its out field; 0 when complete
};

// "present (EEXIST)" for logs.
std::string to_string(Stop stop);

// Whether the threads that wait for a filled range are woken.
enum class Wake : bool { no, yes };
// Whether pages arrive write-protected through userfaultfd; needs a range registered for write-protect
// faults.
enum class Protect : bool { no, yes };
// Whether holes of the source of a MOVE are skipped, or end it with Stop::not_ready.
enum class SourceHoles : bool { refuse, allow };

// What a userfaultfd's process is doing with its memory.
enum class Target : std::uint8_t {
  steady,    // no event is on its way
  changing,  // an event is unread, or its process has not run since it was read
  gone,      // the process has exited or called exec
};

// ---- creating -------------------------------------------------------------------------------------------

// A way to create a userfaultfd. They differ in who may use them and in which faults are handled.
enum class CreateWay : std::uint8_t {
  device,            // USERFAULTFD_IOC_NEW on /dev/userfaultfd (6.1): who may open the device may use it
  system_call,       // userfaultfd(2): CAP_SYS_PTRACE, or vm.unprivileged_userfaultfd=1
  device_user_mode,  // the device with UFFD_USER_MODE_ONLY: faults inside system calls fail with EFAULT
  user_mode,         // userfaultfd(2) with UFFD_USER_MODE_ONLY (5.11): anybody, likewise
};
std::string to_string(CreateWay way);

// What came of one way.
struct CreateAttempt {
  CreateWay way;
  int os_error;        // 0: it works
  std::string reason;  // why it was refused, in words; empty if it works
  std::string remedy;  // what would make it work; empty if it works
};

// What the caller needs of a userfaultfd.
struct UffdNeeds {
  // Faults that happen inside the kernel on the process's behalf (read(2) into a missing page, a KVM guest's
  // accesses) must be served too. Without this, descriptors that only see user-mode faults are accepted.
  bool kernel_faults = true;
  Features required = {};  // creation fails without these
  Features wanted = {};    // enabled where the kernel has them
  bool close_on_exec = true;
  bool non_blocking = true;  // poll(2) works only on non-blocking ones
};

// How a kernel answers UFFDIO_API.
struct KernelFeatures {
  Features available;    // all bits that the kernel reports, known to us or not
  std::uint64_t ioctls;  // UFFDIO_API's out field
};

// ---- PAGEMAP_SCAN ---------------------------------------------------------------------------------------

// A run of pages that a scan found, with the categories (abi::kPage...) that were asked for.
struct ScannedRange {
  AddressRange range;
  std::uint64_t categories;
};

// Which pages a scan looks for: ((categories ^ inverted) & mask) == mask, and one of `any_of` if it is not 0.
struct ScanQuery {
  AddressRange range;
  std::uint64_t mask = 0;
  std::uint64_t inverted = 0;
  std::uint64_t any_of = 0;
  std::uint64_t report = 0;     // the categories to report for each range
  std::uint64_t max_pages = 0;  // stop after so many matching pages; 0 for no limit
  // Write-protect what matched, atomically with reporting it (WP_ASYNC ranges only).
  bool protect_matching = false;
  // Fail with EPERM where a mapping is not registered for asynchronous protection.
  bool require_wp_async = false;
};

struct ScanResult {
  std::size_t ranges;  // how many entries of the caller's array were filled
  Address walk_end;    // where it stopped: the end of the range, or where to go on
};

// /proc/PID/pagemap of one process.
class Pagemap {
 public:
  // Opens the pagemap of `pid`, 0 for this process. Another process's needs the right to ptrace it.
  // Errors: no such process; no permission.
  static Result<Pagemap> open(int pid, SystemCalls& system = linux_system_calls());
  Pagemap(Pagemap&& other) noexcept;
  Pagemap& operator=(Pagemap&& other) noexcept;
  ~Pagemap();

  // PAGEMAP_SCAN (6.7): fills `found` with the ranges that match, in address order. `found` may be empty only
  // when query.protect_matching is set. After the process has exited no range is found and it is no error.
  // Errors: EINVAL (alignment, categories), EPERM (see require_wp_async), EINTR, ENOTTY before 6.7.
  // Source: ioctl_pagemap_scan(2).
  Result<ScanResult> scan(const ScanQuery& query, std::span<ScannedRange> found) const;

 private:
  Pagemap(int fd, SystemCalls& system) : fd_(fd), system_(&system) {}
  int fd_;
  SystemCalls* system_;
};

// ---- the descriptor -------------------------------------------------------------------------------------

// What came of reading messages.
struct ReadOutcome {
  std::size_t messages;  // how many were read; 0 if none waits (non-blocking) or on an error
  // 0, also when none waits. ENFILE or EMFILE: a fork message needs a descriptor; it stays queued.
  int os_error = 0;
};

class Uffd {
 public:
  // Creates a userfaultfd by the first way that works and meets the needs, and enables features on it.
  // Tried in this order: device, system call, and if kernel faults are not needed user_mode,
  // device_user_mode. An error names every way that was tried, why each was refused and the remedy for each.
  // Since 4.3 (4.11 for features); kernel source of the rules: userfaultfd(2), "UFFD_USER_MODE_ONLY".
  static Result<Uffd> create(const UffdNeeds& needs, SystemCalls& system = linux_system_calls());

  // Takes over a descriptor whose UFFDIO_API somebody else has done, with the features that it enabled.
  // Nothing is checked. `fd` is owned from here on.
  static Uffd adopt(int fd, Features enabled, SystemCalls& system = linux_system_calls());

  // Takes over a descriptor of unknown origin (from a socket). Checked: that it is a userfaultfd, that it is
  // non-blocking, that UFFDIO_API has been done. The enabled features are read from /proc/self/fdinfo.
  // `fd` is owned from here on and closed on an error.
  static Result<Uffd> receive(int fd, SystemCalls& system = linux_system_calls());

  Uffd(Uffd&& other) noexcept;
  Uffd& operator=(Uffd&& other) noexcept;
  Uffd(const Uffd&) = delete;
  Uffd& operator=(const Uffd&) = delete;
  ~Uffd();

  // Takes over the descriptor of a ForkEvent that was read from this one: a userfaultfd of the child's, with
  // the same features. `fd` is owned from here on.
  Uffd adopt_child(int fd) const { return Uffd(fd, features_, way_, *system_); }

  // Another descriptor of the same userfaultfd, with close-on-exec set.
  Result<Uffd> duplicate() const;

  int fd() const { return fd_; }
  // The features that are enabled on it.
  Features features() const { return features_; }
  // The way by which create() made it; CreateWay::device for one that was adopted or received.
  CreateWay way() const { return way_; }
  // Gives the descriptor up without closing it.
  int release();

  // UFFDIO_REGISTER: faults of these kinds in `range` come to this descriptor. Mappings may end inside the
  // range, holes are skipped; memory that is mapped there later is not registered. Asking again with other
  // modes replaces the modes, but asking for a subset of the present ones changes nothing. Returns what the
  // kernel says it can do there; that is optimistic (it lists MOVE for shared memory). Errors: EINVAL
  // (alignment, no mapping at all, memory of a wrong kind), EBUSY (registered with another one), EPERM (a
  // shared mapping that can never be written), ENOMEM (the process is gone). WP since 5.7, MINOR since 5.13.
  Result<RangeIoctls> register_range(AddressRange range, RegisterModes modes) const;

  // UFFDIO_UNREGISTER, then UFFDIO_WAKE: the kernel itself wakes only threads that wait for missing pages,
  // and would leave those in write-protect and minor faults asleep. Missing pages read as zero (or from the
  // file) after. Errors: EINVAL (alignment, no mapping, another's range since 6.17), ENOMEM (the process is
  // gone).
  Result<void> unregister_range(AddressRange range) const;

  // UFFDIO_WAKE: every thread that waits for a page in `range`, for whatever reason, tries its access again.
  // Harmless anywhere. Errors: EINVAL (alignment, empty range).
  Result<void> wake(AddressRange range) const;

  // UFFDIO_COPY: fills missing pages at `to` with `bytes`, atomically page by page. `bytes` is memory of this
  // process; its size is a multiple of the page size, its address need not be aligned. It must not itself
  // fault on a range that the calling thread serves. Ends at the end of a mapping with not_ready. Overwrites
  // a poison marker. On hugetlbfs with an empty pool the kernel 6.18 answers `present`. Since 4.3;
  // Protect::yes since 5.7.
  Outcome copy(Address to, std::span<const std::byte> bytes, Wake wake = Wake::yes,
               Protect protect = Protect::no) const;

  // UFFDIO_ZEROPAGE: maps zero pages. Not on hugetlbfs (invalid): copy zeros there. Since 4.3.
  Outcome zero(AddressRange range, Wake wake = Wake::yes) const;

  // UFFDIO_CONTINUE: maps the pages that are in the page cache already (shared memory, hugetlbfs). What was
  // written to them before is visible to the woken threads. bad_memory: no page in the cache. Since 5.13.
  Outcome resume(AddressRange range, Wake wake = Wake::yes, Protect protect = Protect::no) const;

  // UFFDIO_POISON: whoever touches these pages gets SIGBUS (system calls EFAULT or EHWPOISON). Since 6.6.
  Outcome poison(AddressRange range, Wake wake = Wake::yes) const;

  // UFFDIO_MOVE: moves pages of anonymous private memory from `from` to missing pages at `to`, without
  // copying. Only inside the process that created the userfaultfd. A page that was shared by fork(2) is
  // `busy` until it is written again. Write protection through userfaultfd is lost by it up to 6.18.
  // Since 6.8.
  Outcome move(Address to, AddressRange from, Wake wake = Wake::yes,
               SourceHoles holes = SourceHoles::refuse) const;

  // UFFDIO_WRITEPROTECT: arms the range, so that the next write to each page is a fault (or, with WP_ASYNC,
  // is recorded). May span mappings. On anonymous memory empty pages are skipped unless WP_UNPOPULATED is
  // enabled. `done` is the whole range or nothing. Since 5.7 (anonymous), 5.19 (shared, hugetlbfs).
  Outcome protect(AddressRange range) const;
  // UFFDIO_WRITEPROTECT without its WP mode: disarms the range and wakes its writers.
  Outcome unprotect(AddressRange range, Wake wake = Wake::yes) const;

  // Whether the process whose memory this serves still has that memory: false after its exit or exec.
  // poll(2) never tells this. Nothing is changed by asking.
  bool target_alive() const { return target() != Target::gone; }
  // The same, and whether events of changes to that memory may be on their way. When it is steady, every
  // event of a change that was begun before has been read.
  Target target() const;

  // Reads as many whole messages as wait and fit, faults before events, each kind in its order; blocks for
  // the first if the descriptor is blocking. A message once read is never sent again, unless its thread
  // faults again.
  ReadOutcome read(std::span<abi::Msg> messages) const;

  // Waits until a message can be read; false at the time limit. `timeout_ms` -1 waits for ever. A message may
  // be gone again when it is read. Not on blocking descriptors: the kernel reports an error for those.
  Result<bool> wait_readable(int timeout_ms) const;

 private:
  Uffd(int fd, Features features, CreateWay way, SystemCalls& system)
      : fd_(fd), features_(features), way_(way), system_(&system) {}

  Outcome fill(unsigned long request, AddressRange range, std::uint64_t mode) const;

  int fd_ = -1;
  Features features_;
  CreateWay way_;
  SystemCalls* system_;
};

// Tries every way on throwaway descriptors, in the order of CreateWay; for diagnosis.
std::vector<CreateAttempt> try_create_ways(SystemCalls& system = linux_system_calls());

// Asks the kernel for its features on a throwaway descriptor: UFFDIO_API succeeds once only on each.
// Errors: those of create() without kernel faults.
Result<KernelFeatures> probe_features(SystemCalls& system = linux_system_calls());

}  // namespace uffdkit
