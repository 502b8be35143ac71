// The programs on the running kernel.
//
// The target is a process of its own that shares this one's descriptor table (clone with CLONE_FILES), so
// that a descriptor means the same on both sides and the target can be killed. Its threads take their orders
// from slots in shared memory. Who sleeps is read from /proc: a thread in handle_userfault or in
// userfaultfd_event_wait_completion stays there until somebody acts, anything else is on its way.
#include <fcntl.h>
#include <fmt/format.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>
#include <string_view>
#include <thread>

#include "base/check.h"
#include "compare/driver.h"

namespace uffdkit::differential {
namespace {

constexpr int kAgent = kSlots;
constexpr std::size_t kDumpBytes = sizeof(kDumpOffsets) / sizeof(kDumpOffsets[0]);
constexpr std::size_t kDumpPagesMax = kAreas * kAreaStride + kHugeAreas * kHugeAreaStride;

// What the agent does beside the operations of threads.
enum class Errand : std::uint8_t { operation, create, ioctl, dump };

// One thread's orders and answers.
struct Slot {
  std::atomic<std::uint32_t> ordered;
  std::atomic<std::uint32_t> done;
  std::atomic<pid_t> pid;  // 0: nobody is here
  std::atomic<pid_t> tid;
  int pipe[2];

  Errand errand;
  Operation operation;
  int file;        // of map
  int new_thread;  // of fork
  int fd;          // of an ioctl
  unsigned long request;

