#include "manager/sandbox.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/capability.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <seccomp.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <nlohmann/json.hpp>
#include <string_view>

#include "kernel/serving_requests.h"

namespace uffdkit {
namespace {

// ---- capabilities -----------------------------------------------------------------------------------------

struct Capability {
  unsigned number;
  const char* name;
};
// What serving takes, of those whom it is given to.
constexpr Capability kKept[] = {
    // Images that only others may read; sockets in folders of others, which virtual machine monitors want.
    {CAP_DAC_OVERRIDE, "cap_dac_override"},
    {CAP_DAC_READ_SEARCH, "cap_dac_read_search"},
    // Clients that cannot be served any longer are ended, or paused.
    {CAP_KILL, "cap_kill"},
    // The memory of workers stays in memory, beyond RLIMIT_MEMLOCK.
    {CAP_IPC_LOCK, "cap_ipc_lock"},
};
constexpr unsigned kCapabilitiesMax = 64;

using Sets = std::array<__user_cap_data_struct, _LINUX_CAPABILITY_U32S_3>;

Result<Sets> capabilities() {
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  Sets sets{};
  if (::syscall(SYS_capget, &header, sets.data()) != 0)
    return Failure(Error::from_errno("ask for this process's capabilities", errno));
  return sets;
}

bool is_in(const Sets& sets, unsigned number) {
  return (sets[number / 32].effective >> number % 32 & 1) != 0;
}

bool is_kept(unsigned number) {
  return std::ranges::any_of(kKept, [&](const Capability& kept) { return kept.number == number; });
}

Result<void> keep_capabilities() {
  // The bounding set, while that is allowed. EINVAL: this kernel has no capability of that number.
  for (unsigned number = 0; number < kCapabilitiesMax; ++number)
    if (!is_kept(number) && ::prctl(PR_CAPBSET_DROP, number) != 0 && errno == EINVAL) break;
  (void)::prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
  Result<Sets> sets = capabilities();
  if (!sets) return Failure(std::move(sets).error());
  Sets wanted{};
  for (const Capability& kept : kKept) wanted[kept.number / 32].permitted |= 1u << kept.number % 32;
  for (std::size_t i = 0; i < wanted.size(); ++i) {
    (*sets)[i].permitted &= wanted[i].permitted;
    (*sets)[i].effective &= wanted[i].permitted;
    (*sets)[i].inheritable = 0;
  }
  __user_cap_header_struct header{.version = _LINUX_CAPABILITY_VERSION_3, .pid = 0};
  if (::syscall(SYS_capset, &header, sets->data()) != 0)
    return Failure(Error::from_errno("give up capabilities", errno));
  return {};
}

// ---- system calls -----------------------------------------------------------------------------------------

class Filter {
 public:
  Filter() : context_(::seccomp_init(SCMP_ACT_ERRNO(ENOSYS)), &::seccomp_release) {}

  // Every call of these, whatever its arguments.
  void allow(std::initializer_list<int> calls) {
    for (const int call : calls) add(SCMP_ACT_ALLOW, call, {});
  }
  // Those whose argument of this number has, of these bits, this value.
  void allow_where(int call, unsigned argument, std::uint64_t bits, std::uint64_t value) {
    add(SCMP_ACT_ALLOW, call,
        {{.arg = argument, .op = SCMP_CMP_MASKED_EQ, .datum_a = bits, .datum_b = value}});
  }
  void forbid(std::initializer_list<int> calls) {
    for (const int call : calls) add(SCMP_ACT_KILL_PROCESS, call, {});
  }
  // Errors: what the library or the kernel says to any of these, or to the filter.
  Result<void> load() {
    if (!context_) return Failure(Error::from_errno("make a filter of system calls", ENOMEM));
    note(::seccomp_attr_set(context_.get(), SCMP_FLTATR_CTL_TSYNC, 1));
    // A tree instead of a list: it is gone through at every call that depends on arguments. Since 2.5.
    note(::seccomp_attr_set(context_.get(), SCMP_FLTATR_CTL_OPTIMIZE, 2));
    for (const int hot : {SCMP_SYS(ioctl), SCMP_SYS(read), SCMP_SYS(epoll_wait), SCMP_SYS(futex)})
      note(::seccomp_syscall_priority(context_.get(), hot, 255));
    if (failed_ == 0) note(::seccomp_load(context_.get()));
    if (failed_ == 0) return {};
    return Failure(Error::from_errno("filter this process's system calls", failed_)
                       .with_remedy("run it with --no-sandbox if this kernel has no seccomp filters"));
  }

