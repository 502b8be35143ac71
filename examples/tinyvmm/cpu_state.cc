#include "cpu_state.h"

#include <cstring>

extern "C" {
extern const std::byte guest_code[];
extern const std::byte guest_awake[];
extern const std::byte guest_code_end[];
}

namespace tinyvmm {

std::span<const std::byte> guest_code() {
  return {::guest_code, ::guest_code_end};
}

void load_guest_code(const GuestMemory& memory, const GuestLayout& layout) {
  std::memcpy(memory.at(layout.code()), ::guest_code, guest_code().size());
}

CpuState cpu_before_fill(const GuestLayout& layout) {
  CpuState cpu{};
  cpu.registers.rip = layout.code();
  cpu.registers.rflags = 2;  // the bit that is always set
  cpu.registers.rbx = layout.increment();
  cpu.registers.rcx = layout.nodes_end();
  cpu.registers.rbp = layout.mask();
  cpu.registers.rdi = layout.salt();

  // Every segment covers all 4 GiB. A segment's hidden part is set here, so the guest needs no descriptor
  // table.
  kvm_segment data{};
  data.limit = 0xffffffff;
  data.selector = 0x10;
  data.type = 3;  // read, write, accessed
  data.present = 1;
  data.s = 1;
  data.db = 1;
  data.g = 1;
  kvm_segment code = data;
  code.selector = 0x08;
  code.type = 11;  // execute, read, accessed
  kvm_segment task{};
  task.limit = 0xffff;
  task.type = 11;  // busy 32-bit task
  task.present = 1;
  kvm_segment local_table = task;
  local_table.type = 2;

  kvm_sregs& segments = cpu.segments;
  segments.cs = code;
  segments.ds = segments.es = segments.fs = segments.gs = segments.ss = data;
  segments.tr = task;
  segments.ldt = local_table;
  segments.cr0 = 0x11;              // protected mode, with a floating-point unit
  segments.apic_base = 0xfee00900;  // as after a reset: enabled, first processor
  return cpu;
}

CpuState cpu_after_fill(const GuestLayout& layout) {
  CpuState cpu = cpu_before_fill(layout);
  cpu.registers.rip = layout.code() + static_cast<std::uint64_t>(::guest_awake - ::guest_code);
  return cpu;
}

}  // namespace tinyvmm