  sim::Completion::Kind kind;
  std::int64_t result;
  std::uint8_t byte;
  std::uint64_t address;
  bool has_result;
};

struct SharedBlock {
  std::array<Slot, kSlots + 1> slots;
  std::array<int, 16> uffds_ever;
  std::atomic<int> uffds_count;
  std::array<std::array<std::int16_t, kDumpBytes>, kDumpPagesMax> dumped;
  pid_t manager;
  bool huge;
  std::array<std::byte, 96> args;
};

long futex(std::atomic<std::uint32_t>* word, int operation, std::uint32_t value,
           const timespec* limit = nullptr) {
  return syscall(SYS_futex, word, operation, value, limit, nullptr, 0);
}

// ---- inside the target ----------------------------------------------------------------------------------

thread_local sigjmp_buf access_jump;
thread_local siginfo_t access_signal;

void on_access_signal(int /*number*/, siginfo_t* info, void* /*context*/) {
  access_signal = *info;
  siglongjmp(access_jump, 1);
}

void on_plain_signal(int /*number*/) {}

void report_access(Slot& slot) {
  const Operation& o = slot.operation;
  auto* byte = reinterpret_cast<volatile std::uint8_t*>(o.start);
  const auto index = reinterpret_cast<std::uintptr_t>(byte);
  if (sigsetjmp(access_jump, 1) != 0) {
    slot.kind =
        access_signal.si_signo == SIGBUS ? sim::Completion::Kind::sigbus : sim::Completion::Kind::sigsegv;
    slot.result = access_signal.si_code;
    slot.address = reinterpret_cast<std::uintptr_t>(access_signal.si_addr);
    return;
  }
  slot.kind = sim::Completion::Kind::value;
  slot.byte = o.value;
  if (!o.kernel_mode) {
    if (o.write)
      *byte = o.value;
    else
      slot.byte = *byte;
    return;
  }
  // The kernel copies the byte: out of the page into a pipe, or from the pipe into the page.
  std::uint8_t passed = o.value;
  if (o.write) CHECK(write(slot.pipe[1], &passed, 1) == 1);
  const ssize_t moved = o.write ? read(slot.pipe[0], reinterpret_cast<void*>(index), 1)
                                : write(slot.pipe[1], reinterpret_cast<void*>(index), 1);
  const int error = errno;
  if (moved == 1 && o.write) return;
  if (moved == 1 || o.write) CHECK(read(slot.pipe[0], &passed, 1) == 1);
  if (moved == 1) {
    slot.byte = passed;
    return;
  }
  slot.kind = sim::Completion::Kind::result;
  slot.result = -error;
}

void report_result(Slot& slot, long result) {
  slot.kind = sim::Completion::Kind::result;
  slot.result = result < 0 ? -errno : result;
}

void* pointer(std::uint64_t address) {
  return reinterpret_cast<void*>(address);
}

long call_mmap(const Slot& slot) {
  const Operation& o = slot.operation;
  const bool anonymous = o.memory == sim::Memory::anonymous;
  const bool shared = o.memory == sim::Memory::shmem_shared || o.memory == sim::Memory::hugetlb_shared;
  const int flags = (shared ? MAP_SHARED : MAP_PRIVATE) | (anonymous ? MAP_ANONYMOUS : 0) | MAP_FIXED;
  void* at = mmap(pointer(o.start), o.length, PROT_READ | (o.writable ? PROT_WRITE : 0), flags,
                  anonymous ? -1 : slot.file, 0);
  return at == MAP_FAILED ? -1 : static_cast<long>(reinterpret_cast<std::uintptr_t>(at));
}

long call_mremap(const Operation& o) {
  const int flags = (o.may_move ? MREMAP_MAYMOVE : 0) | (o.fixed ? MREMAP_FIXED : 0) |
                    (o.dont_unmap ? MREMAP_DONTUNMAP : 0);
  void* at = mremap(pointer(o.start), o.length, o.new_length, flags, pointer(o.other));
  return at == MAP_FAILED ? -1 : static_cast<long>(reinterpret_cast<std::uintptr_t>(at));
}

[[noreturn]] void obey(SharedBlock& block, int index);

void call_fork(SharedBlock& block, Slot& slot) {
  const long child = syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr);
  if (child == 0) {
    // The child keeps no userfaultfd open: it would keep its own threads waiting if everybody else died.
    for (int i = 0; i < block.uffds_count.load(); ++i) close(block.uffds_ever[static_cast<std::size_t>(i)]);
    obey(block, slot.new_thread);
  }
  report_result(slot, child < 0 ? -1 : 0);
  // The child is there when it has taken its slot.
  while (child > 0 && block.slots[static_cast<std::size_t>(slot.new_thread)].pid.load() == 0) sched_yield();
}

// The byte there, or -1.
[[gnu::noinline]] std::int16_t look_at(std::uint64_t address) {
  if (sigsetjmp(access_jump, 1) != 0) return -1;
  return *reinterpret_cast<volatile std::uint8_t*>(address);
}

void dump_memory(SharedBlock& block) {
  std::size_t line = 0;
  const auto add = [&](std::uint64_t first, std::uint64_t pages, std::uint64_t size) {
    for (std::uint64_t i = 0; i < pages; ++i, ++line) {
      for (std::size_t k = 0; k < kDumpBytes; ++k)
        block.dumped[line][k] = look_at(first + i * size + kDumpOffsets[k]);
    }
  };
  add(kArena, kAreas * kAreaStride, 4096);
  if (block.huge) add(kHugeArena, kHugeAreas * kHugeAreaStride, 2u << 20);
}

void carry_out(SharedBlock& block, Slot& slot) {
  const Operation& o = slot.operation;
  switch (slot.errand) {
    case Errand::create:
      return report_result(slot, syscall(SYS_userfaultfd, static_cast<int>(o.other)));
    case Errand::ioctl:
      return report_result(slot, ioctl(slot.fd, slot.request, block.args.data()));
    case Errand::dump:
      return dump_memory(block);
    case Errand::operation:
      break;
  }
  switch (o.verb) {
    case Verb::access:
      return report_access(slot);
    case Verb::map:
      return report_result(slot, call_mmap(slot));
    case Verb::advise: {
      constexpr std::array kAdvice = {MADV_DONTNEED, MADV_FREE, MADV_REMOVE};
      return report_result(slot, madvise(pointer(o.start), o.length, kAdvice[o.mode]));
    }
    case Verb::unmap:
      return report_result(slot, munmap(pointer(o.start), o.length));
    case Verb::protect:
      return report_result(slot, mprotect(pointer(o.start), o.length,
                                          (o.readable ? PROT_READ : 0) | (o.writable ? PROT_WRITE : 0)));
    case Verb::remap:
      return report_result(slot, call_mremap(o));
    case Verb::fork:
      return call_fork(block, slot);
    default:
      CHECK(false);
  }
}

void obey(SharedBlock& block, int index) {
  Slot& slot = block.slots[static_cast<std::size_t>(index)];
  slot.tid = static_cast<pid_t>(syscall(SYS_gettid));
  slot.pid = static_cast<pid_t>(syscall(SYS_getpid));
  std::uint32_t seen = slot.done.load();
  for (;;) {
    while (slot.ordered.load() == seen) {
      const timespec second{.tv_sec = 1, .tv_nsec = 0};
      futex(&slot.ordered, FUTEX_WAIT, seen, &second);
      if (kill(block.manager, 0) < 0 && errno == ESRCH) _exit(0);
    }
    ++seen;
    carry_out(block, slot);
    slot.done.store(seen);
  }
}

void install_handlers() {
  struct sigaction action{};
  action.sa_sigaction = on_access_signal;
  action.sa_flags = SA_SIGINFO;
  CHECK(sigaction(SIGSEGV, &action, nullptr) == 0 && sigaction(SIGBUS, &action, nullptr) == 0);
  struct sigaction plain{};
  plain.sa_handler = on_plain_signal;
  CHECK(sigaction(SIGUSR1, &plain, nullptr) == 0);
}

[[noreturn]] void run_target(SharedBlock& block) {
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  install_handlers();
  for (const std::uint64_t anchor : {kAnchor, kHugeAnchor}) {
    CHECK(mmap(pointer(anchor), 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1,
               0) != MAP_FAILED);
    *static_cast<volatile char*>(pointer(anchor)) = 1;
  }
  std::array<std::thread, kThreads> threads;
  for (int i = 0; i < kThreads; ++i)
    threads[static_cast<std::size_t>(i)] = std::thread([&block, i] { obey(block, i); });
  obey(block, kAgent);
}

// ---- the manager's side ---------------------------------------------------------------------------------

std::string read_text(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return {};
  std::array<char, 512> text;
  const ssize_t bytes = read(fd, text.data(), text.size());
  close(fd);
  return {text.data(), static_cast<std::size_t>(std::max<ssize_t>(bytes, 0))};
}

void* map_shared(std::size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  return memory;
}

class Real final : public Driver {
 public:
  explicit Real(bool huge) : huge_(huge), source_bytes_(huge ? 4u << 20 : 20 * 4096) {
    prctl(PR_SET_CHILD_SUBREAPER, 1);
    block_ = new (map_shared(sizeof(SharedBlock))) SharedBlock{};
    block_->manager = getpid();
    block_->huge = huge;
    source_ = static_cast<std::byte*>(map_shared(source_bytes_ + 4096));
    CHECK(mprotect(source_ + source_bytes_, 4096, PROT_NONE) == 0);
    for (int place = 0; place < kAreas; ++place) add_file(0, kAreaPages * 4096);
    for (int place = 0; huge && place < kHugeAreas; ++place)
      add_file(MFD_HUGETLB, kHugeAreaPages * (2u << 20));
    for (Slot& slot : block_->slots) CHECK(pipe2(slot.pipe, O_CLOEXEC) == 0);

    target_ =
        static_cast<pid_t>(syscall(SYS_clone, CLONE_FILES | SIGCHLD, nullptr, nullptr, nullptr, nullptr));
    CHECK(target_ >= 0);
    if (target_ == 0) run_target(*block_);
    for (int i = 0; i <= kSlots; ++i)
      if (i < kThreads || i == kAgent)
        while (slot(i).pid.load() == 0) sched_yield();
  }

