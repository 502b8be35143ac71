#include "support/scripted_system_calls.h"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <string_view>

namespace uffdkit::test {

int ScriptedSystemCalls::make_descriptor() {
  open_.insert(next_);
  return next_++;
}

int ScriptedSystemCalls::userfaultfd(int flags) {
  creation_flags.push_back(flags);
  const int error = (flags & abi::kUserModeOnly) != 0 ? user_mode_error : system_call_error;
  return error != 0 ? -error : make_descriptor();
}

int ScriptedSystemCalls::open(const char* path, int) {
  if (std::string_view(path) == abi::kDevicePath && device_error != 0) return -device_error;
  return make_descriptor();
}

int ScriptedSystemCalls::enable(int fd, abi::ApiArgs& args) {
  const Features asked(args.features);
  features_asked.push_back(asked);
  args = {};  // as the kernel does when it refuses
  if (enabled_.contains(fd) || !kernel_features.has(asked)) return -EINVAL;
  if (!fork_permitted && asked.has(Features(abi::kFeatureEventFork))) return -EPERM;
  enabled_.insert(fd);
  args = {.api = abi::kApi, .features = kernel_features.bits, .ioctls = 0x8000000000000003};
  return 0;
}

int ScriptedSystemCalls::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  if (!open_.contains(fd)) return -EBADF;
  if (request == abi::kIocNew) {
    creation_flags.push_back(static_cast<int>(argument));
    return make_descriptor();
  }
  if (request == abi::kIoctlApi) return enable(fd, *reinterpret_cast<abi::ApiArgs*>(argument));
  return on_ioctl(request, reinterpret_cast<void*>(argument));
}

std::ptrdiff_t ScriptedSystemCalls::read(int fd, void* buffer, std::size_t bytes) {
  if (!open_.contains(fd)) return -EBADF;
  if (read_error != 0) return -read_error;
  const std::size_t count = std::min(bytes, file_text.size());
  std::memcpy(buffer, file_text.data(), count);
  return static_cast<std::ptrdiff_t>(count);
}

int ScriptedSystemCalls::poll_readable(int, int) {
  return poll_answer;
}

int ScriptedSystemCalls::get_flags(int fd) {
  return open_.contains(fd) ? descriptor_flags : -EBADF;
}

int ScriptedSystemCalls::duplicate(int fd) {
  if (!open_.contains(fd)) return -EBADF;
  open_.insert(next_);
  return next_++;
}

int ScriptedSystemCalls::close(int fd) {
  return open_.erase(fd) == 1 ? 0 : -EBADF;
}

}  // namespace uffdkit::test
