#include "engine/sigbus_handler.h"

#include <fmt/format.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <new>
#include <thread>
#include <utility>

namespace uffdkit {

// Zeroed memory is an empty one: so the child finds it after fork(2).
struct HandledRange::Slot {
  std::atomic<bool> taken;
  std::atomic<std::uint64_t> start;
  std::atomic<std::uint64_t> length;
  std::atomic<FaultResolver*> resolver;  // set last and cleared first
  std::atomic<std::uint32_t> readers;    // threads that may be using the resolver
};

struct HandledRange::Table {
  static constexpr std::size_t kSlots = 512;
  std::atomic<std::size_t> used;  // no slot from here on has ever been taken
  Slot slots[kSlots];
};

namespace {

// How often somebody who waits for threads to leave the handler looks again.
constexpr std::chrono::microseconds kDrainLook{50};

}  // namespace

// What the handler, and whoever installs it, have in common.
struct SigbusHandling {
  static std::atomic<HandledRange::Table*> table;  // made once, never unmapped
  static struct sigaction before;                  // the handler that was there; constant while ours is
  static std::atomic<bool> before_is_spent;        // SA_RESETHAND: it has been called once

  static std::mutex mutex;
  static unsigned users;  // under the mutex
  static bool displaced;  // under the mutex: the last user left while another handler was in our place

  static void on_signal(int signal, siginfo_t* info, void* context);
  static bool resolve(Address address);
  static void pass_on(int signal, siginfo_t* info, void* context);
  static void end_process(const siginfo_t& info);

  static Result<void> make_table();
  static Result<void> install();
  static void uninstall();
  static bool in_place() {
    struct sigaction now{};
    ::sigaction(SIGBUS, nullptr, &now);
    return (now.sa_flags & SA_SIGINFO) != 0 && now.sa_sigaction == &on_signal;
  }
};

std::atomic<HandledRange::Table*> SigbusHandling::table{nullptr};
struct sigaction SigbusHandling::before{};
std::atomic<bool> SigbusHandling::before_is_spent{false};
std::mutex SigbusHandling::mutex;
unsigned SigbusHandling::users = 0;
bool SigbusHandling::displaced = false;

// ---- in the handler: all of it is async-signal-safe
// --------------------------------------------------------

void SigbusHandling::on_signal(int signal, siginfo_t* info, void* context) {
  const int os_error = errno;
  bool resolved = false;
  if (info->si_code == BUS_ADRERR) {
    // A store's read(2) would be a place to be cancelled at, with a buffer in hand.
    int cancel_state = PTHREAD_CANCEL_ENABLE;
    ::pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
    resolved = resolve(Address(reinterpret_cast<std::uintptr_t>(info->si_addr)));
    ::pthread_setcancelstate(cancel_state, nullptr);
  }
  if (!resolved) pass_on(signal, info, context);
  errno = os_error;
}

bool SigbusHandling::resolve(Address address) {
  HandledRange::Table* ranges = table.load();
  if (ranges == nullptr) return false;
  const std::size_t used = ranges->used.load();
  for (std::size_t i = 0; i < used; ++i) {
    HandledRange::Slot& slot = ranges->slots[i];
    const auto contains = [&] { return address.value - slot.start.load() < slot.length.load(); };
    // Whoever may touch a range has seen it being made, so its slot never looks like another's to him.
    if (!contains()) continue;
    slot.readers.fetch_add(1);
    FaultResolver* resolver = slot.resolver.load();
    const bool found = resolver != nullptr && contains();
    const bool resolved = found && resolver->resolve(address);
    slot.readers.fetch_sub(1);
    if (found) return resolved;
  }
  return false;
}

void SigbusHandling::pass_on(int signal, siginfo_t* info, void* context) {
  const struct sigaction next = before;
  if (next.sa_handler == SIG_IGN && info->si_code <= 0) return;  // sent by a process: may be ignored
  const bool spent = (next.sa_flags & static_cast<int>(SA_RESETHAND)) != 0 && before_is_spent.exchange(true);
  if (next.sa_handler == SIG_DFL || next.sa_handler == SIG_IGN || spent) return end_process(*info);
  // The signals that would be blocked if the kernel had called it. Those of the interrupted code come back
  // when this handler returns, however the next one ends.
  sigset_t mask;
  ::sigorset(&mask, &static_cast<const ucontext_t*>(context)->uc_sigmask, &next.sa_mask);
  if ((next.sa_flags & SA_NODEFER) == 0) ::sigaddset(&mask, signal);
  ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  if ((next.sa_flags & SA_SIGINFO) != 0) {
    next.sa_sigaction(signal, info, context);
  } else {
    next.sa_handler(signal);
  }
}

void SigbusHandling::end_process(const siginfo_t& info) {
  struct sigaction standard{};
  standard.sa_handler = SIG_DFL;
  ::sigaction(SIGBUS, &standard, nullptr);
  // What an instruction has caused it causes again when it goes on, and the core dump has its address.
  const bool comes_again = info.si_code == BUS_ADRERR || info.si_code == BUS_ADRALN ||
                           info.si_code == BUS_OBJERR || info.si_code == BUS_MCEERR_AR;
  if (!comes_again) ::raise(SIGBUS);
}

// ---- around it
// ---------------------------------------------------------------------------------------------

Result<void> SigbusHandling::make_table() {
  if (table.load() != nullptr) return {};
  constexpr std::size_t kBytes = sizeof(HandledRange::Table);
  void* memory = ::mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) return Failure(Error::from_errno("map the table of SIGBUS regions", errno));
  if (::madvise(memory, kBytes, MADV_WIPEONFORK) < 0) {
    const int os_error = errno;
    ::munmap(memory, kBytes);
    return Failure(
        Error::from_errno("keep the table of SIGBUS regions from children (MADV_WIPEONFORK)", os_error)
            .with_remedy("use Linux 4.14 or newer"));
  }
  table.store(new (memory) HandledRange::Table{});
  return {};
}

