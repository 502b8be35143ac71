// Layer: sim
// userfaultfd without the kernel: a machine whose processes, memory and threads are all simulated.
//
// A sim::Process answers the system calls of uffdkit::SystemCalls with the kernel's own numbers, structures
// and errors, so whatever runs on that seam (Uffd, a fault handler) runs on the model unchanged:
//
//     sim::Kernel kernel({.seed = 7});
//     sim::Process& process = kernel.spawn();
//     auto uffd = Uffd::create({}, process.system_calls());
//     const Address page = process.map({.length = ByteCount(4096)}).value();
//     uffd->register_range({page, ByteCount(4096)}, kMissing);
//     sim::Thread& reader = process.spawn_thread();
//     reader.access({.address = page});
//     kernel.run();                            // the reader now sleeps on the userfaultfd
//
// Time: there is none. A system call through system_calls() is carried out at once. Simulated threads move
// only in step(), run() and inside a read or poll that waits; which of the runnable ones moves next is drawn
// from the seed. The same seed and the same calls give the same run.
//
// Addresses: destinations (COPY's dst, every range) are addresses of the simulated process. COPY's src and
// all arguments and buffers are ordinary memory of the calling program: a simulated manager's buffers are
// real.
//
// Threads: everything of one Kernel is used by one thread of the calling program.
//
// Lifetime: the Kernel owns all processes and threads; references stay valid until it is destroyed. What
// uses system_calls() (a Uffd) must be destroyed before it.
//
// Not modelled: swap, memory pressure, page migration, ptrace. Transparent huge pages and pinned pages are
// there as far as the kernel's own tests of userfaultfd go (tests/selftests). Compared with Linux 6.18 by
// tests/differential; docs/userfaultfd.md explains the mechanism.
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/error.h>
#include <uffdkit/system_calls.h>
#include <uffdkit/units.h>

#include <compare>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace uffdkit::sim {

// ---- the machine ----------------------------------------------------------------------------------------

struct Version {
  int major;
  int minor;
  friend constexpr auto operator<=>(Version, Version) = default;
};

// One entry of a POSIX access control list; `permissions` are the usual bits 4 (read), 2 and 1.
struct AclEntry {
  unsigned id;
  unsigned permissions;
};

// /dev/userfaultfd. With an ACL the group bits of `mode` are its mask, as acl(5) has it.
struct DeviceNode {
  bool exists = true;
  unsigned owner = 0;
  unsigned group = 0;
  unsigned mode = 0600;
  std::vector<AclEntry> acl_users = {};
  std::vector<AclEntry> acl_groups = {};
  // With an ACL, what it gives the owning group (its mode bits are the mask then).
  unsigned acl_owning_group = 0;
};

struct KernelOptions {
  std::uint64_t seed = 1;
  Version version = {6, 18};              // 5.11 or newer
  bool unprivileged_userfaultfd = false;  // vm.unprivileged_userfaultfd
  DeviceNode device = {};                 // since 6.1
  std::size_t huge_pages = 16;            // vm.nr_hugepages, of 2 MiB
  // CONFIG_MEMORY_FAILURE: poisoned pages answer with BUS_MCEERR_AR instead of BUS_ADRERR.
  bool memory_failure = false;
  // Whether a page of private memory that is read before it was written is one shared page of zeros. Some
  // virtual machines' kernels give it a page of its own; ZEROPAGE maps the shared one all the same.
  bool reads_map_zero_page = true;
  // Up to so many turns of runnable threads are taken before each system call of a process, drawn from the
  // seed: that is how a handler's races are explored. 0 leaves every turn to step() and run().
  unsigned turns_before_calls = 0;
  std::size_t descriptors_max = 1024;  // RLIMIT_NOFILE of every process
};

// Who a process is, as far as userfaultfd asks.
struct Credentials {
  unsigned uid = 0;
  std::vector<unsigned> gids = {0};
  bool cap_sys_ptrace = true;
  bool cap_dac_override = true;
  // Capabilities of a process in a child user namespace count for nothing here.
  bool initial_user_namespace = true;
};

// An ordinary user: no capability.
Credentials user(unsigned uid, std::vector<unsigned> gids);

// ---- memory ---------------------------------------------------------------------------------------------