 private:
  void add(std::uint32_t action, int call, std::initializer_list<scmp_arg_cmp> conditions) {
    // What another architecture has and this one has not, the library says by a number below 0.
    if (!context_ || call < 0) return;
    note(::seccomp_rule_add_array(context_.get(), action, call, static_cast<unsigned>(conditions.size()),
                                  std::data(conditions)));
  }
  void note(int result) {
    if (result < 0 && failed_ == 0) failed_ = -result;
  }

  std::unique_ptr<void, decltype(&::seccomp_release)> context_;
  int failed_ = 0;
};

constexpr std::uint64_t kLow32 = 0xffffffff;

void allow_memory(Filter& filter) {
  filter.allow({SCMP_SYS(brk), SCMP_SYS(munmap), SCMP_SYS(mremap), SCMP_SYS(madvise), SCMP_SYS(mlock),
                SCMP_SYS(mlock2), SCMP_SYS(munlock), SCMP_SYS(mincore), SCMP_SYS(membarrier)});
  // Nothing that was written becomes code.
  filter.allow_where(SCMP_SYS(mmap), 2, PROT_EXEC, 0);
  filter.allow_where(SCMP_SYS(mprotect), 2, PROT_EXEC, 0);
}

void allow_files(Filter& filter) {
  filter.allow({SCMP_SYS(read),      SCMP_SYS(readv),      SCMP_SYS(pread64),      SCMP_SYS(preadv),
                SCMP_SYS(preadv2),   SCMP_SYS(write),      SCMP_SYS(writev),       SCMP_SYS(pwrite64),
                SCMP_SYS(pwritev),   SCMP_SYS(lseek),      SCMP_SYS(close),        SCMP_SYS(close_range),
                SCMP_SYS(open),      SCMP_SYS(openat),     SCMP_SYS(openat2),      SCMP_SYS(stat),
                SCMP_SYS(lstat),     SCMP_SYS(fstat),      SCMP_SYS(newfstatat),   SCMP_SYS(statx),
                SCMP_SYS(fstatfs),   SCMP_SYS(access),     SCMP_SYS(faccessat),    SCMP_SYS(faccessat2),
                SCMP_SYS(readlink),  SCMP_SYS(readlinkat), SCMP_SYS(getcwd),       SCMP_SYS(getdents64),
                SCMP_SYS(fcntl),     SCMP_SYS(flock),      SCMP_SYS(dup),          SCMP_SYS(dup2),
                SCMP_SYS(dup3),      SCMP_SYS(pipe2),      SCMP_SYS(memfd_create), SCMP_SYS(ftruncate),
                SCMP_SYS(fallocate), SCMP_SYS(fadvise64),  SCMP_SYS(readahead),    SCMP_SYS(fchmod),
                SCMP_SYS(unlink),    SCMP_SYS(unlinkat)});
}

void allow_sockets(Filter& filter) {
  filter.allow({SCMP_SYS(bind), SCMP_SYS(listen), SCMP_SYS(accept), SCMP_SYS(accept4), SCMP_SYS(connect),
                SCMP_SYS(sendmsg), SCMP_SYS(sendto), SCMP_SYS(recvmsg), SCMP_SYS(recvfrom),
                SCMP_SYS(getsockopt), SCMP_SYS(setsockopt), SCMP_SYS(getsockname), SCMP_SYS(getpeername),
                SCMP_SYS(shutdown)});
  filter.allow_where(SCMP_SYS(socket), 0, kLow32, AF_UNIX);
  filter.allow_where(SCMP_SYS(socketpair), 0, kLow32, AF_UNIX);
}

void allow_waiting(Filter& filter) {
  filter.allow({SCMP_SYS(epoll_create1),   SCMP_SYS(epoll_ctl),     SCMP_SYS(epoll_wait),
                SCMP_SYS(epoll_pwait),     SCMP_SYS(epoll_pwait2),  SCMP_SYS(poll),
                SCMP_SYS(ppoll),           SCMP_SYS(eventfd2),      SCMP_SYS(timerfd_create),
                SCMP_SYS(timerfd_settime), SCMP_SYS(signalfd4),     SCMP_SYS(nanosleep),
                SCMP_SYS(clock_nanosleep), SCMP_SYS(clock_gettime), SCMP_SYS(clock_getres),
                SCMP_SYS(gettimeofday),    SCMP_SYS(time),          SCMP_SYS(restart_syscall),
                SCMP_SYS(futex),           SCMP_SYS(sched_yield),   SCMP_SYS(getrandom)});
}

void allow_threads(Filter& filter) {
  // clone3(2) has its flags in memory, where a filter does not see them; without it libraries use clone(2).
  filter.allow_where(SCMP_SYS(clone), 0, CLONE_THREAD, CLONE_THREAD);
  filter.allow({SCMP_SYS(set_robust_list),
                SCMP_SYS(get_robust_list),
                SCMP_SYS(rseq),
                SCMP_SYS(set_tid_address),
                SCMP_SYS(exit),
                SCMP_SYS(exit_group),
                SCMP_SYS(gettid),
                SCMP_SYS(getpid),
                SCMP_SYS(getppid),
                SCMP_SYS(getuid),
                SCMP_SYS(geteuid),
                SCMP_SYS(getgid),
                SCMP_SYS(getegid),
                SCMP_SYS(sched_getaffinity),
                SCMP_SYS(sched_setaffinity),
                SCMP_SYS(sched_getscheduler),
                SCMP_SYS(sched_getparam),
                SCMP_SYS(sched_setscheduler),
                SCMP_SYS(getpriority),
                SCMP_SYS(setpriority),
                SCMP_SYS(getcpu),
                SCMP_SYS(getrusage),
                SCMP_SYS(rt_sigaction),
                SCMP_SYS(rt_sigprocmask),
                SCMP_SYS(rt_sigreturn),
                SCMP_SYS(rt_sigtimedwait),
                SCMP_SYS(sigaltstack),
                SCMP_SYS(tgkill),
                SCMP_SYS(capget),
                SCMP_SYS(sysinfo),
                SCMP_SYS(uname),
                SCMP_SYS(getrlimit)});
  // Limits are read, and stay what they are.
  filter.allow_where(SCMP_SYS(prlimit64), 2, ~std::uint64_t{0}, 0);
  for (const int question :
       {PR_GET_SECCOMP, PR_GET_DUMPABLE, PR_GET_NO_NEW_PRIVS, PR_SET_NAME, PR_GET_NAME, PR_SET_VMA})
    filter.allow_where(SCMP_SYS(prctl), 0, kLow32, static_cast<std::uint64_t>(question));
}

void allow_clients(Filter& filter) {
  filter.allow({SCMP_SYS(pidfd_open)});
  for (const std::uint64_t signal :
       {std::uint64_t{0}, std::uint64_t{SIGKILL}, std::uint64_t{SIGSTOP}, std::uint64_t{SIGCONT}})
    filter.allow_where(SCMP_SYS(pidfd_send_signal), 1, kLow32, signal);
  for (const std::uint64_t request : kServingRequests)
    filter.allow_where(SCMP_SYS(ioctl), 1, kLow32, request);
  // Whether the log is a terminal.
  filter.allow_where(SCMP_SYS(ioctl), 1, kLow32, TCGETS);
}

void forbid_takeovers(Filter& filter) {
  filter.forbid({SCMP_SYS(execve),
                 SCMP_SYS(execveat),
                 SCMP_SYS(ptrace),
                 SCMP_SYS(process_vm_readv),
                 SCMP_SYS(process_vm_writev),
                 SCMP_SYS(pidfd_getfd),
                 SCMP_SYS(userfaultfd),
                 SCMP_SYS(bpf),
                 SCMP_SYS(perf_event_open),
                 SCMP_SYS(io_uring_setup),
                 SCMP_SYS(io_uring_register),
                 SCMP_SYS(init_module),
                 SCMP_SYS(finit_module),
                 SCMP_SYS(delete_module),
                 SCMP_SYS(kexec_load),
                 SCMP_SYS(kexec_file_load),
                 SCMP_SYS(mount),
                 SCMP_SYS(umount2),
                 SCMP_SYS(move_mount),
                 SCMP_SYS(open_tree),
                 SCMP_SYS(fsopen),
                 SCMP_SYS(pivot_root),
                 SCMP_SYS(chroot),
                 SCMP_SYS(setns),
                 SCMP_SYS(unshare),
                 SCMP_SYS(setuid),
                 SCMP_SYS(setgid),
                 SCMP_SYS(setresuid),
                 SCMP_SYS(setresgid),
                 SCMP_SYS(setgroups),
                 SCMP_SYS(capset),
                 SCMP_SYS(swapon),
                 SCMP_SYS(swapoff),
                 SCMP_SYS(reboot),
                 SCMP_SYS(add_key),
                 SCMP_SYS(request_key),
                 SCMP_SYS(keyctl),
                 SCMP_SYS(open_by_handle_at),
                 SCMP_SYS(mknod),
                 SCMP_SYS(mknodat)});
}

}  // namespace

Result<void> drop_privileges() {
  if (auto kept = keep_capabilities(); !kept) return kept;
  if (::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0)
    return Failure(Error::from_errno("give up new privileges", errno));
  if (::prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0)
    return Failure(Error::from_errno("close this process to others of its user", errno));
  return {};
}

Result<void> filter_system_calls(ReplacesFiles replaces_files, ReadsByRing reads_by_ring) {
  Filter filter;
  // Not those that make rings and say what these may do: what a ring does, this filter does not see.
  if (reads_by_ring == ReadsByRing::yes) filter.allow({SCMP_SYS(io_uring_enter)});
  if (replaces_files == ReplacesFiles::yes)
    filter.allow({SCMP_SYS(fdatasync), SCMP_SYS(linkat), SCMP_SYS(renameat), SCMP_SYS(renameat2)});
  allow_memory(filter);
  allow_files(filter);
  allow_sockets(filter);
  allow_waiting(filter);
  allow_threads(filter);
  allow_clients(filter);
  forbid_takeovers(filter);
  return filter.load();
}

nlohmann::json confinement() {
  nlohmann::json kept = nlohmann::json::array();
  const Result<Sets> sets = capabilities();
  for (unsigned number = 0; sets && number < kCapabilitiesMax; ++number) {
    if (!is_in(*sets, number)) continue;
    const auto* known = std::ranges::find_if(
        kKept, [&](const Capability& capability) { return capability.number == number; });
    kept.push_back(known != std::end(kKept) ? known->name : fmt::format("{}", number));
  }
  return {{"system_calls_filtered", ::prctl(PR_GET_SECCOMP, 0, 0, 0, 0) == SECCOMP_MODE_FILTER},
          {"no_new_privileges", ::prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1},
          {"closed_to_own_user", ::prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0},
          {"capabilities", std::move(kept)}};
}

}  // namespace uffdkit
