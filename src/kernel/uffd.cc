#include <uffdkit/uffd.h>

#include <fmt/format.h>
#include <poll.h>

#include <array>
#include <cerrno>
#include <utility>

namespace uffdkit {
namespace {

template <class Args>
int call(SystemCalls& system, int fd, unsigned long request, Args& args) {
  return system.ioctl(fd, request, reinterpret_cast<std::uintptr_t>(&args));
}

abi::RangeArgs range_args(AddressRange range) {
  return {range.start.value, range.length.value};
}

std::string describe(AddressRange range) {
  return fmt::format("[{:#x}, {:#x})", range.start.value, range.end().value);
}

Stop stop_of(int os_error) {
  switch (os_error) {
    case EEXIST:
      return Stop::present;
    case ENOENT:
      return Stop::not_ready;
    case ESRCH:
      return Stop::gone;
    case ENOMEM:
      return Stop::no_memory;
    case EFAULT:
      return Stop::bad_memory;
    case EBUSY:
      return Stop::busy;
    case EIO:
    case EHWPOISON:
      return Stop::poisoned;
    case EINVAL:
      return Stop::invalid;
    case EAGAIN:
      return Stop::changing;
    default:
      return Stop::other;
  }
}

// What a filling ioctl did. `counted` is its out field, which was preset to 0: kernels before 6.15 do not
// write it when the address space is changing.
Outcome outcome_of(int result, std::int64_t counted, ByteCount asked) {
  if (result >= 0) return {.done = asked, .stop = Stop::complete};
  const int os_error = -result;
  if (os_error == EAGAIN && counted > 0)
    return {
        .done = ByteCount(static_cast<std::uint64_t>(counted)), .stop = Stop::cut_short, .os_error = EAGAIN};
  return {.done = ByteCount(0), .stop = stop_of(os_error), .os_error = os_error};
}

}  // namespace

std::string to_string(Stop stop) {
  switch (stop) {
    case Stop::complete:
      return "complete";
    case Stop::changing:
      return "address space changing (EAGAIN)";
    case Stop::cut_short:
      return "cut short (EAGAIN)";
    case Stop::present:
      return "page present (EEXIST)";
    case Stop::not_ready:
      return "not mapped or not registered (ENOENT)";
    case Stop::gone:
      return "process gone (ESRCH)";
    case Stop::no_memory:
      return "no memory (ENOMEM)";
    case Stop::bad_memory:
      return "bad memory (EFAULT)";
    case Stop::busy:
      return "page busy (EBUSY)";
    case Stop::poisoned:
      return "hardware memory error";
    case Stop::invalid:
      return "invalid (EINVAL)";
    case Stop::other:
      return "other error";
  }
  return "?";
}

Uffd Uffd::adopt(int fd, Features enabled, SystemCalls& system) {
  return Uffd(fd, enabled, CreateWay::device, system);
}

Uffd::Uffd(Uffd&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)),
      features_(other.features_),
      way_(other.way_),
      system_(other.system_) {}

Uffd& Uffd::operator=(Uffd&& other) noexcept {
  if (this == &other) return *this;
  if (fd_ >= 0) system_->close(fd_);
  fd_ = std::exchange(other.fd_, -1);
  features_ = other.features_;
  way_ = other.way_;
  system_ = other.system_;
  return *this;
}

Uffd::~Uffd() {
  if (fd_ >= 0) system_->close(fd_);
}

int Uffd::release() {
  return std::exchange(fd_, -1);
}

Result<RangeIoctls> Uffd::register_range(AddressRange range, RegisterModes modes) const {
  abi::RegisterArgs args{.range = range_args(range), .mode = modes.bits, .ioctls = 0};
  const int result = call(*system_, fd_, abi::kIoctlRegister, args);
  if (result < 0)
    return Failure(Error::from_errno(
        fmt::format("register {} for {} faults", describe(range), to_string(modes)), -result));
  return RangeIoctls(args.ioctls);
}

Result<void> Uffd::unregister_range(AddressRange range) const {
  abi::RangeArgs args = range_args(range);
  const int result = call(*system_, fd_, abi::kIoctlUnregister, args);
  if (result < 0) return Failure(Error::from_errno(fmt::format("unregister {}", describe(range)), -result));
  return wake(range);
}

Result<void> Uffd::wake(AddressRange range) const {
  abi::RangeArgs args = range_args(range);
  const int result = call(*system_, fd_, abi::kIoctlWake, args);
  if (result < 0) return Failure(Error::from_errno(fmt::format("wake {}", describe(range)), -result));
  return {};
}

