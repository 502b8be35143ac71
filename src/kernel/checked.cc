#include <fmt/format.h>
#include <uffdkit/checked.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace uffdkit {
namespace {

struct RuleText {
  Rule rule;
  std::string_view name;
  std::string_view problem;  // follows "cannot move: the source 0x1000-0x2000 "
  std::string_view remedy;
};

constexpr RuleText kRules[] = {
    {Rule::kernel_has_it, "kernel-has-it", "needs a call that this kernel does not have",
     "use Linux 6.8 for MOVE, 6.6 for POISON; `uffdkit doctor` shows what there is"},
    {Rule::aligned, "aligned", "does not start and end at pages",
     "align start and length to the page size; on hugetlbfs to that of the huge page"},
    {Rule::not_empty, "not-empty", "is empty", "give at least one page"},
    {Rule::in_reach, "in-reach", "is not in the addresses that userfaultfd serves",
     "stay above vm.mmap_min_addr and below the end of the address space"},
    {Rule::mapped, "mapped", "is not mapped", "map it first, or check the address"},
    {Rule::one_mapping, "one-mapping", "is not within one mapping",
     "make one call for each mapping; /proc/PID/maps shows where they end"},
    {Rule::private_memory, "private-memory", "is shared memory", "map it MAP_PRIVATE, or copy the pages"},
    {Rule::anonymous, "anonymous", "is not anonymous memory", "map it MAP_ANONYMOUS, or copy the pages"},
    {Rule::ordinary, "ordinary", "is device memory or a shadow stack", "copy what is there"},
    {Rule::writable, "writable", "is not writable", "make both mappings PROT_READ|PROT_WRITE by mprotect"},
    {Rule::same_protection, "same-protection", "has another protection than the destination",
     "give both the same protection and key, by mprotect or pkey_mprotect"},
    {Rule::same_locked, "same-locked", "is locked in memory and the destination is not, or the reverse",
     "mlock or munlock both"},
    {Rule::registered, "registered", "is not registered with a userfaultfd", "call register_range first"},
    {Rule::same_process, "same-process", "belongs to another process, which made the userfaultfd",
     "move in the process that made it; from outside, use copy"},
    {Rule::own, "own", "is registered with another userfaultfd",
     "call move on the one it is registered with"},
    {Rule::fillable, "fillable", "is no memory that can be filled",
     "use anonymous memory, shmem or hugetlbfs; files can only be write-protected"},
};

const RuleText& text_of(Rule rule) {
  return *std::ranges::find(kRules, rule, &RuleText::rule);
}

PageSize machine_page() {
  return PageSize::from_bytes(static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE)));
}

// One range of a call, and what is said if it breaks a rule.
struct Subject {
  Operation operation;
  Side side;
  AddressRange range;

  Violation breaks(Rule rule, Address where) const { return {operation, rule, side, range, where}; }
  Violation breaks(Rule rule) const { return breaks(rule, range.start); }

  std::optional<Violation> alignment(PageSize page) const {
    if (!page.is_aligned(range.start.value)) return breaks(Rule::aligned);
    if (!page.is_aligned(range.length.value))
      return breaks(Rule::aligned, Address(page.round_down(range.start.value + range.length.value)));
    return std::nullopt;
  }

  // What holds for every range, whatever is mapped there.
  std::optional<Violation> shape(const MemoryMap& map) const {
    if (range.length.value == 0) return breaks(Rule::not_empty);
    if (range.start < map.lowest) return breaks(Rule::in_reach);
    if (range.length.value - 1 > UINT64_MAX - range.start.value) return breaks(Rule::in_reach);
    return alignment(machine_page());
  }

  // No sum here: the range may end where the addresses do.
  std::optional<Violation> place(const MappedArea* area) const {
    if (area == nullptr) return breaks(Rule::mapped);
    if (range.length > area->range.end() - range.start) return breaks(Rule::one_mapping, area->range.end());
    return std::nullopt;
  }

  std::optional<Violation> movable(const MappedArea& area) const {
    if (area.shared) return breaks(Rule::private_memory);
    if (area.special) return breaks(Rule::ordinary);
    if (area.backing != Backing::anonymous) return breaks(Rule::anonymous);
    if (!area.writable) return breaks(Rule::writable);
    return std::nullopt;
  }
};

bool same_protection(const MappedArea& a, const MappedArea& b) {
  return a.readable == b.readable && a.writable == b.writable && a.executable == b.executable &&
         a.protection_key == b.protection_key && a.tagged == b.tagged;
}

Subject destination_of(Address to, AddressRange from) {
  return {Operation::move, Side::destination, {to, from.length}};
}

CheckedOutcome refused(const Violation& violation) {
  return {.violation = violation, .outcome = {ByteCount(0), Stop::invalid, EINVAL}};
}

