// Pages brought by the threads that touch them. From SigbusRegion::Impl::resolve() on, all that a fault runs
// through is async-signal-safe: system calls, atomics, buffers made beforehand.
#include <fmt/format.h>
#include <pthread.h>
#include <sys/mman.h>
#include <uffdkit/sigbus_pager.h>
#include <uffdkit/signal_safe_store.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <optional>
#include <utility>

#include "base/signals_blocked.h"
#include "engine/handler_buffers.h"
#include "engine/map_options.h"
#include "engine/sigbus_handler.h"

namespace uffdkit {
namespace {

constexpr std::uint64_t kPageBytes = kPage4K.bytes().value;

// How often a page is tried that is said to be there, but cannot be read. Pages that are being given back
// look so for a moment; one that cannot be swapped in for ever.
constexpr int kTriesMax = 8;

AddressRange range_of(void* memory, ByteCount length) {
  return {Address(reinterpret_cast<std::uintptr_t>(memory)), length};
}

void* pointer_to(Address address) {
  return reinterpret_cast<void*>(address.value);
}

// Memory of the process's own, zeroed, unmapped at the end.
class OwnMemory {
 public:
  static Result<OwnMemory> map(ByteCount length, int protection) {
    void* memory =
        ::mmap(nullptr, length.value, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED)
      return Failure(Error::from_errno(fmt::format("map {} bytes", length.value), errno));
    return OwnMemory(memory, length);
  }
  OwnMemory(OwnMemory&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)), length_(other.length_) {}
  OwnMemory& operator=(OwnMemory&&) = delete;
  ~OwnMemory() {
    if (memory_ != nullptr) ::munmap(memory_, length_.value);
  }

  void* get() const { return memory_; }
  ByteCount length() const { return length_; }
  void release() { memory_ = nullptr; }

 private:
  OwnMemory(void* memory, ByteCount length) : memory_(memory), length_(length) {}
  void* memory_;
  ByteCount length_;
};

// A bit for each page of a region, only ever set; any thread, sequentially consistent.
class PageBits {
 public:
  static Result<PageBits> of(PageCount pages) {
    Result<OwnMemory> words = OwnMemory::map(ByteCount((pages.value + 63) / 64 * 8), PROT_READ | PROT_WRITE);
    if (!words) return Failure(std::move(words).error());
    return PageBits(std::move(*words));
  }

  bool test(PageIndex page) const { return (word(page.value / 64).load() >> (page.value % 64) & 1) != 0; }

  void set(PageRange pages) const {
    for (std::uint64_t page = pages.first.value; page < pages.end().value;) {
      const std::uint64_t count = std::min(64 - page % 64, pages.end().value - page);
      const std::uint64_t ones = count == 64 ? ~std::uint64_t{0} : (std::uint64_t{1} << count) - 1;
      word(page / 64).fetch_or(ones << (page % 64));
      page += count;
    }
  }

 private:
  explicit PageBits(OwnMemory words) : words_(std::move(words)) {}
  std::atomic_ref<std::uint64_t> word(std::uint64_t index) const {
    return std::atomic_ref(static_cast<std::uint64_t*>(words_.get())[index]);
  }
  OwnMemory words_;
};

Failure of_another_process(const std::string& what) {
  return Failure(Error("a child of the process that made the " + what + " cannot use it", EPERM)
                     .with_remedy("create a SigbusPager in the child, and map there"));
}

}  // namespace

// Members go in reverse order: the handler stays as long as there are buffers and a userfaultfd to use.
struct SigbusPager::Impl {
  Impl(Uffd own, std::unique_ptr<HandlerBuffers> scratch, SigbusHandler installed, PageCount around)
      : uffd(std::move(own)),
        buffers(std::move(scratch)),
        handler(std::move(installed)),
        fault_around(around) {}

