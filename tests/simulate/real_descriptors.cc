#include "simulate/real_descriptors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <stdexcept>
#include <string_view>

namespace uffdkit::simulate {
namespace {

ino_t inode_of(int fd) {
  struct stat status{};
  return ::fstat(fd, &status) == 0 && S_ISFIFO(status.st_mode) ? status.st_ino : 0;
}

}  // namespace

int RealDescriptors::pass(sim::Process& owner, int fd) {
  const std::lock_guard lock(mutex_);
  const int simulated = owner.pass_descriptor(fd, process_);
  if (simulated < 0) throw std::runtime_error("the simulated process takes no descriptor");
  const int end = stand_for(simulated);
  tell();
  return end;
}

int RealDescriptors::stand_for(int simulated) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) throw std::runtime_error("no pipe to be had");
  Passed passed{.inode = inode_of(ends[0]), .read_end = UniqueFd(ends[0]), .write_end = UniqueFd(ends[1])};
  passed_.emplace(simulated, std::move(passed));
  return ends[0];
}

bool RealDescriptors::lost(int fd) {
  const std::lock_guard lock(mutex_);
  const auto found =
      std::ranges::find_if(passed_, [fd](const auto& entry) { return entry.second.read_end.get() == fd; });
  if (found == passed_.end() || found->second.arrived) return false;
  calls_.close(found->first);
  passed_.erase(found);
  return true;
}

void RealDescriptors::bring_children(std::span<abi::Msg> messages) {
  for (abi::Msg& message : messages) {
    if (message.event != abi::kEventFork) continue;
    const int simulated = static_cast<int>(message.arg.fork.ufd);
    const int fd = linux_system_calls().duplicate(stand_for(simulated));
    if (fd < 0) throw std::runtime_error("no descriptor to be had for a child");
    arrived_[fd] = simulated;
    passed_.at(simulated).arrived = true;
    message.arg.fork.ufd = static_cast<std::uint32_t>(fd);
  }
}

std::size_t RealDescriptors::held() {
  const std::lock_guard lock(mutex_);
  return passed_.size();
}

std::size_t RealDescriptors::not_arrived() {
  const std::lock_guard lock(mutex_);
  return static_cast<std::size_t>(
      std::ranges::count_if(passed_, [](const auto& entry) { return !entry.second.arrived; }));
}

void RealDescriptors::tell() {
  for (auto& [simulated, passed] : passed_) {
    const bool readable = calls_.poll_readable(simulated, 0) != 0;
    if (readable == std::exchange(passed.readable, readable)) continue;
    char byte = 0;
    const ssize_t bytes =
        readable ? ::write(passed.write_end.get(), &byte, 1) : ::read(passed.read_end.get(), &byte, 1);
    if (bytes != 1) throw std::runtime_error("a pipe that stands for a userfaultfd does not work");
  }
}

int RealDescriptors::simulated(int fd) const {
  const auto found = arrived_.find(fd);
  return found == arrived_.end() ? -1 : found->second;
}

int RealDescriptors::userfaultfd(int) {
  return -ENOSYS;
}

int RealDescriptors::open(const char* path, int flags) {
  constexpr std::string_view kFdinfo = "/proc/self/fdinfo/";
  const std::string_view name(path);
  int fd = -1;
  if (name.starts_with(kFdinfo)) std::from_chars(name.data() + kFdinfo.size(), name.data() + name.size(), fd);
  const std::lock_guard lock(mutex_);
  const auto found = std::ranges::find_if(
      passed_, [inode = inode_of(fd)](const auto& entry) { return entry.second.inode == inode; });
  if (found == passed_.end()) return linux_system_calls().open(path, flags);
  arrived_[fd] = found->first;
  found->second.arrived = true;

  // What the simulated file says, in a real one.
  const int shown = calls_.open((std::string(kFdinfo) + std::to_string(found->first)).c_str(), flags);
  if (shown < 0) return shown;
  std::array<char, 1024> text;
  const std::ptrdiff_t bytes = calls_.read(shown, text.data(), text.size());
  calls_.close(shown);
  if (bytes < 0) return static_cast<int>(bytes);
  const int file = ::memfd_create("fdinfo", MFD_CLOEXEC);
  if (file < 0) return -errno;
  if (::pwrite(file, text.data(), static_cast<std::size_t>(bytes), 0) != bytes) {
    ::close(file);
    return -ENOSPC;
  }
  return file;
}

int RealDescriptors::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  return alone([&] { return calls_.ioctl(simulated(fd), request, argument); });
}

std::ptrdiff_t RealDescriptors::read(int fd, void* buffer, std::size_t bytes) {
  return alone([&] {
    const int behind = simulated(fd);
    if (behind < 0) return linux_system_calls().read(fd, buffer, bytes);
    const std::ptrdiff_t got = calls_.read(behind, buffer, bytes);
    if (got > 0)
      bring_children({static_cast<abi::Msg*>(buffer), static_cast<std::size_t>(got) / sizeof(abi::Msg)});
    return got;
  });
}

int RealDescriptors::poll_readable(int fd, int timeout_ms) {
  return linux_system_calls().poll_readable(fd, timeout_ms);
}

int RealDescriptors::get_flags(int fd) {
  return alone([&] { return calls_.get_flags(simulated(fd)); });
}

int RealDescriptors::duplicate(int fd) {
  return alone([&] {
    const int copy = linux_system_calls().duplicate(fd);
    if (copy >= 0 && simulated(fd) >= 0) arrived_[copy] = simulated(fd);
    return copy;
  });
}

int RealDescriptors::close(int fd) {
  return alone([&] {
    const int behind = simulated(fd);
    arrived_.erase(fd);
    const bool last = std::ranges::none_of(arrived_, [&](const auto& e) { return e.second == behind; });
    if (behind >= 0 && last) {
      passed_.erase(behind);
      calls_.close(behind);
    }
    return linux_system_calls().close(fd);
  });
}

}  // namespace uffdkit::simulate