enum class Memory : std::uint8_t {
  anonymous,
  shmem_shared,    // memfd, tmpfs
  shmem_private,   // MAP_PRIVATE of the same
  hugetlb_shared,  // 2 MiB pages
  hugetlb_private,
  file_shared,  // a regular file of a disk filesystem
  file_private,
};
std::string to_string(Memory memory);
PageSize page_size(Memory memory);

// What shared mappings share: a memfd, a hugetlbfs file or a regular file, with its page cache.
class Object {
 public:
  virtual ~Object() = default;
  // pwrite(2): fills the page cache without touching a mapping. Returns bytes, or -ENOSPC.
  virtual std::ptrdiff_t write(std::uint64_t offset, std::span<const std::byte> bytes) = 0;
  // pread(2), without filling holes.
  virtual std::ptrdiff_t read(std::uint64_t offset, std::span<std::byte> bytes) const = 0;
  // Whether the page at `offset` is in the page cache.
  virtual bool cached(std::uint64_t offset) const = 0;
  // fallocate(2) with FALLOC_FL_PUNCH_HOLE. Whole pages only. Nobody is told by an event.
  virtual void punch_hole(std::uint64_t offset, ByteCount length) = 0;
  // ftruncate(2).
  virtual void truncate(ByteCount size) = 0;
};
using ObjectPtr = std::shared_ptr<Object>;

// mmap(2).
struct MapRequest {
  Memory memory = Memory::anonymous;
  ByteCount length;
  // nullptr for anything but anonymous memory: an object of its own.
  ObjectPtr object = nullptr;
  std::uint64_t offset = 0;
  // Where; MAP_FIXED. Without it the model picks a place with a hole on either side.
  std::optional<Address> fixed = std::nullopt;
  bool readable = true;
  bool writable = true;
  // A shared mapping of a descriptor that was opened read-only: it can never be made writable.
  bool read_only_descriptor = false;
};

// ---- what threads do ------------------------------------------------------------------------------------

// One load or store of one byte. In kernel mode: a system call that reads (write = false) or fills
// (write = true) that byte on the thread's behalf, as write(2) and read(2) do.
struct Access {
  Address address;
  bool write = false;
  bool kernel_mode = false;
  std::byte value = {};  // what is written
  // A compare-and-exchange: a write that changes the byte only if it is this one. The completion has the byte
  // that was there.
  std::optional<std::byte> expected = std::nullopt;
  // The page stays pinned for long and for reading, as a device pins it, until Process::unpin(). In kernel
  // mode.
  bool pin = false;
};

enum class Advice : std::uint8_t {
  dont_need,
  free,
  remove,
  dont_fork,
  huge_page,     // a fault may map 2 MiB at once
  no_huge_page,  // takes huge_page back
  page_out,      // there is no swap, so that only pages of a page cache leave, and only the page table
  collapse,      // of present pages one huge page is made. EBUSY: one is not there. Since 6.1
};

struct Remap {
  AddressRange from;
  ByteCount new_length;
  bool may_move = false;
  bool dont_unmap = false;
  std::optional<Address> to = std::nullopt;  // MREMAP_FIXED
};

class Process;

// How an operation of a thread ended.
struct Completion {
  enum class Kind : std::uint8_t {
    value,    // an access, with the byte that was read or written
    result,   // a system call: its result, or -errno
    sigsegv,  // signal with si_code and si_addr
    sigbus,
  };
  Kind kind;
  std::int64_t result = 0;  // of a system call; si_code of a signal
  std::byte value = {};
  Address address = {};      // si_addr
  Process* child = nullptr;  // of fork
  friend bool operator==(const Completion&, const Completion&) = default;
};
std::string to_string(const Completion& completion);

// A simulated thread: it carries out one operation at a time. An operation starts as runnable, and goes on,
// when the kernel gives the thread a turn.
class Thread {
 public:
  enum class State : std::uint8_t {
    idle,         // no operation under way
    runnable,     // waits for a turn
    fault_sleep,  // asleep until its fault is resolved or woken
    event_sleep,  // asleep until its event is read
    dead,
  };

  virtual ~Thread() = default;
  virtual int tid() const = 0;
  virtual State state() const = 0;
  // How the last operation ended; nothing while one is under way and before the first.
  virtual std::optional<Completion> last() const = 0;