  const Uffd uffd;
  const std::unique_ptr<HandlerBuffers> buffers;
  const SigbusHandler handler;
  const PageCount fault_around;
  const pid_t process = ::getpid();
  std::atomic<std::uint64_t> faults{0};
  std::atomic<std::uint64_t> faults_failed{0};
  std::atomic<std::uint64_t> pages_copied{0};
  std::atomic<std::uint64_t> pages_zeroed{0};
};

class SigbusRegion::Impl final : public FaultResolver {
 public:
  Impl(std::shared_ptr<SigbusPager::Impl> pager, std::shared_ptr<Store> store, SignalSafeStore& signal_safe,
       StoreOffset offset, OwnMemory memory, PageBits discarded)
      : pager_(std::move(pager)),
        store_(std::move(store)),
        signal_safe_(signal_safe),
        offset_(offset),
        memory_(std::move(memory)),
        discarded_(std::move(discarded)) {}
  ~Impl() override {
    // A child does not have this memory; whatever lies in its place is the child's.
    if (in_child()) memory_.release();
  }
  Impl(const Impl&) = delete;
  Impl& operator=(const Impl&) = delete;

  // From here on faults come; and not before.
  Result<void> serve();

  AddressRange range() const { return range_of(memory_.get(), memory_.length()); }
  Result<void> bring(std::span<const std::byte> part);
  Result<void> discard(std::span<std::byte> part);

  bool resolve(Address address) noexcept override;

 private:
  // Neighbours of one kind: zero, or to be read from the store.
  struct Run {
    PageRange pages;
    bool zero;
  };
  struct Brought {
    int os_error;   // 0: the page is there, or its access should be tried again
    PageIndex end;  // the pages from the one that was asked for to here are there
  };

  bool in_child() const { return pager_->process != ::getpid(); }
  PageIndex end() const { return PageIndex(kPage4K.pages(memory_.length()).value); }
  Address address_of(PageIndex page) const { return range().start + ByteCount(page.value * kPageBytes); }
  AddressRange range_of_pages(PageRange pages) const {
    return {address_of(pages.first), kPage4K.bytes(pages.count)};
  }
  // The pages that `part` lies in. Errors: it is not in the region.
  Result<PageRange> pages_of(std::span<const std::byte> part) const;

  Run run_around(PageIndex page) const noexcept;
  bool any_discarded(PageRange pages) const noexcept;
  Brought bring_page(PageIndex page) noexcept;
  Brought zero(PageRange run, PageIndex page) noexcept;
  Brought copy(PageRange run, PageIndex page, std::span<std::byte> buffer) noexcept;
  template <class Fill>
  Brought fill(PageRange run, PageIndex page, std::atomic<std::uint64_t>& counter, Fill fill) noexcept;
  bool can_be_read(PageIndex page) const noexcept;

  // In reverse order: first no fault comes any more, then the memory goes.
  const std::shared_ptr<SigbusPager::Impl> pager_;
  const std::shared_ptr<Store> store_;
  SignalSafeStore& signal_safe_;  // the same store
  const StoreOffset offset_;
  OwnMemory memory_;
  const PageBits discarded_;
  std::optional<HandledRange> handled_;
};

Result<void> SigbusRegion::Impl::serve() {
  Result<HandledRange> handled = HandledRange::add(range(), *this);
  if (!handled) return Failure(std::move(handled).error());
  handled_.emplace(std::move(*handled));
  if (::madvise(memory_.get(), memory_.length().value, MADV_DONTFORK) < 0)
    return Failure(Error::from_errno("keep a region from children (MADV_DONTFORK)", errno));
  const Result<RangeIoctls> registered = pager_->uffd.register_range(range(), kMissing);
  if (!registered) return Failure(registered.error());
  if (::mprotect(memory_.get(), memory_.length().value, PROT_READ | PROT_WRITE) < 0)
    return Failure(Error::from_errno("make a region accessible", errno));
  return {};
}

// ---- a fault
// -----------------------------------------------------------------------------------------------

bool SigbusRegion::Impl::resolve(Address address) noexcept {
  ++pager_->faults;
  const PageIndex page((address - range().start).value / kPageBytes);
  if (bring_page(page).os_error == 0) return true;
  ++pager_->faults_failed;
  return false;
}