  ~Real() override {
    kill_target();
    for (int i = kThreads; i < kSlots; ++i)
      if (const pid_t pid = slot(i).pid.load(); pid != 0) ::kill(pid, SIGKILL);
    while (waitpid(-1, nullptr, 0) > 0) {
    }
    for (const int fd : uffds())
      if (fd >= 0) ::close(fd);
    for (const int fd : files_) ::close(fd);
    for (Slot& each : block_->slots) {
      ::close(each.pipe[0]);
      ::close(each.pipe[1]);
    }
    munmap(block_, sizeof(SharedBlock));
    munmap(source_, source_bytes_ + 4096);
  }

  bool order_is_open(int /*uffd*/) override { return false; }

 private:
  Slot& slot(int index) { return block_->slots[static_cast<std::size_t>(index)]; }

  void add_file(unsigned flags, std::uint64_t bytes) {
    const int fd = memfd_create("differential", MFD_CLOEXEC | flags);
    CHECK(fd >= 0 && ftruncate(fd, static_cast<off_t>(bytes)) == 0);
    files_.push_back(fd);
  }

  Buffers& buffers() override { return buffers_; }
  std::span<std::byte> source() override { return {source_, source_bytes_}; }

  // ---- orders
  void order(int index, Errand errand) {
    Slot& each = slot(index);
    each.errand = errand;
    each.has_result = true;
    each.ordered.fetch_add(1);
    futex(&each.ordered, FUTEX_WAKE, 1);
  }
  bool busy(int index) { return slot(index).ordered.load() != slot(index).done.load(); }
  void order_agent(Errand errand) {
    order(kAgent, errand);
    while (busy(kAgent)) sched_yield();
  }