[[gnu::hot]] Outcome Uffd::copy(Address to, std::span<const std::byte> bytes, Wake wake,
                                Protect protect) const {
  abi::CopyArgs args{
      .dst = to.value,
      .src = reinterpret_cast<std::uintptr_t>(bytes.data()),
      .len = bytes.size(),
      .mode = (wake == Wake::no ? abi::kDontWake : 0) | (protect == Protect::yes ? abi::kCopyWp : 0),
      .done = 0};
  const int result = call(*system_, fd_, abi::kIoctlCopy, args);
  return outcome_of(result, args.done, ByteCount(bytes.size()));
}

Outcome Uffd::fill(unsigned long request, AddressRange range, std::uint64_t mode) const {
  abi::FillArgs args{.range = range_args(range), .mode = mode, .done = 0};
  const int result = call(*system_, fd_, request, args);
  return outcome_of(result, args.done, range.length);
}

Outcome Uffd::zero(AddressRange range, Wake wake) const {
  return fill(abi::kIoctlZeropage, range, wake == Wake::no ? abi::kDontWake : 0);
}

Outcome Uffd::resume(AddressRange range, Wake wake, Protect protect) const {
  return fill(abi::kIoctlContinue, range,
              (wake == Wake::no ? abi::kDontWake : 0) | (protect == Protect::yes ? abi::kContinueWp : 0));
}

Outcome Uffd::poison(AddressRange range, Wake wake) const {
  return fill(abi::kIoctlPoison, range, wake == Wake::no ? abi::kDontWake : 0);
}

Outcome Uffd::move(Address to, AddressRange from, Wake wake, SourceHoles holes) const {
  abi::CopyArgs args{.dst = to.value,
                     .src = from.start.value,
                     .len = from.length.value,
                     .mode = (wake == Wake::no ? abi::kDontWake : 0) |
                             (holes == SourceHoles::allow ? abi::kMoveAllowSrcHoles : 0),
                     .done = 0};
  const int result = call(*system_, fd_, abi::kIoctlMove, args);
  return outcome_of(result, args.done, from.length);
}

Outcome Uffd::protect(AddressRange range) const {
  abi::WriteprotectArgs args{.range = range_args(range), .mode = abi::kWriteprotectWp};
  return outcome_of(call(*system_, fd_, abi::kIoctlWriteprotect, args), 0, range.length);
}

Outcome Uffd::unprotect(AddressRange range, Wake wake) const {
  abi::WriteprotectArgs args{.range = range_args(range),
                             .mode = wake == Wake::no ? abi::kWriteprotectDontWake : 0};
  return outcome_of(call(*system_, fd_, abi::kIoctlWriteprotect, args), 0, range.length);
}

Target Uffd::target() const {
  // The kernel looks for events on their way first (EAGAIN), for the process then (ESRCH), and last for one
  // mapping of the whole range (ENOENT). No mapping covers these ranges, so nothing is ever filled. A 32-bit
  // process has no such addresses as the first (EINVAL before all else), hence the second.
  constexpr Address kStart(1u << 20);
  constexpr AddressRange kMost64{kStart, Address(0x7fffffff0000) - kStart};
  constexpr AddressRange kMost32{kStart, Address(0xbfff0000) - kStart};
  Stop stop = zero(kMost64, Wake::no).stop;
  if (stop == Stop::invalid) stop = zero(kMost32, Wake::no).stop;
  if (stop == Stop::gone) return Target::gone;
  return stop == Stop::changing ? Target::changing : Target::steady;
}

[[gnu::hot]] ReadOutcome Uffd::read(std::span<abi::Msg> messages) const {
  const std::ptrdiff_t bytes = system_->read(fd_, messages.data(), messages.size_bytes());
  if (bytes >= 0) return {.messages = static_cast<std::size_t>(bytes) / sizeof(abi::Msg)};
  // A signal before the first message counts as none: the caller polls or reads again anyway.
  if (bytes == -EAGAIN || bytes == -EINTR) return {.messages = 0};
  return {.messages = 0, .os_error = static_cast<int>(-bytes)};
}

Result<bool> Uffd::wait_readable(int timeout_ms) const {
  const int events = system_->poll_readable(fd_, timeout_ms);
  if (events == -EINTR) return false;
  if (events < 0) return Failure(Error::from_errno("poll a userfaultfd", -events));
  if ((events & (POLLERR | POLLNVAL)) != 0)
    return Failure(Error("poll a userfaultfd: the kernel reports an error")
                       .with_remedy("create it non-blocking, and enable it with UFFDIO_API"));
  return (events & POLLIN) != 0;
}

}  // namespace uffdkit
