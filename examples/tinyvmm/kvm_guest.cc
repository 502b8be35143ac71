#include "kvm_guest.h"

#include <fcntl.h>
#include <linux/kvm.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <cerrno>

namespace tinyvmm {
namespace {

constexpr char kDevice[] = "/dev/kvm";
constexpr std::uint64_t kTaskStateAddress =
    0xfffbd000;  // three pages that KVM needs on some Intel processors

std::unexpected<std::string> kvm_failure(const char* request) {
  return failure("{} failed: {}", request, reason(errno));
}

class KvmGuest final : public Guest {
 public:
  explicit KvmGuest(const GuestLayout& layout) : layout_(layout) {}
  KvmGuest(const KvmGuest&) = delete;
  KvmGuest& operator=(const KvmGuest&) = delete;
  ~KvmGuest() override {
    if (run_ != nullptr) munmap(run_, run_bytes_);
  }

  Result<void> build(const GuestMemory& memory, const CpuState& cpu);

  Result<CpuState> fill() override;
  Result<void> wake() override;
  Result<Walked> walk(GuestAddress start, std::uint32_t nodes) override;
  Result<void> check_zero(PageSpan span) override;

 private:
  Result<void> expect_port(std::uint16_t port);
  Result<std::uint16_t> run_until_out();
  std::unexpected<std::string> stopped(const std::string& why);
  Result<void> finish_out();
  Result<void> request(kvm_regs values);