  int create(int flags) override {
    slot(kAgent).operation.other = static_cast<std::uint64_t>(flags);
    order_agent(Errand::create);
    const int fd = static_cast<int>(slot(kAgent).result);
    remember(fd);
    return fd;
  }
  void remember(int fd) {
    const int count = block_->uffds_count.load();
    if (fd < 0 || static_cast<std::size_t>(count) == block_->uffds_ever.size()) return;
    block_->uffds_ever[static_cast<std::size_t>(count)] = fd;
    block_->uffds_count.store(count + 1);
  }
  int ioctl(bool by_target, int fd, unsigned long request, void* args) override {
    if (!by_target) return linux_system_calls().ioctl(fd, request, reinterpret_cast<std::uintptr_t>(args));
    std::memcpy(block_->args.data(), args, block_->args.size());
    slot(kAgent).fd = fd;
    slot(kAgent).request = request;
    order_agent(Errand::ioctl);
    std::memcpy(args, block_->args.data(), block_->args.size());
    return static_cast<int>(slot(kAgent).result);
  }
  std::ptrdiff_t read(int fd, std::span<abi::Msg> messages) override {
    const std::ptrdiff_t bytes = linux_system_calls().read(fd, messages.data(), messages.size_bytes());
    for (std::size_t i = 0; bytes > 0 && i < static_cast<std::size_t>(bytes) / sizeof(abi::Msg); ++i)
      if (messages[i].event == abi::kEventFork) remember(static_cast<int>(messages[i].arg.fork.ufd));
    return bytes;
  }
  int poll(int fd) override { return linux_system_calls().poll_readable(fd, 0); }
  void close(int fd) override { ::close(fd); }
  int open_pagemap() override {
    const int fd = ::open(fmt::format("/proc/{}/pagemap", target_).c_str(), O_RDONLY | O_CLOEXEC);
    CHECK(fd >= 0);
    return fd;
  }
  std::string waiting(int fd) override {
    const std::string text = read_text(fmt::format("/proc/self/fdinfo/{}", fd));
    int pending = -1;
    int total = -1;
    CHECK(std::sscanf(std::strstr(text.c_str(), "pending:"), "pending: %d total: %d", &pending, &total) == 2);
    return fmt::format("{} of {} unread", pending, total);
  }