CheckedOutcome answered(Outcome outcome) {
  return {.violation = std::nullopt, .outcome = outcome};
}

// An address where nothing is mapped. The lowest: mmap(2) gives those out last, so that no other thread's
// memory is likely to come there meanwhile.
Address unmapped_page(const MemoryMap& map) {
  const PageSize page = machine_page();
  Address free(
      page.round_down(std::max<std::uint64_t>(map.lowest.value, 64u << 10) + page.bytes().value - 1));
  while (const MappedArea* area = map.find(free)) free = area->range.end();
  return free;
}

}  // namespace

std::string_view to_string(Rule rule) {
  return text_of(rule).name;
}

Error Violation::error() const {
  const bool move = operation == Operation::move;
  const char* subject = !move ? "the range" : side == Side::source ? "the source" : "the destination";
  std::string message = fmt::format("cannot {}: {} {:#x} (length {:#x}) {}", move ? "move" : "poison",
                                    subject, range.start.value, range.length.value, text_of(rule).problem);
  if (where != range.start) message += fmt::format(" (from {:#x})", where.value);
  return Error(std::move(message), EINVAL).with_remedy(std::string(text_of(rule).remedy));
}

std::optional<Violation> check_move(const MemoryMap& map, Address to, AddressRange from) {
  const Subject destination = destination_of(to, from);
  const Subject source{Operation::move, Side::source, from};
  const MappedArea* dst = map.find(to);
  const MappedArea* src = map.find(from.start);
  for (const auto& [subject, area] : {std::pair(destination, dst), std::pair(source, src)}) {
    if (const auto broken = subject.shape(map)) return broken;
    if (const auto broken = subject.place(area)) return broken;
    if (const auto broken = subject.movable(*area)) return broken;
  }
  if (!same_protection(*src, *dst)) return source.breaks(Rule::same_protection);
  if (src->locked != dst->locked) return source.breaks(Rule::same_locked);
  if (dst->registered.empty()) return destination.breaks(Rule::registered);
  return std::nullopt;
}

std::optional<Violation> check_poison(const MemoryMap& map, AddressRange range) {
  const Subject subject{Operation::poison, Side::destination, range};
  const MappedArea* area = map.find(range.start);
  if (const auto broken = subject.shape(map)) return broken;
  if (const auto broken = subject.place(area)) return broken;
  if (area->registered.empty()) return subject.breaks(Rule::registered);
  if (area->backing == Backing::other) return subject.breaks(Rule::fillable);
  if (area->backing == Backing::huge_pages) return subject.alignment(area->page_size);
  return std::nullopt;
}

Result<CheckedOutcome> move_checked(const Uffd& uffd, Address to, AddressRange from, Wake wake,
                                    SourceHoles holes, SystemCalls& system) {
  const Subject destination = destination_of(to, from);
  const Result<KernelFeatures> kernel = probe_features(system);
  if (!kernel) return Failure(kernel.error());
  if (!kernel->available.has(Features(abi::kFeatureMove)))
    return refused(destination.breaks(Rule::kernel_has_it));
  const Result<MemoryMap> map = read_memory_map(0, system);
  if (!map) return Failure(map.error());
  // Before anything about the mappings: those of another process are not in this map. The kernel looks for
  // events first (EAGAIN), then for the process (EINVAL), then for mappings (ENOENT).
  const Address nothing = unmapped_page(*map);
  const Outcome here = uffd.move(nothing, {nothing, machine_page().bytes()}, Wake::no);
  if (here.stop == Stop::invalid) return refused(destination.breaks(Rule::same_process));
  if (here.stop != Stop::not_ready) return answered(here);

  if (const auto broken = check_move(*map, to, from)) return refused(*broken);
  // Asking for the modes that it has changes nothing in a range of its own; another's is EBUSY.
  const Result<RangeIoctls> again = uffd.register_range(destination.range, map->find(to)->registered);
  if (!again && again.error().os_error() == EBUSY) return refused(destination.breaks(Rule::own));
  if (!again) return Failure(again.error());
  return answered(uffd.move(to, from, wake, holes));
}

Result<CheckedOutcome> poison_checked(const Uffd& uffd, AddressRange range, Wake wake, int pid,
                                      SystemCalls& system) {
  const Result<KernelFeatures> kernel = probe_features(system);
  if (!kernel) return Failure(kernel.error());
  if (!kernel->available.has(Features(abi::kFeaturePoison)))
    return refused(Subject{Operation::poison, Side::destination, range}.breaks(Rule::kernel_has_it));
  const Result<MemoryMap> map = read_memory_map(pid, system);
  if (!map) return Failure(map.error());
  if (const auto broken = check_poison(*map, range)) return refused(*broken);
  return answered(uffd.poison(range, wake));
}

}  // namespace uffdkit
