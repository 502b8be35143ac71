#include "sim/descriptors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>

#include <algorithm>
#include <cerrno>

#include "sim/access_rules.h"
#include "sim/ioctls.h"

namespace uffdkit::sim {

// ---- a userfaultfd --------------------------------------------------------------------------------------

// Until UFFDIO_API has succeeded nothing else works. Source: ioctl_userfaultfd(2), "EINVAL".
int UffdFile::ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) {
  if (request != abi::kIoctlApi && !context_->enabled) return -EINVAL;
  const Version version = caller.options.version;
  switch (request) {
    case abi::kIoctlApi:
      return ioctl_api(caller, *context_, argument);
    case abi::kIoctlRegister:
      return ioctl_register(caller, *context_, argument);
    case abi::kIoctlUnregister:
      return ioctl_unregister(caller, *context_, argument);
    case abi::kIoctlWake:
      return ioctl_wake(*context_, argument);
    case abi::kIoctlCopy:
      return ioctl_copy(caller, *context_, argument);
    case abi::kIoctlZeropage:
      return ioctl_zeropage(caller, *context_, argument);
    case abi::kIoctlContinue:
      return version < Version{5, 13} ? -EINVAL : ioctl_continue(caller, *context_, argument);
    case abi::kIoctlPoison:
      return version < Version{6, 6} ? -EINVAL : ioctl_poison(caller, *context_, argument);
    case abi::kIoctlWriteprotect:
      return ioctl_writeprotect(*context_, argument);
    case abi::kIoctlMove:
      return version < Version{6, 8} ? -EINVAL : ioctl_move(caller, *context_, argument);
    default:
      return -EINVAL;
  }
}

// As many whole messages as there are and as fit. Source: userfaultfd(2), "Reading from the userfaultfd
// structure".
std::ptrdiff_t UffdFile::read(Caller& caller, std::uintptr_t buffer, std::size_t bytes) {
  if (!context_->enabled) return -EINVAL;
  if (bytes < sizeof(abi::Msg)) return -EINVAL;
  std::size_t done = 0;
  while (bytes - done >= sizeof(abi::Msg)) {
    abi::Msg message;
    const int result = context_->take_message(caller.descriptors, message);
    if (result < 0) return done == 0 ? result : static_cast<std::ptrdiff_t>(done);
    // A message that cannot be handed over is lost.
    if (!copy_to_host(buffer + done, &message, sizeof(message)))
      return done == 0 ? -EFAULT : static_cast<std::ptrdiff_t>(done);
    done += sizeof(message);
  }
  return static_cast<std::ptrdiff_t>(done);
}

// Blocking descriptors cannot be polled: POLLIN would not promise that a read does not block, because a woken
// thread takes its message back. Source: fs/userfaultfd.c, userfaultfd_poll().
int UffdFile::poll() const {
  if (!context_->enabled || (context_->flags & O_NONBLOCK) == 0) return POLLERR;
  return context_->readable() ? POLLIN : 0;
}

// Source: fs/userfaultfd.c, userfaultfd_show_fdinfo(). The topmost bit of the feature word says "enabled".
std::string fdinfo_text(const Context& context) {
  constexpr std::uint64_t kInitialised = 1u << 31;
  constexpr std::uint64_t kAllIoctls = 0x80000000000001ff;
  return fmt::format(
      "pos:\t0\nflags:\t0{:o}\nmnt_id:\t16\nino:\t1\npending:\t{}\ntotal:\t{}\nAPI:\taa:{:x}:{:x}\n",
      context.flags & ~abi::kUserModeOnly, context.unread_faults(), context.waiting_faults(),
      context.features | (context.enabled ? kInitialised : 0), kAllIoctls);
}

int new_userfaultfd(Caller& caller, int flags) {
  auto context = std::make_shared<Context>(flags, caller.space);
  return caller.descriptors.install(std::make_shared<UffdFile>(std::move(context)), flags);
}

// ---- the device -----------------------------------------------------------------------------------------

// Source: fs/userfaultfd.c, userfaultfd_dev_ioctl().
int DeviceFile::ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) {
  if (request != abi::kIocNew) return -EINVAL;
  const int flags = static_cast<int>(argument);
  const int checked = check_creation_flags(flags);
  return checked < 0 ? checked : new_userfaultfd(caller, flags);
}

std::ptrdiff_t DeviceFile::read(Caller& /*caller*/, std::uintptr_t /*buffer*/, std::size_t /*bytes*/) {
  return -EINVAL;
}

int DeviceFile::poll() const {
  return POLLIN;
}

// ---- texts below /proc ----------------------------------------------------------------------------------

int TextFile::ioctl(Caller& /*caller*/, unsigned long /*request*/, std::uintptr_t /*argument*/) {
  return -ENOTTY;
}

std::ptrdiff_t TextFile::read(Caller& /*caller*/, std::uintptr_t buffer, std::size_t bytes) {
  const std::size_t part = std::min(bytes, text_.size() - position_);
  if (!copy_to_host(buffer, text_.data() + position_, part)) return -EFAULT;
  position_ += part;
  return static_cast<std::ptrdiff_t>(part);
}

int TextFile::poll() const {
  return POLLIN;
}

// ---- the table ------------------------------------------------------------------------------------------

// Source: open(2), "the lowest-numbered file descriptor"; getrlimit(2), RLIMIT_NOFILE.
int DescriptorTable::install(FilePtr file, int flags) {
  int fd = 0;
  for (const auto& [used, entry] : entries_) {
    if (used != fd) break;
    ++fd;
  }
  if (static_cast<std::size_t>(fd) >= most_) return -EMFILE;
  entries_.emplace(fd, Entry{.file = std::move(file), .flags = flags});
  return fd;
}

FilePtr DescriptorTable::file(int fd) const {
  const auto entry = entries_.find(fd);
  return entry == entries_.end() ? nullptr : entry->second.file;
}

int DescriptorTable::flags(int fd) const {
  const auto entry = entries_.find(fd);
  return entry == entries_.end() ? -EBADF : entry->second.flags & ~(O_CLOEXEC | abi::kUserModeOnly);
}

int DescriptorTable::close(int fd) {
  const auto entry = entries_.find(fd);
  if (entry == entries_.end()) return -EBADF;
  // Taken out before it is closed: closing the last one wakes threads, which may come back here.
  const FilePtr file = std::move(entry->second.file);
  entries_.erase(entry);
  return 0;
}

void DescriptorTable::close_on_exec() {
  std::erase_if(entries_, [](const auto& entry) { return (entry.second.flags & O_CLOEXEC) != 0; });
}

}  // namespace uffdkit::sim