  GuestLayout layout_;
  Fd system_;
  Fd machine_;
  Fd cpu_;
  kvm_run* run_ = nullptr;
  std::size_t run_bytes_ = 0;
  kvm_regs registers_{};  // as they were at the last OUT
};

Result<void> KvmGuest::build(const GuestMemory& memory, const CpuState& cpu) {
  system_ = Fd(open(kDevice, O_RDWR | O_CLOEXEC));
  if (!system_) return failure("cannot open {}: {}", kDevice, reason(errno));
  if (ioctl(system_.get(), KVM_CHECK_EXTENSION, KVM_CAP_IMMEDIATE_EXIT) <= 0) {
    return failure("this kernel's KVM lacks KVM_CAP_IMMEDIATE_EXIT: Linux 4.13 or later is needed");
  }
  machine_ = Fd(ioctl(system_.get(), KVM_CREATE_VM, 0));
  if (!machine_) return kvm_failure("KVM_CREATE_VM");
  if (ioctl(machine_.get(), KVM_SET_TSS_ADDR, kTaskStateAddress) != 0) return kvm_failure("KVM_SET_TSS_ADDR");

  std::uint32_t slot = 0;
  for (const MemoryRegion& region : memory.regions()) {
    kvm_userspace_memory_region slot_region{};
    slot_region.slot = slot++;
    slot_region.guest_phys_addr = region.offset;
    slot_region.memory_size = region.size;
    slot_region.userspace_addr = reinterpret_cast<std::uintptr_t>(region.host);
    if (ioctl(machine_.get(), KVM_SET_USER_MEMORY_REGION, &slot_region) != 0) {
      return kvm_failure("KVM_SET_USER_MEMORY_REGION");
    }
  }

  cpu_ = Fd(ioctl(machine_.get(), KVM_CREATE_VCPU, 0));
  if (!cpu_) return kvm_failure("KVM_CREATE_VCPU");
  const int run_bytes = ioctl(system_.get(), KVM_GET_VCPU_MMAP_SIZE, 0);
  if (run_bytes < 0) return kvm_failure("KVM_GET_VCPU_MMAP_SIZE");
  void* const run =
      mmap(nullptr, static_cast<std::size_t>(run_bytes), PROT_READ | PROT_WRITE, MAP_SHARED, cpu_.get(), 0);
  if (run == MAP_FAILED) return kvm_failure("mapping the virtual CPU");
  run_ = static_cast<kvm_run*>(run);
  run_bytes_ = static_cast<std::size_t>(run_bytes);

  kvm_sregs segments = cpu.segments;
  kvm_regs registers = cpu.registers;
  if (ioctl(cpu_.get(), KVM_SET_SREGS, &segments) != 0) return kvm_failure("KVM_SET_SREGS");
  if (ioctl(cpu_.get(), KVM_SET_REGS, &registers) != 0) return kvm_failure("KVM_SET_REGS");
  return {};
}

Result<CpuState> KvmGuest::fill() {
  if (Result<void> filled = expect_port(GUEST_PORT_FILLED); !filled) return std::unexpected(filled.error());
  CpuState cpu{};
  cpu.registers = registers_;
  if (ioctl(cpu_.get(), KVM_GET_SREGS, &cpu.segments) != 0) return kvm_failure("KVM_GET_SREGS");
  return cpu;
}

Result<void> KvmGuest::wake() {
  return expect_port(GUEST_PORT_AWAKE);
}

Result<Walked> KvmGuest::walk(GuestAddress start, std::uint32_t nodes) {
  kvm_regs values{};
  values.rax = GUEST_REQUEST_WALK;
  values.rsi = start;
  values.rcx = nodes;
  values.rdi = layout_.salt();
  if (Result<void> done = request(values); !done) return std::unexpected(done.error());
  return Walked{.next = static_cast<GuestAddress>(registers_.rsi),
                .checksum = static_cast<std::uint32_t>(registers_.rbp)};
}

Result<void> KvmGuest::check_zero(PageSpan span) {
  if (span.pages == 0) return {};
  kvm_regs values{};
  values.rax = GUEST_REQUEST_ZERO;
  values.rsi = span.first;
  values.rcx = span.pages;
  return request(values);
}

// Sets the general registers of a guest that takes requests, and runs it until it has done what they say.
Result<void> KvmGuest::request(kvm_regs values) {
  values.rip = registers_.rip;
  values.rflags = registers_.rflags;
  if (ioctl(cpu_.get(), KVM_SET_REGS, &values) != 0) return kvm_failure("KVM_SET_REGS");
  return expect_port(GUEST_PORT_DONE);
}

Result<void> KvmGuest::expect_port(std::uint16_t port) {
  Result<std::uint16_t> got = run_until_out();
  if (!got) return std::unexpected(got.error());
  if (Result<void> finished = finish_out(); !finished) return finished;
  if (*got == GUEST_PORT_WRONG) {
    return std::unexpected(describe({.address = static_cast<GuestAddress>(registers_.rsi),
                                     .expected = static_cast<std::uint32_t>(registers_.rdx),
                                     .found = static_cast<std::uint32_t>(registers_.rbx),
                                     .first_word = static_cast<std::uint32_t>(registers_.rax)}));
  }
  if (*got != port) {
    return failure(
        "the guest reported at port {:#x} instead of {:#x}: this is not the code of this program's guest",
        *got, port);
  }
  return {};
}

Result<std::uint16_t> KvmGuest::run_until_out() {
  while (ioctl(cpu_.get(), KVM_RUN, 0) != 0) {
    if (errno == EINTR) continue;
    const bool no_page = errno == EFAULT || errno == EHWPOISON;
    return stopped(
        fmt::format("{}{}", reason(errno), no_page ? "; a page of its memory could not be had" : ""));
  }
  switch (run_->exit_reason) {
    case KVM_EXIT_IO:
      if (run_->io.direction == KVM_EXIT_IO_OUT) return run_->io.port;
      return stopped(fmt::format("it reads port {:#x}", run_->io.port));
    case KVM_EXIT_MMIO:
      // Some KVMs take a page that cannot be read, a poisoned one for instance, for a device.
      return stopped(fmt::format("{} {:#x}",
                                 run_->mmio.phys_addr < layout_.memory_bytes()
                                     ? "it was not given the page of"
                                     : "it left its memory and touched",
                                 run_->mmio.phys_addr));
    case KVM_EXIT_HLT:
      return stopped("it halted unasked");
    case KVM_EXIT_SHUTDOWN:
      return stopped("its processor shut down (triple fault)");
    case KVM_EXIT_INTERNAL_ERROR:
      return stopped(
          fmt::format("KVM cannot run what it finds there (internal error {})", run_->internal.suberror));
    default:
      return stopped(fmt::format("KVM gives exit reason {}", run_->exit_reason));
  }
}

// A guest that ended anywhere but at an OUT: where it was, and on which page it worked.
std::unexpected<std::string> KvmGuest::stopped(const std::string& why) {
  kvm_regs registers{};
  if (ioctl(cpu_.get(), KVM_GET_REGS, &registers) != 0) return failure("the guest cannot go on: {}", why);
  return failure("the guest cannot go on at {:#x}, esi {:#x}: {}", registers.rip, registers.rsi, why);
}

// An OUT is complete, and registers may be read and set, only after KVM was entered again
// (Documentation/virt/kvm/api.rst, KVM_EXIT_IO); immediate_exit makes it return before the next instruction.
Result<void> KvmGuest::finish_out() {
  run_->immediate_exit = 1;
  const bool entered = ioctl(cpu_.get(), KVM_RUN, 0) != 0 && errno == EINTR;
  run_->immediate_exit = 0;
  if (!entered) return failure("KVM did not return at once when it completed an OUT");
  if (ioctl(cpu_.get(), KVM_GET_REGS, &registers_) != 0) return kvm_failure("KVM_GET_REGS");
  return {};
}

}  // namespace

Result<bool> kvm_is_here() {
  if (Fd device(open(kDevice, O_RDWR | O_CLOEXEC)); device) return true;
  switch (errno) {
    case ENOENT:
    case ENODEV:
    case ENXIO:
      return false;
    case EACCES:
    case EPERM:
      return failure(
          "no permission to use {0}. Either\n"
          "  join its group:  usermod -aG kvm $USER   (then log in again)\n"
          "  or get an ACL:   setfacl -m u:$USER:rw {0}\n"
          "  or do without:   --no-kvm runs the guest as threads of this process",
          kDevice);
    default:
      return failure("cannot open {}: {} (--no-kvm does without)", kDevice, reason(errno));
  }
}

Result<std::unique_ptr<Guest>> make_kvm_guest(const GuestMemory& memory, const GuestLayout& layout,
                                              const CpuState& cpu) {
  auto guest = std::make_unique<KvmGuest>(layout);
  if (Result<void> built = guest->build(memory, cpu); !built) return std::unexpected(built.error());
  return guest;
}

}  // namespace tinyvmm
