#include "image/process_memory.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <uffdkit/abi.h>
#include <uffdkit/checked.h>
#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <filesystem>
#include <system_error>
#include <thread>
#include <utility>

#include "image/piece_file.h"

namespace uffdkit::image {
namespace {

constexpr std::chrono::seconds kStopTime{10};
// Untouched anonymous memory reads as zero. So many pages of it do not cut a region in two.
constexpr std::uint64_t kGapPagesMax = 64;

// Whether pages of the process's own can lie there.
bool may_be_private(const MappedArea& area) {
  if (area.shared || area.special) return false;
  // The kernel's own pages, such as [vvar]. Files have no brackets around them.
  return area.backing != Backing::other || !area.name.starts_with('[');
}

class Scanner {
 public:
  Scanner(const Pagemap& pagemap, int memory) : pagemap_(pagemap), memory_(memory) {}

  Result<void> scan(const MappedArea& area) {
    Address at = area.range.start;
    while (at < area.range.end()) {
      const ScanQuery query{.range = {at, area.range.end() - at},
                            .mask = abi::kPageFile,
                            .inverted = abi::kPageFile,
                            .any_of = abi::kPagePresent | abi::kPageSwapped,
                            .report = abi::kPageSwapped};
      std::array<ScannedRange, 512> found;
      const Result<ScanResult> scanned = pagemap_.scan(query, found);
      if (!scanned)
        return Failure(
            Error(scanned.error()).with_remedy("this needs Linux 6.7 or later, and the right to ptrace"));
      for (std::size_t i = 0; i < scanned->ranges; ++i)
        if (auto added = add_found(area, found[i]); !added) return added;
      at = scanned->walk_end;
    }
    return {};
  }

  std::vector<Region> take() { return std::move(regions_); }

 private:
  Result<void> add_found(const MappedArea& area, const ScannedRange& found) {
    if ((found.categories & abi::kPageSwapped) == 0) return add(area, found.range);
    // A marked page would be a fault of the userfaultfd, which nobody answers while the process stands still.
    if (!area.registered.empty())
      return Failure(
          Error(fmt::format("the process has pages at {:#x} that a userfaultfd serves and that are not in "
                            "memory: whether they are swapped out cannot be told",
                            found.range.start.value),
                EBUSY)
              .with_remedy("turn swap off, or unregister the memory first"));
    // What is not in memory may be marked as unreadable, which only reading shows.
    for (Address page = found.range.start; page < found.range.end(); page = page + ByteCount(kPageBytes)) {
      std::byte byte{};
      if (::pread(memory_, &byte, 1, static_cast<off_t>(page.value)) != 1) {
        unreadable_ = true;
        continue;
      }
      if (auto added = add(area, {page, ByteCount(kPageBytes)}); !added) return added;
    }
    return {};
  }

  Result<void> add(const MappedArea& area, AddressRange range) {
    const std::uint64_t pages = range.length.value / kPageBytes;
    if (!regions_.empty()) {
      Region& last = regions_.back();
      const std::uint64_t end = last.address + last.pages * kPageBytes;
      const std::uint64_t gap = (range.start.value - end) / kPageBytes;
      const bool gaps_are_zero =
          area.backing == Backing::anonymous && area.registered.empty() && !unreadable_;
      if (last.address >= area.range.start.value && gap <= (gaps_are_zero ? kGapPagesMax : 0)) {
        last.pages += gap + pages;
        return {};
      }
    }
    unreadable_ = false;
    if (regions_.size() == kRegionsMax)
      return Failure(
          Error(fmt::format("the process's memory lies in more than {} parts", kRegionsMax), EFBIG));
    regions_.push_back(
        {.address = range.start.value,
         .pages = pages,
         .protection = (area.readable ? 1u : 0u) | (area.writable ? 2u : 0u) | (area.executable ? 4u : 0u),
         .name = area.name.substr(0, kRegionNameMax)});
    return {};
  }