  void start(int thread, const Operation& operation, int new_thread) override {
    Slot& each = slot(thread);
    each.operation = operation;
    if (operation.verb == Verb::access) each.operation.start += offset_of_thread(thread);
    each.new_thread = new_thread;
    each.file = operation.verb == Verb::map ? files_.at(static_cast<std::size_t>(operation.place)) : -1;
    order(thread, Errand::operation);
  }
  void send_signal(int thread) override {
    CHECK(syscall(SYS_tgkill, slot(thread).pid.load(), slot(thread).tid.load(), SIGUSR1) == 0);
  }

  // The kernel function that a thread sleeps in; "0" if it runs.
  std::string place_of(int index) {
    return read_text(fmt::format("/proc/{}/task/{}/wchan", slot(index).pid.load(), slot(index).tid.load()));
  }
  ThreadReport::State sleep_of(int index) {
    const std::string where = place_of(index);
    if (where == "handle_userfault") return ThreadReport::State::fault_sleep;
    if (where == "userfaultfd_event_wait_completion") return ThreadReport::State::event_sleep;
    return ThreadReport::State::none;
  }
  bool gone(int index) { return target_dead_ && index < kThreads; }

  void settle() override {
    using Clock = std::chrono::steady_clock;
    const auto limit = Clock::now() + std::chrono::seconds(5);
    for (int i = 0; i < kSlots; ++i) {
      asleep_[static_cast<std::size_t>(i)] = ThreadReport::State::none;
      if (slot(i).pid.load() == 0 || gone(i)) continue;
      while (busy(i)) {
        const ThreadReport::State state = sleep_of(i);
        asleep_[static_cast<std::size_t>(i)] = state;
        if (state != ThreadReport::State::none) break;
        if (Clock::now() > limit)
          throw std::runtime_error(fmt::format("thread {} does not settle: it is in {}", i, place_of(i)));
        sched_yield();
      }
    }
  }

  ThreadReport report(int index) override {
    Slot& each = slot(index);
    if (each.pid.load() == 0) return {};
    if (gone(index)) return {.state = ThreadReport::State::dead, .ended = {}};
    if (busy(index)) return {.state = asleep_[static_cast<std::size_t>(index)], .ended = {}};
    ThreadReport report{.state = ThreadReport::State::idle, .ended = {}};
    if (!each.has_result) return report;
    if (each.operation.verb == Verb::fork && each.result == 0) {
      report.ended = "a child";
      return report;
    }
    sim::Completion completion{.kind = each.kind};
    switch (each.kind) {
      case sim::Completion::Kind::value:
        completion.value = std::byte{each.byte};
        break;
      case sim::Completion::Kind::sigbus:
      case sim::Completion::Kind::sigsegv:
        completion.address = Address(each.address);
        completion.result = each.result;
        break;
      case sim::Completion::Kind::result:
        completion.result = each.result;
    }
    report.ended = sim::to_string(completion);
    return report;
  }

  int thread_of_tid(std::uint32_t tid) override {
    for (int i = 0; i < kSlots; ++i)
      if (tid != 0 && static_cast<std::uint32_t>(slot(i).tid.load()) == tid) return i;
    return -1;
  }

  void file_write(int place, std::uint64_t index, std::uint8_t value) override {
    if (place < kAreas) {
      CHECK(pwrite(files_[static_cast<std::size_t>(place)], &value, 1, static_cast<off_t>(index * 4096)) ==
            1);
      return;
    }
    // hugetlbfs has no write(2).
    const std::size_t page = 2u << 20;
    void* memory = mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_SHARED,
                        files_[static_cast<std::size_t>(place)], static_cast<off_t>(index * page));
    CHECK(memory != MAP_FAILED);
    *static_cast<volatile std::uint8_t*>(memory) = value;
    munmap(memory, page);
  }
  void punch(int place, std::uint64_t index) override {
    const std::uint64_t page = place < kAreas ? 4096 : 2u << 20;
    CHECK(fallocate(files_[static_cast<std::size_t>(place)], FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                    static_cast<off_t>(index * page), static_cast<off_t>(page)) == 0);
  }
  void truncate(int place, std::uint64_t pages) override {
    CHECK(ftruncate(files_[static_cast<std::size_t>(place)], static_cast<off_t>(pages * 4096)) == 0);
  }

