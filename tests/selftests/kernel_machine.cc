// The cases' machine that is the running kernel, and this process.
#include <fcntl.h>
#include <linux/memfd.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <list>
#include <utility>

#include "selftests/machine.h"
#include "support/huge_pages.h"
#include "support/mapping.h"
#include "support/paths.h"
#include "support/serving.h"
#include "support/transparent_pages.h"

namespace uffdkit::selftests {
namespace {

using test::Mapping;
using test::TransparentPages;

constexpr std::size_t kHugePagesMax = 8;

// What is done at a SIGBUS: the handler of the case, if there is one.
std::function<void(Address)> sigbus_handler;

std::byte* pointer(Address address) {
  return reinterpret_cast<std::byte*>(address.value);
}

int answer(int result) {
  return result < 0 ? -errno : result;
}

// ---- accesses that may give SIGBUS ----------------------------------------------------------------------

thread_local sigjmp_buf after_sigbus;
thread_local volatile bool survivable = false;  // the signal handler reads it

void on_signal(int, siginfo_t* info, void*) {
  if (!sigbus_handler && survivable) siglongjmp(after_sigbus, 1);
  if (!sigbus_handler) abort();
  sigbus_handler(Address(reinterpret_cast<std::uintptr_t>(info->si_addr)));
}

// Does `access`; false if it gives SIGBUS and nobody handles that.
template <class Do>
bool survives(const Do& access) {
  const bool survived = sigsetjmp(after_sigbus, 1) == 0;
  survivable = survived;
  if (survived) access();
  survivable = false;
  return survived;
}

// ---- threads --------------------------------------------------------------------------------------------

// A page pinned for long and for reading, as a device would. CONFIG_GUP_TEST has a file for that.
// Source: mm/gup_test.h.
UniqueFd pinned(AddressRange range) {
  UniqueFd file(open("/sys/kernel/debug/gup_test", O_RDWR | O_CLOEXEC));
  struct {
    std::uint64_t address, bytes;
    std::uint32_t flags;
  } args = {range.start.value, range.length.value, 0};
  constexpr unsigned long kStart = _IOW('g', 7, decltype(args));
  if (!file || ioctl(file.get(), kStart, &args) != 0)
    throw Lacking("needs CONFIG_GUP_TEST, and root to use /sys/kernel/debug/gup_test");
  return file;  // closing it unpins
}

class KernelThread final : public Thread {
 public:
  using Thread::read;
  using Thread::write;

  bool read(Address from, std::span<std::byte> to) override {
    return survives([&] { std::memcpy(to.data(), pointer(from), to.size()); });
  }
  bool write(Address to, std::span<const std::byte> bytes) override {
    return survives([&] { std::memcpy(pointer(to), bytes.data(), bytes.size()); });
  }
  bool exchange(Address at, std::byte expected, std::byte value) override {
    return std::atomic_ref(*pointer(at)).compare_exchange_strong(expected, value);
  }

  int advise(AddressRange range, Advice advice) override {
    return answer(madvise(pointer(range.start), range.length.value, number_of(advice)));
  }
  int remap(AddressRange from, Address to) override {
    void* moved = mremap(pointer(from.start), from.length.value, from.length.value,
                         MREMAP_MAYMOVE | MREMAP_FIXED, pointer(to));
    return answer(moved == MAP_FAILED ? -1 : 0);
  }
  int protect(AddressRange range, bool readable, bool writable) override {
    return answer(mprotect(pointer(range.start), range.length.value,
                           (readable ? PROT_READ : 0) | (writable ? PROT_WRITE : 0)));
  }
  int unmap(AddressRange range) override { return answer(munmap(pointer(range.start), range.length.value)); }