SigbusRegion::Impl::Brought SigbusRegion::Impl::bring_page(PageIndex page) noexcept {
  for (int tries = 0; tries < kTriesMax;) {
    const Run run = run_around(page);
    Brought brought{};
    if (run.zero) {
      brought = zero(run.pages, page);
    } else {
      HandlerBuffers::Claim buffer = pager_->buffers->claim();
      buffer.announce(range_of_pages(run.pages));
      // Who discards pages first sets their bits, and then looks for announcements.
      if (any_discarded(run.pages)) continue;
      brought = copy(run.pages, page, buffer.bytes());
    }
    if (brought.os_error != EEXIST) return brought;
    if (can_be_read(page)) return {.os_error = 0, .end = page + PageCount(1)};
    ++tries;
  }
  return {.os_error = EIO, .end = page};
}

// In the aligned window of pages that a fault brings.
SigbusRegion::Impl::Run SigbusRegion::Impl::run_around(PageIndex page) const noexcept {
  const std::uint64_t around = pager_->fault_around.value;
  const PageIndex window(page.value / around * around);
  const PageIndex window_end = std::min(window + PageCount(around), end());
  Extent extent{.zero = false, .end = StoreOffset(0)};
  const auto is_zero = [&](PageIndex at) {
    if (discarded_.test(at)) return true;
    const StoreOffset position = offset_ + ByteCount(at.value * kPageBytes);
    if (position >= extent.end) extent = store_->extent_at(position);
    return extent.zero && extent.end >= position + kPage4K.bytes();
  };
  PageIndex first = window;
  bool zero = is_zero(window);
  PageIndex at = window + PageCount(1);
  for (; at < window_end; at = at + PageCount(1)) {
    if (is_zero(at) == zero) continue;
    if (at > page) break;
    first = at;
    zero = !zero;
  }
  return {.pages = {first, at - first}, .zero = zero};
}

bool SigbusRegion::Impl::any_discarded(PageRange pages) const noexcept {
  for (PageIndex page = pages.first; page < pages.end(); page = page + PageCount(1))
    if (discarded_.test(page)) return true;
  return false;
}

SigbusRegion::Impl::Brought SigbusRegion::Impl::zero(PageRange run, PageIndex page) noexcept {
  return fill(run, page, pager_->pages_zeroed,
              [this](PageRange pages) { return pager_->uffd.zero(range_of_pages(pages)); });
}

SigbusRegion::Impl::Brought SigbusRegion::Impl::copy(PageRange run, PageIndex page,
                                                     std::span<std::byte> buffer) noexcept {
  const auto read = [&] {
    return signal_safe_.read_in_handler(offset_ + ByteCount(run.first.value * kPageBytes),
                                        buffer.first(kPage4K.bytes(run.count).value));
  };
  int os_error = read();
  if (os_error != 0 && run.count > PageCount(1)) {
    // What is wrong with its neighbours must not concern this page.
    run = {page, PageCount(1)};
    os_error = read();
  }
  if (os_error != 0) return {.os_error = os_error, .end = page};
  return fill(run, page, pager_->pages_copied, [&](PageRange pages) {
    return pager_->uffd.copy(
        address_of(pages.first),
        buffer.subspan((pages.first - run.first).value * kPageBytes, kPage4K.bytes(pages.count).value));
  });
}

// Fills the run, or if pages of it are there already, at least the page that was asked for. EEXIST: that is
// there already.
template <class Fill>
SigbusRegion::Impl::Brought SigbusRegion::Impl::fill(PageRange run, PageIndex page,
                                                     std::atomic<std::uint64_t>& counter,
                                                     Fill fill) noexcept {
  Outcome outcome = fill(run);
  if (run.first + kPage4K.pages(outcome.done) <= page && run.count > PageCount(1)) {
    counter += kPage4K.pages(outcome.done).value;
    run = {page, PageCount(1)};
    outcome = fill(run);
  }
  counter += kPage4K.pages(outcome.done).value;
  const PageIndex filled_to = run.first + kPage4K.pages(outcome.done);
  if (filled_to > page) return {.os_error = 0, .end = filled_to};
  // Without events memory is never changing for the kernel; if it were, trying again would be right.
  if (outcome.stop == Stop::changing) return {.os_error = 0, .end = page};
  return {.os_error = outcome.os_error, .end = page};
}