  void kill_target() override {
    if (target_dead_) return;
    target_dead_ = true;
    ::kill(target_, SIGKILL);
    CHECK(waitpid(target_, nullptr, 0) == target_);
  }
  bool target_alive() override { return !target_dead_; }

  std::string pagemap() override {
    const int fd = open_pagemap();
    std::string text;
    const auto add = [&](std::uint64_t first, std::uint64_t pages, std::uint64_t size) {
      for (std::uint64_t i = 0; i < pages; ++i) {
        std::uint64_t entry = 0;
        CHECK(pread(fd, &entry, sizeof(entry), static_cast<off_t>((first + i * size) / 4096 * 8)) == 8);
        const bool present = (entry >> 63 & 1) != 0;
        const bool armed = (entry >> 57 & 1) != 0;
        text += present ? (armed ? 'A' : 'P') : (armed ? 'a' : '.');
      }
    };
    add(kArena, kAreas * kAreaStride, 4096);
    if (huge_) add(kHugeArena, kHugeAreas * kHugeAreaStride, 2u << 20);
    ::close(fd);
    return text;
  }

  std::string dump() override {
    order(kAgent, Errand::dump);
    while (busy(kAgent)) {
      if (sleep_of(kAgent) == ThreadReport::State::fault_sleep) return "asleep";
      sched_yield();
    }
    std::string text;
    const std::size_t lines = kAreas * kAreaStride + (huge_ ? kHugeAreas * kHugeAreaStride : 0);
    for (std::size_t line = 0; line < lines; ++line) {
      for (const std::int16_t seen : block_->dumped[line])
        text += seen < 0 ? "--" : fmt::format("{:02x}", seen);
      text += ' ';
    }
    return text;
  }

  bool huge_;
  SharedBlock* block_;
  std::byte* source_;
  std::size_t source_bytes_;
  std::vector<int> files_;
  pid_t target_ = -1;
  bool target_dead_ = false;
  std::array<ThreadReport::State, kSlots> asleep_ = {};
  Buffers buffers_;
};

}  // namespace

std::unique_ptr<Machine> make_real(bool huge) {
  return std::make_unique<Real>(huge);
}

bool reads_map_zero_page() {
  constexpr std::size_t kBytes = 4096;
  void* memory = mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  CHECK(memory != MAP_FAILED);
  *static_cast<const volatile std::byte*>(memory);
  const Result<Pagemap> pagemap = Pagemap::open(0);
  CHECK(pagemap.has_value());
  const AddressRange page{Address(reinterpret_cast<std::uintptr_t>(memory)), ByteCount(kBytes)};
  std::array<ScannedRange, 1> found;
  const Result<ScanResult> scanned =
      pagemap->scan({.range = page, .mask = abi::kPagePresent, .report = abi::kPagePfnZero}, found);
  munmap(memory, kBytes);
  return !scanned || (scanned->ranges == 1 && (found[0].categories & abi::kPagePfnZero) != 0);
}

std::string lacking() {
  auto uffd = Uffd::create({.required = Features(abi::kFeatureEventFork | abi::kFeatureMove)});
  if (!uffd) return "a userfaultfd with kernel faults, fork events and MOVE: " + uffd.error().text();
  if (syscall(SYS_userfaultfd, 0) < 0) return "CAP_SYS_PTRACE, for the userfaultfd system call";
  if (read_text("/proc/self/wchan").empty()) return "/proc/PID/task/TID/wchan";
  return {};
}

}  // namespace uffdkit::differential