  int map_over(AddressRange range) override {
    const void* mapped = mmap(pointer(range.start), range.length.value, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    return answer(mapped == MAP_FAILED ? -1 : 0);
  }

  void pin(AddressRange page) override { pin_ = pinned(page); }
  void unpin() override { pin_.reset(); }

  bool is_armed(Address address) override {
    constexpr std::uint64_t kUffdWp = std::uint64_t{1} << 57;
    const UniqueFd pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
    std::uint64_t entry = 0;
    const auto at = static_cast<off_t>((address.value >> kPage4K.shift()) * sizeof entry);
    if (pread(pagemap.get(), &entry, sizeof entry, at) != sizeof entry)
      throw std::runtime_error("/proc/self/pagemap cannot be read");
    return (entry & kUffdWp) != 0;
  }

  void pause() override { sched_yield(); }

 private:
  static int number_of(Advice advice) {
    constexpr int kMadvCollapse = 25;  // 6.1; newer than the C library's headers
    switch (advice) {
      case Advice::dont_need:
        return MADV_DONTNEED;
      case Advice::remove:
        return MADV_REMOVE;
      case Advice::dont_fork:
        return MADV_DONTFORK;
      case Advice::huge_page:
        return MADV_HUGEPAGE;
      case Advice::collapse:
        return kMadvCollapse;
      case Advice::page_out:
        return MADV_PAGEOUT;
    }
    std::unreachable();
  }

  UniqueFd pin_;
};

class BackgroundWork final : public Work {
 public:
  BackgroundWork(const Uffd& uffd, AddressRange served, std::function<int()> body)
      : thread_(uffd, served, [this, body = std::move(body)] { result_ = body(); }) {}
  bool finished() const override { return thread_.finished(); }
  void join() override { thread_.join(); }
  int result() const override { return result_; }