// Of a page that is there according to the kernel: whether the next access to it can succeed. Not if it has
// just been given back, or is swapped out and lost.
bool SigbusRegion::Impl::can_be_read(PageIndex page) const noexcept {
  const int result = ::madvise(pointer_to(address_of(page)), kPageBytes, MADV_POPULATE_READ);
  // A kernel before 5.14 cannot tell: it has the access tried again.
  return result == 0 || errno == EINVAL;
}

// ---- by the program's own will
// -----------------------------------------------------------------------------

Result<PageRange> SigbusRegion::Impl::pages_of(std::span<const std::byte> part) const {
  const AddressRange own = range();
  const std::uint64_t start = reinterpret_cast<std::uintptr_t>(part.data());
  if (start < own.start.value || start > own.end().value || part.size() > own.end().value - start)
    return Failure(Error(fmt::format("[{:#x}, {:#x}) is not in the region [{:#x}, {:#x})", start,
                                     start + part.size(), own.start.value, own.end().value),
                         EINVAL));
  const std::uint64_t first = (start - own.start.value) / kPageBytes;
  const std::uint64_t last = (start + part.size() - own.start.value + kPageBytes - 1) / kPageBytes;
  return PageRange{PageIndex(first), PageCount(part.empty() ? 0 : last - first)};
}

Result<void> SigbusRegion::Impl::bring(std::span<const std::byte> part) {
  if (in_child()) return of_another_process("region");
  const Result<PageRange> wanted = pages_of(part);
  if (!wanted) return Failure(wanted.error());
  std::array<unsigned char, 4096> resident;
  for (PageIndex page = wanted->first; page < wanted->end();) {
    const PageCount look = std::min(PageCount(resident.size()), wanted->end() - page);
    if (::mincore(pointer_to(address_of(page)), kPage4K.bytes(look).value, resident.data()) < 0)
      return Failure(Error::from_errno("look which pages of a region are there", errno));
    const PageIndex first = page;
    while (page < first + look) {
      if ((resident[(page - first).value] & 1) != 0) {
        page = page + PageCount(1);
        continue;
      }
      // A signal's handler could touch the region too, and wait for the buffer that this thread has.
      const SignalsBlocked blocked;
      int cancel_state = PTHREAD_CANCEL_ENABLE;
      ::pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
      const Brought brought = bring_page(page);
      ::pthread_setcancelstate(cancel_state, nullptr);
      if (brought.os_error != 0)
        return Failure(Error::from_errno(fmt::format("bring the page of {} at offset {}", store_->name(),
                                                     offset_.value + page.value * kPageBytes),
                                         brought.os_error));
      page = std::max(brought.end, page);
    }
  }
  return {};
}

Result<void> SigbusRegion::Impl::discard(std::span<std::byte> part) {
  if (in_child()) return of_another_process("region");
  const Result<PageRange> pages = pages_of(part);
  if (!pages) return Failure(pages.error());
  if (range_of_pages(*pages).length.value != part.size() ||
      pointer_to(address_of(pages->first)) != static_cast<void*>(part.data()))
    return Failure(
        Error(fmt::format("discard {} bytes at offset {} of a region: not whole pages of {} bytes",
                          part.size(), (range_of(part.data(), {}).start - range().start).value, kPageBytes),
              EINVAL));
  if (part.empty()) return {};
  // From here on these pages are brought as zero. What was being read before comes in first, and goes then.
  discarded_.set(*pages);
  pager_->buffers->wait_for(range_of_pages(*pages));
  if (::madvise(part.data(), part.size(), MADV_DONTNEED) == 0) return {};
  const int os_error = errno;
  Error error = Error::from_errno(fmt::format("give {} bytes back", part.size()), os_error);
  if (os_error == EINVAL)
    error = std::move(error).with_remedy("unlock the memory first (munlock, munlockall)");
  return Failure(std::move(error));
}