  // Each starts an operation; the thread must be idle.
  virtual void access(Access access) = 0;
  virtual void map(MapRequest request) = 0;                    // mmap(2); result: the address
  virtual void unmap(AddressRange range) = 0;                  // munmap(2)
  virtual void advise(AddressRange range, Advice advice) = 0;  // madvise(2)
  virtual void remap(Remap remap) = 0;                         // mremap(2); result: the address
  virtual void protect(AddressRange range, bool readable, bool writable) = 0;  // mprotect(2)
  virtual void fork() = 0;  // fork(2); Completion::child is the child, with one thread

  // A signal with a handler arrives (not a fatal one).
  virtual void signal() = 0;
};
std::string to_string(Thread::State state);

// ---- processes ------------------------------------------------------------------------------------------

class Process {
 public:
  virtual ~Process() = default;
  virtual int pid() const = 0;
  virtual bool alive() const = 0;

  // The seam: its system calls, made by a thread of its own that never sleeps in a fault. A read or poll that
  // waits lets simulated threads run; when none can, a wait without limit returns -EDEADLK and a limited one
  // behaves as if its time had passed.
  virtual SystemCalls& system_calls() = 0;

  virtual Thread& spawn_thread() = 0;
  virtual std::vector<Thread*> threads() = 0;

  // mmap(2) at once. Errors: EINVAL, ENOMEM (no huge pages left), EEXIST for a fixed place that is taken (use
  // Thread::map to replace a mapping).
  virtual Result<Address> map(const MapRequest& request) = 0;
  // The bytes that a debugger would see, without any fault: what is not present reads as nullopt.
  virtual std::optional<std::byte> peek(Address address) const = 0;
  // The same of a run of bytes: how many are there before the first that is not present.
  virtual std::size_t peek(Address address, std::span<std::byte> to) const = 0;
  // Writes what one store after the other would, as long as none of them faults. Returns how many did not.
  virtual std::size_t poke(Address address, std::span<const std::byte> bytes) = 0;
  // Whether the page at `address` is present, and whether its uffd-wp bit (or marker) is set: what
  // /proc/PID/pagemap shows.
  virtual bool present(Address address) const = 0;
  virtual bool write_protected(Address address) const = 0;
  // Gives up all pins of its threads (Access::pin).
  virtual void unpin() = 0;

  // How many descriptors it has open; 0 when it is gone.
  virtual std::size_t open_descriptors() const = 0;
  // SCM_RIGHTS: a descriptor of `to` for what `fd` is here. Returns it, or -EBADF, -EMFILE.
  virtual int pass_descriptor(int fd, Process& to) = 0;
  // A new process that shares this one's descriptor table but has no memory: clone(2) with CLONE_FILES.
  virtual Process& clone_with_files() = 0;

  // SIGKILL or exit(2): its threads are gone at once, its memory and descriptors too.
  virtual void kill() = 0;
  // execve(2): all its threads are gone and its memory is new; descriptors with close-on-exec are closed.
  virtual void exec() = 0;
};

class Kernel {
 public:
  explicit Kernel(KernelOptions options = {});
  ~Kernel();
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  Process& spawn(Credentials credentials = {});
  ObjectPtr make_shmem(ByteCount size);
  // Errors: ENOMEM when the pool has too few pages: a hugetlbfs mapping reserves them when it is made.
  ObjectPtr make_hugetlb(ByteCount size);
  // A regular file of zeros.
  ObjectPtr make_file(ByteCount size);

  // Gives one runnable thread a turn; false if none is runnable.
  bool step();
  // Steps until no thread is runnable, at most `turns_max` times. Returns whether none is.
  bool run(std::size_t turns_max = 100'000);

  // What must hold between any two steps and does not; empty if all is well. Checked: a thread sleeps in a
  // fault exactly if a userfaultfd that can still be served has it in a queue, and in an event exactly if
  // that event can still be read; registered areas belong to open userfaultfds of their own process; areas
  // are disjoint; every page belongs to an area.
  std::vector<std::string> violations() const;

  // Pages of the pool that are neither used nor promised to a mapping.
  std::size_t spare_huge_pages() const;

  // For settings that change while the machine runs.
  KernelOptions& options();

  struct State;

 private:
  std::unique_ptr<State> state_;
};

}  // namespace uffdkit::sim