 private:
  int result_ = 0;
  test::Background thread_;
};

int fork_and_wait(const std::function<int(Thread&)>& body) {
  const pid_t child = fork();
  if (child == 0) {
    // A test program that is killed must not leave the child behind.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    sigbus_handler = nullptr;
    try {
      KernelThread self;
      _exit(body(self));
    } catch (const std::exception&) {
      _exit(99);
    }
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return -1;
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

// ---- page frames -----------------------------------------------------------------------------------------

template <class Entry>
Entry entry_of(int file, std::uint64_t index) {
  Entry entry{};
  if (pread(file, &entry, sizeof entry, static_cast<off_t>(index * sizeof entry)) != sizeof entry) return {};
  return entry;
}

// Whether all of a range is mapped from one huge page's frames, which the kernel shows to root.
// Source: Documentation/admin-guide/mm/pagemap.rst.
bool is_one_page(AddressRange range) {
  constexpr std::uint64_t kFrame = (std::uint64_t{1} << 55) - 1;
  constexpr std::uint64_t kHead = 1u << 15;
  constexpr std::uint64_t kTail = 1u << 16;
  const UniqueFd pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  const UniqueFd flags(open("/proc/kpageflags", O_RDONLY | O_CLOEXEC));
  const std::uint64_t first_page = range.start.value >> kPage4K.shift();
  const std::uint64_t first = entry_of<std::uint64_t>(pagemap.get(), first_page) & kFrame;
  if (!flags || first == 0) throw Lacking("needs root, to see page frames");
  for (std::uint64_t i = 0; i < kPage4K.pages(range.length).value; ++i) {
    const std::uint64_t frame = entry_of<std::uint64_t>(pagemap.get(), first_page + i) & kFrame;
    const std::uint64_t expected = i == 0 ? kHead : kTail;
    if (frame != first + i || (entry_of<std::uint64_t>(flags.get(), frame) & (kHead | kTail)) != expected)
      return false;
  }
  return true;
}

// ---- the machine ----------------------------------------------------------------------------------------

class Kernel final : public Machine {
 public:
  Kernel() {
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, &before_);
  }
  ~Kernel() override {
    sigbus_handler = nullptr;
    sigaction(SIGBUS, &before_, nullptr);
  }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  SystemCalls& system() override { return linux_system_calls(); }
  Thread& here() override { return here_; }

  Area map(MemoryType type, std::size_t pages) override {
    if (is_huge(type) && !huge_pages_) {
      huge_pages_.emplace(kHugePagesMax);
      if (!huge_pages_->lacking().empty()) throw Lacking(huge_pages_->lacking());
    }
    Area area{.type = type,
              .pages = pages,
              .page_bytes = is_huge(type) ? kPage2M.bytes() : kPage4K.bytes(),
              .start = {}};
    const std::size_t bytes = area.range().length.value;
    const UniqueFd file = file_for(type, bytes);
    area.start = map_at(place(area.range().length), bytes, type, file.get());
    if (is_shared(type)) area.second = map_at(place(area.range().length), bytes, type, file.get());
    return area;
  }

  std::vector<ByteCount> transparent_sizes(MemoryType type) override {
    std::vector<ByteCount> sizes;
    for (const std::size_t bytes : TransparentPages::sizes(of(type))) sizes.emplace_back(bytes);
    return sizes;
  }
  Area map_transparent(MemoryType type, ByteCount bytes) override {
    const Area area = map(type, bytes.value / kPage4K.bytes().value);
    {
      const TransparentPages allowed(of(type), bytes.value);
      if (!allowed.lacking().empty()) throw Lacking(allowed.lacking());
      here_.advise(area.range(), Advice::huge_page);
      for (std::size_t page = 0; page < area.pages; ++page) here_.write(area.at(page), std::byte{1});
    }
    if (!is_one_page(area.range()))
      throw Lacking("needs a free transparent huge page of " + std::to_string(bytes.value >> 10) + " KiB");
    return area;
  }

  // It is kept free by a mapping that nobody can touch.
  Address place(ByteCount bytes) override {
    const std::uint64_t huge = kPage2M.bytes().value;
    kept_.push_back(Mapping::map(nullptr, bytes.value + huge, PROT_NONE,
                                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1));
    return Address(kPage2M.round_down(kept_.back().range().start.value + huge - 1));
  }

  std::unique_ptr<Work> start(const Uffd& uffd, AddressRange served,
                              std::function<void(Thread&)> body) override {
    return std::make_unique<BackgroundWork>(uffd, served, [body = std::move(body)] {
      KernelThread self;
      body(self);
      return 0;
    });
  }
  std::unique_ptr<Work> fork(const Uffd& uffd, AddressRange served,
                             std::function<int(Thread&)> body) override {
    return std::make_unique<BackgroundWork>(uffd, served,
                                            [body = std::move(body)] { return fork_and_wait(body); });
  }

  void on_sigbus(std::function<void(Address)> handler) override { sigbus_handler = std::move(handler); }
  std::string mistakes() override { return {}; }

 private:
  static UniqueFd file_for(MemoryType type, std::size_t bytes) {
    if (type == MemoryType::anon) return {};
    if (type != MemoryType::file_private)
      return test::memory_file(bytes, is_huge(type) ? MFD_HUGETLB | MFD_HUGE_2MB : 0u);
    UniqueFd file(open(test::build_directory().c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
    if (!file || ftruncate(file.get(), static_cast<off_t>(bytes)) != 0)
      throw Lacking("needs a filesystem with O_TMPFILE at " + test::build_directory());
    return file;
  }

  static Address map_at(Address where, std::size_t bytes, MemoryType type, int file) {
    const int sharing = is_shared(type) ? MAP_SHARED : MAP_PRIVATE;
    const int flags = sharing | MAP_FIXED | (type == MemoryType::anon ? MAP_ANONYMOUS : 0);
    if (mmap(pointer(where), bytes, PROT_READ | PROT_WRITE, flags, file, 0) == MAP_FAILED)
      throw std::system_error(errno, std::generic_category(), "mmap");
    // A kernel without transparent huge pages refuses this, and needs it not.
    if (type == MemoryType::anon) madvise(pointer(where), bytes, MADV_NOHUGEPAGE);
    return where;
  }

  static TransparentPages::Of of(MemoryType type) {
    return is_shared(type) ? TransparentPages::Of::shmem : TransparentPages::Of::anonymous;
  }

  struct sigaction before_{};
  std::optional<test::HugePages> huge_pages_;
  std::list<Mapping> kept_;  // all that is mapped here lies in these
  KernelThread here_;
};

}  // namespace

std::unique_ptr<Machine> make_kernel() {
  return std::make_unique<Kernel>();
}

}  // namespace uffdkit::selftests