// ---- the handles
// -------------------------------------------------------------------------------------------

SigbusRegion::SigbusRegion(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SigbusRegion::SigbusRegion(SigbusRegion&&) noexcept = default;
SigbusRegion& SigbusRegion::operator=(SigbusRegion&&) noexcept = default;
SigbusRegion::~SigbusRegion() = default;
std::byte* SigbusRegion::data() const {
  return static_cast<std::byte*>(pointer_to(impl_->range().start));
}
ByteCount SigbusRegion::size() const {
  return impl_->range().length;
}
Result<void> SigbusRegion::bring(std::span<const std::byte> part) const {
  return impl_->bring(part);
}
Result<void> SigbusRegion::discard(std::span<std::byte> part) const {
  return impl_->discard(part);
}

SigbusPager::SigbusPager(std::shared_ptr<Impl> impl) : impl_(std::move(impl)) {}
SigbusPager::SigbusPager(SigbusPager&&) noexcept = default;
SigbusPager& SigbusPager::operator=(SigbusPager&&) noexcept = default;
SigbusPager::~SigbusPager() = default;

Result<SigbusPager> SigbusPager::create(const SigbusPagerOptions& options) {
  if (Result<void> good = check_fault_around(options.fault_around); !good)
    return Failure(std::move(good).error());
  // No fault of a system call ever comes to it, so it needs no right to those.
  Result<Uffd> uffd =
      Uffd::create({.kernel_faults = false, .required = Features(abi::kFeatureSigbus), .wanted = {}});
  if (!uffd) return Failure(std::move(uffd).error());
  Result<std::unique_ptr<HandlerBuffers>> buffers =
      HandlerBuffers::create(kPage4K.bytes(options.fault_around));
  if (!buffers) return Failure(std::move(buffers).error());
  Result<SigbusHandler> handler = SigbusHandler::install();
  if (!handler) return Failure(std::move(handler).error());
  return SigbusPager(std::make_shared<Impl>(std::move(*uffd), std::move(*buffers), std::move(*handler),
                                            options.fault_around));
}

Result<SigbusRegion> SigbusPager::map(std::shared_ptr<Store> store, const SigbusMapOptions& options) {
  if (impl_->process != ::getpid()) return of_another_process("pager");
  auto* signal_safe = dynamic_cast<SignalSafeStore*>(store.get());
  if (signal_safe == nullptr)
    return Failure(
        Error(store->name() + " cannot be read inside a signal handler: its store is no SignalSafeStore",
              ENOTSUP)
            .with_remedy("use a Pager, which reads on a thread; or make the store a SignalSafeStore"));
  const Result<ByteCount> length = length_to_map(*store, options.offset, options.length, kPage4K);
  if (!length) return Failure(length.error());
  Result<PageBits> discarded = PageBits::of(kPage4K.pages(*length));
  if (!discarded) return Failure(std::move(discarded).error());
  // Out of reach until it is served: a program that locks its memory (mlockall) would have it filled with
  // zeros here and now.
  Result<OwnMemory> memory = OwnMemory::map(*length, PROT_NONE);
  if (!memory) return Failure(std::move(memory).error());
  auto region = std::make_unique<SigbusRegion::Impl>(impl_, std::move(store), *signal_safe, options.offset,
                                                     std::move(*memory), std::move(*discarded));
  if (Result<void> served = region->serve(); !served) return Failure(std::move(served).error());
  return SigbusRegion(std::move(region));
}

SigbusPagerStatus SigbusPager::status() const {
  return {.faults = impl_->faults,
          .faults_failed = impl_->faults_failed,
          .pages_copied = impl_->pages_copied,
          .pages_zeroed = impl_->pages_zeroed};
}

}  // namespace uffdkit
