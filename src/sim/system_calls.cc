// The seam: uffdkit::SystemCalls of a simulated process.
#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <string>
#include <string_view>

#include "sim/access_rules.h"
#include "sim/machine.h"
#include "sim/pagemap.h"

namespace uffdkit::sim {
namespace {

class SimulatedCalls final : public SystemCalls {
 public:
  explicit SimulatedCalls(ProcessImpl& process) : process_(process) {}

  int userfaultfd(int flags) override {
    let_others_run();
    const int allowed =
        may_call_userfaultfd(process_.credentials(), flags, options().unprivileged_userfaultfd);
    if (allowed < 0) return allowed;
    Caller caller = process_.caller();
    return new_userfaultfd(caller, flags);
  }

  int open(const char* path, int flags) override {
    let_others_run();
    constexpr std::string_view kFdinfo = "/proc/self/fdinfo/";
    const std::string_view name(path);
    if (name == abi::kDevicePath) {
      const int allowed = may_open_device(process_.credentials(), options().device, options().version);
      return allowed < 0 ? allowed : table().install(std::make_shared<DeviceFile>(), flags);
    }
    if (name.starts_with("/proc/") && name.ends_with("/pagemap")) return open_pagemap(name, flags);
    if (!name.starts_with(kFdinfo)) return -ENOENT;
    int fd = -1;
    const char* end = name.data() + name.size();
    if (std::from_chars(name.data() + kFdinfo.size(), end, fd).ptr != end) return -ENOENT;
    const FilePtr file = table().file(fd);
    if (!file) return -ENOENT;
    const auto* uffd = dynamic_cast<const UffdFile*>(file.get());
    std::string text =
        uffd != nullptr ? fdinfo_text(uffd->context()) : "pos:\t0\nflags:\t00\nmnt_id:\t16\nino:\t1\n";
    return table().install(std::make_shared<TextFile>(std::move(text)), flags);
  }

  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override {
    let_others_run();
    const FilePtr file = table().file(fd);
    if (!file) return -EBADF;
    Caller caller = process_.caller();
    return file->ioctl(caller, request, argument);
  }

  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override {
    let_others_run();
    const FilePtr file = table().file(fd);
    if (!file) return -EBADF;
    const bool blocking = (table().flags(fd) & O_NONBLOCK) == 0;
    Caller caller = process_.caller();
    for (;;) {
      const std::ptrdiff_t result = file->read(caller, reinterpret_cast<std::uintptr_t>(buffer), bytes);
      if (result != -EAGAIN || !blocking) return result;
      if (!process_.machine().step()) return -EDEADLK;
    }
  }

  int poll_readable(int fd, int timeout_ms) override {
    let_others_run();
    const FilePtr file = table().file(fd);
    if (!file) return -EBADF;
    for (;;) {
      const int events = file->poll();
      if (events != 0 || timeout_ms == 0) return events;
      if (!process_.machine().step()) return timeout_ms < 0 ? -EDEADLK : 0;
    }
  }

  int get_flags(int fd) override { return table().flags(fd); }

  int duplicate(int fd) override {
    const FilePtr file = table().file(fd);
    return file ? table().install(file, table().flags(fd) | O_CLOEXEC) : -EBADF;
  }

  int close(int fd) override {
    let_others_run();
    return table().close(fd);
  }

 private:
  // Another process's needs the right to ptrace it: CAP_SYS_PTRACE, or the same user.
  // Source: ptrace(2), "Ptrace access mode checking".
  int open_pagemap(std::string_view path, int flags) {
    const std::string_view who = path.substr(6, path.size() - 6 - std::string_view("/pagemap").size());
    for (const auto& process : process_.machine().processes) {
      if (who == "self" ? process.get() != &process_ : who != std::to_string(process->pid())) continue;
      if (!process->alive()) break;
      const Credentials& caller = process_.credentials();
      const bool allowed =
          process.get() == &process_ || caller.cap_sys_ptrace ||
          (caller.uid == process->credentials().uid && !process->credentials().cap_sys_ptrace);
      return allowed ? table().install(std::make_shared<PagemapFile>(process->space()), flags) : -EACCES;
    }
    return -ENOENT;
  }

  KernelOptions& options() { return process_.machine().options; }
  DescriptorTable& table() { return *process_.descriptors(); }

  void let_others_run() {
    Machine& machine = process_.machine();
    if (options().turns_before_calls == 0) return;
    const std::uint64_t turns = machine.random() % (options().turns_before_calls + 1);
    for (std::uint64_t turn = 0; turn < turns; ++turn)
      if (!machine.step()) return;
  }

  ProcessImpl& process_;
};

}  // namespace

std::unique_ptr<SystemCalls> make_system_calls(ProcessImpl& process) {
  return std::make_unique<SimulatedCalls>(process);
}

}  // namespace uffdkit::sim