  const Pagemap& pagemap_;
  const int memory_;
  std::vector<Region> regions_;
  bool unreadable_ = false;  // a page behind the last region
};

}  // namespace

Result<StoppedProcess> StoppedProcess::stop(pid_t pid) {
  if (pid == ::getpid()) return Failure(Error("a process cannot stop itself to be read", EINVAL));
  StoppedProcess process(pid);
  // Threads may start others until all are held.
  for (bool more = true; more;) {
    Result<bool> held = process.hold_new_threads();
    if (!held) return Failure(std::move(held).error());
    more = *held;
  }
  if (process.held_.empty()) return Failure(Error(fmt::format("process {} has ended", pid), ESRCH));
  return process;
}

StoppedProcess::StoppedProcess(StoppedProcess&& other) noexcept
    : pid_(other.pid_), held_(std::exchange(other.held_, {})) {}

StoppedProcess::~StoppedProcess() {
  for (const auto& [thread, signal] : held_) ::ptrace(PTRACE_DETACH, thread, nullptr, signal);
}

Result<bool> StoppedProcess::hold_new_threads() {
  std::error_code error;
  bool any = false;
  const std::filesystem::directory_iterator threads(fmt::format("/proc/{}/task", pid_), error);
  if (error)
    return Failure(Error::from_errno(fmt::format("find the threads of process {}", pid_), error.value())
                       .with_remedy("give the number of a process that runs"));
  for (const auto& entry : threads) {
    const std::string name = entry.path().filename().string();
    pid_t thread = 0;
    std::from_chars(name.data(), name.data() + name.size(), thread);
    if (held_.contains(thread)) continue;
    if (auto held = hold(thread); !held) return Failure(std::move(held).error());
    any = any || held_.contains(thread);
  }
  return any;
}

Result<void> StoppedProcess::hold(pid_t thread) {
  if (::ptrace(PTRACE_SEIZE, thread, nullptr, nullptr) != 0) {
    if (errno == ESRCH) return {};  // it has ended
    return Failure(Error::from_errno(fmt::format("trace thread {} of process {}", thread, pid_), errno)
                       .with_remedy("only one program can trace a process, one of the same user or with "
                                    "CAP_SYS_PTRACE; see also /proc/sys/kernel/yama/ptrace_scope"));
  }
  // From here on it is to be let go, whatever happens.
  int& signal = held_[thread] = 0;
  if (::ptrace(PTRACE_INTERRUPT, thread, nullptr, nullptr) != 0) {
    held_.erase(thread);
    return {};
  }
  const auto deadline = std::chrono::steady_clock::now() + kStopTime;
  for (;;) {
    int status = 0;
    const pid_t stopped = ::waitpid(thread, &status, __WALL | WNOHANG);
    if (stopped < 0 && errno == EINTR) continue;
    if (stopped < 0 || (stopped == thread && !WIFSTOPPED(status))) {
      held_.erase(thread);  // it has ended
      return {};
    }
    if (stopped == thread) {
      // Either our stop, or one to hand it a signal, which it gets when it is let go.
      if (status >> 16 == 0) signal = WSTOPSIG(status);
      return {};
    }
    if (std::chrono::steady_clock::now() > deadline)
      return Failure(Error(fmt::format("thread {} of process {} does not stop", thread, pid_), EBUSY)
                         .with_remedy("it sleeps in the kernel and cannot be woken: see /proc/PID/stack"));
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

Result<ProcessMemory> private_memory_of(const StoppedProcess& process) {
  const std::string path = fmt::format("/proc/{}/mem", process.pid());
  UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return Failure(Error::from_open(path, errno));
  Result<MemoryMap> map = read_memory_map(process.pid());
  if (!map) return Failure(std::move(map).error());
  Result<Pagemap> pagemap = Pagemap::open(process.pid());
  if (!pagemap) return Failure(std::move(pagemap).error());
  Scanner scanner(*pagemap, file.get());
  for (const MappedArea& area : map->areas)
    if (may_be_private(area))
      if (auto scanned = scanner.scan(area); !scanned) return Failure(std::move(scanned).error());

  ProcessMemory memory{.store = nullptr, .regions = scanner.take()};
  std::vector<FilePiece> pieces;
  for (const Region& region : memory.regions) {
    const std::uint64_t bytes = region.pages * kPageBytes;
    pieces.push_back({.position = region.address, .bytes = bytes, .stored = bytes});
  }
  if (pieces.empty())
    return Failure(Error(fmt::format("process {} has no memory of its own", process.pid()), EINVAL));
  memory.store = make_piece_store(std::move(file), path, std::move(pieces));
  return memory;
}

}  // namespace uffdkit::image
