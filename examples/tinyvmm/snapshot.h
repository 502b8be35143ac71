// A snapshot on disk: two files in a directory.
//
// vm.mem    the guest's memory as it is, byte for byte; all-zero pages are left as holes.
// vm.state  what else there is, in the byte order of the machine, x86-64:
//   0    8    "TINYVMM" and a newline
//   8    4    version of this format: 1
//   12   4    bytes in this file: 504
//   16   8    bytes of guest memory, which is also the size of vm.mem
//   24   4    node pages (see layout.h)
//   28   4    seed
//   32   144  struct kvm_regs of <linux/kvm.h>
//   176  312  struct kvm_sregs
//   488  8    zero
//   496  8    FNV-1a, 64 bits, of all bytes before
#pragma once

#include <cstdint>
#include <filesystem>

#include "cpu_state.h"
#include "layout.h"
#include "memory.h"
#include "result.h"

namespace tinyvmm {

inline constexpr char kMemoryFile[] = "vm.mem";
inline constexpr char kStateFile[] = "vm.state";

struct SavedMachine {
  GuestLayout layout;
  CpuState cpu;
};

/// Writes both files into `directory`, which is made if it is not there; an older snapshot in it is replaced.
/// vm.state comes last: where it is, the snapshot is whole. Returns the bytes written to vm.mem.
Result<std::uint64_t> save_snapshot(const std::filesystem::path& directory, const SavedMachine& machine,
                                    const GuestMemory& memory);

/// Reads vm.state and checks all that it says.
Result<SavedMachine> load_state(const std::filesystem::path& directory);

/// Is vm.mem there, in the right size? An error says what is wrong.
Result<void> check_memory_file(const std::filesystem::path& directory, const GuestLayout& layout);

/// Reads all of vm.mem into the guest's memory.
Result<void> read_memory_file(const std::filesystem::path& directory, const GuestMemory& memory);

}  // namespace tinyvmm
