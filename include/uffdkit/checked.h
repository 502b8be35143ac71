// Layer: kernel
// MOVE and POISON with their constraints checked before the kernel is asked. The kernel has one EINVAL for
// all of them; here each has a name, a place and a remedy.
//
// The rules are pure functions of a MemoryMap, which is what /proc/PID/smaps said at one moment. Reading it
// costs up to milliseconds: check a pair of ranges once, when the memory is set up, then use the raw
// Uffd::move and Uffd::poison for its pages.
//
// What is checked holds as long as nobody maps, unmaps, protects, locks or registers the ranges; who does so
// between the check and the call can still meet Stop::invalid. What the mappings do not tell stays an outcome
// of the call: pages that are present already (present), holes of the source (not_ready), pages that are
// shared or pinned (busy), poisoned pages of the source and POISON beyond the end of a file (bad_memory).
//
// Sources: ioctl_userfaultfd(2), UFFDIO_MOVE and UFFDIO_POISON; the kernel's mm/userfaultfd.c,
// validate_move_areas() and mfill_atomic(), 6.18; proc_pid_smaps(5). MOVE since 6.8, POISON since 6.6.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/features.h>
#include <uffdkit/system_calls.h>
#include <uffdkit/uffd.h>
#include <uffdkit/units.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace uffdkit {

// ---- what is mapped -------------------------------------------------------------------------------------

// Where the pages of a mapping come from.
enum class Backing : std::uint8_t {
  anonymous,   // also a private mapping of /dev/zero
  shmem,       // memfd, tmpfs, System V, shared anonymous memory
  huge_pages,  // hugetlbfs
  other,       // a file, a device, the kernel's own; or a tmpfs that is not mounted in this mount namespace
};

// One mapping, as the kernel cuts them.
struct MappedArea {
  AddressRange range;
  std::string name;  // as in smaps; empty for most anonymous memory
  Backing backing = Backing::other;
  PageSize page_size = kPage4K;
  bool readable = false;
  bool writable = false;
  bool executable = false;
  bool shared = false;
  bool locked = false;       // mlock(2)
  bool special = false;      // device memory, raw page frames or a shadow stack (smaps: pf, io, mm, ss)
  bool tagged = false;       // arm64: PROT_MTE (mt)
  int protection_key = 0;    // pkey_mprotect(2)
  RegisterModes registered;  // with any userfaultfd; empty for none
};

// The mappings of a process at one moment, by address.
struct MemoryMap {
  std::vector<MappedArea> areas;
  // No userfaultfd call takes addresses below this (vm.mmap_min_addr).
  Address lowest;

  // The mapping that has this address; null for none.
  const MappedArea* find(Address address) const;
};

// The areas that the text of /proc/PID/smaps describes. `mounts` is the text of /proc/PID/mountinfo; without
// it shmem files are known by the names of those that no mount shows. Lines of later kernels are skipped.
// Errors: a line that is no line of smaps, an area without VmFlags, areas out of order; each with its number.
Result<std::vector<MappedArea>> parse_smaps(std::string_view smaps, std::string_view mounts = {});

// The mappings of process `pid`, 0 for this one. Not atomic: what changes meanwhile may be seen half.
// Another process's needs the right to ptrace it. Errors: those of open(2), read(2) and parse_smaps().
Result<MemoryMap> read_memory_map(int pid = 0, SystemCalls& system = linux_system_calls());

// ---- the rules ------------------------------------------------------------------------------------------

// A constraint of MOVE or POISON.
enum class Rule : std::uint8_t {
  kernel_has_it,   // the kernel knows the call
  aligned,         // start and length: to 4 KiB (the page of the machine); POISON on hugetlbfs: the huge page
  not_empty,       // at least a page
  in_reach,        // not below vm.mmap_min_addr, and no wrap at the end of the addresses
  mapped,          // something is mapped at the start of the range
  one_mapping,     // all of the range is in one mapping
  private_memory,  // MOVE: no shared mapping
  anonymous,       // MOVE: no file, no huge pages of hugetlbfs, no device
  ordinary,        // MOVE: no device memory, raw page frames or shadow stack
  writable,        // MOVE: both mappings are writable
  same_protection,  // MOVE: both are readable, writable and executable alike, with the same key and tags
  same_locked,      // MOVE: both are locked by mlock(2), or neither is
  registered,       // MOVE: the destination is registered; POISON: the range is (with any userfaultfd)
  same_process,     // MOVE: the userfaultfd was made by this process
  own,              // MOVE: the destination is registered with this very userfaultfd
  fillable,         // POISON: memory that has missing or minor faults: anonymous, shmem, hugetlbfs
};
// "one-mapping".
std::string_view to_string(Rule rule);

enum class Operation : std::uint8_t { move, poison };
// Which range of the call breaks the rule.
enum class Side : std::uint8_t { destination, source };

// A constraint that a call would break.
struct Violation {
  Operation operation;
  Rule rule;
  Side side;
  AddressRange range;  // as the caller gave it
  Address where;       // the first address of the range for which the rule does not hold

  // What is wrong, where, and what to do.
  Error error() const;
};

// The first rule that UFFDIO_MOVE would break, of those that a map of this process can tell: all but
// kernel_has_it, same_process and own. Overlapping ranges are no violation: the kernel moves page by page
// from the start, so that moving down works like memmove(3), and moving up finds its own pages in the way
// (present), or, over holes that are allowed, moves a page twice.
std::optional<Violation> check_move(const MemoryMap& map, Address to, AddressRange from);

// The first rule that UFFDIO_POISON would break in this memory.
std::optional<Violation> check_poison(const MemoryMap& map, AddressRange range);

// ---- the operations -------------------------------------------------------------------------------------

struct CheckedOutcome {
  std::optional<Violation> violation;  // then nothing was changed, and the kernel was not asked for it
  Outcome outcome;                     // what the kernel answered; {0, invalid, EINVAL} with a violation
};

// Uffd::move, after all of its constraints were checked against the mappings of this process. Two of them
// only the kernel knows, and it is asked by calls that change nothing: whose process this is by a MOVE
// between addresses where nothing is mapped, whose range it is by registering it again as it is. So nobody
// may unregister the destination meanwhile. An event on its way ends the questions with Stop::changing.
// Errors: the mappings or the kernel's features cannot be read.
Result<CheckedOutcome> move_checked(const Uffd& uffd, Address to, AddressRange from, Wake wake = Wake::yes,
                                    SourceHoles holes = SourceHoles::refuse,
                                    SystemCalls& system = linux_system_calls());

// Uffd::poison, after its constraints were checked against the mappings of process `pid`, which must be the
// one that made the userfaultfd; 0 for this one. Errors: as above.
Result<CheckedOutcome> poison_checked(const Uffd& uffd, AddressRange range, Wake wake = Wake::yes,
                                      int pid = 0, SystemCalls& system = linux_system_calls());

}  // namespace uffdkit