Result<void> SigbusHandling::install() {
  const std::lock_guard lock(mutex);
  if (Result<void> made = make_table(); !made) return made;
  const bool ours = in_place();
  if (!ours && (users > 0 || displaced))
    return Failure(
        Error("a handler of SIGBUS was installed after the one that brings pages, and is in its place", EBUSY)
            .with_remedy("install it before the first SigbusPager is created"));
  if (!ours) {
    ::sigaction(SIGBUS, nullptr, &before);
    before_is_spent = false;
    struct sigaction action{};
    action.sa_sigaction = &on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    ::sigfillset(&action.sa_mask);
    ::sigaction(SIGBUS, &action, nullptr);
  }
  displaced = false;
  ++users;
  return {};
}

void SigbusHandling::uninstall() {
  const std::lock_guard lock(mutex);
  if (--users > 0) return;
  if (in_place()) {
    ::sigaction(SIGBUS, &before, nullptr);
  } else {
    // It may pass signals on to ours.
    displaced = true;
  }
}

Result<SigbusHandler> SigbusHandler::install() {
  if (Result<void> installed = SigbusHandling::install(); !installed)
    return Failure(std::move(installed).error());
  return SigbusHandler();
}

SigbusHandler::SigbusHandler(SigbusHandler&& other) noexcept
    : installed_(std::exchange(other.installed_, false)) {}

SigbusHandler::~SigbusHandler() {
  if (installed_) SigbusHandling::uninstall();
}

HandledRange::HandledRange(Slot* slot) : slot_(slot), process_(::getpid()) {}

HandledRange::HandledRange(HandledRange&& other) noexcept
    : slot_(std::exchange(other.slot_, nullptr)), process_(other.process_) {}

Result<HandledRange> HandledRange::add(AddressRange range, FaultResolver& resolver) {
  Table& table = *SigbusHandling::table.load();
  for (std::size_t i = 0; i < Table::kSlots; ++i) {
    Slot& slot = table.slots[i];
    if (slot.taken.exchange(true)) continue;
    slot.start = range.start.value;
    slot.length = range.length.value;
    slot.resolver = &resolver;
    std::size_t used = table.used.load();
    while (used <= i && !table.used.compare_exchange_weak(used, i + 1)) {
    }
    return HandledRange(&slot);
  }
  return Failure(
      Error(fmt::format("the process has {} regions of SigbusPagers already", Table::kSlots), ENOSPC)
          .with_remedy("map larger regions, or use a Pager"));
}

HandledRange::~HandledRange() {
  // A child's table is its own: the slot may have been taken by a region of the child's.
  if (slot_ == nullptr || process_ != ::getpid()) return;
  slot_->resolver = nullptr;
  while (slot_->readers.load() != 0) std::this_thread::sleep_for(kDrainLook);
  slot_->length = 0;
  slot_->taken = false;
}

}  // namespace uffdkit
