// Addresses to put a mapping at, where the kernel asks for an alignment that mmap(2) alone does not give.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>

namespace uffdkit {

// Takes `bytes` of this process's addresses, from one on that is `remainder` but for a multiple of
// `alignment`. All three are multiples of 4096. Nothing can be touched there until something is mapped over
// it (MAP_FIXED); the caller unmaps it. MAP_FAILED and errno as of mmap(2). Threads: any.
inline void* take_addresses(std::size_t bytes, std::size_t alignment, std::uint64_t remainder = 0) {
  void* const taken =
      ::mmap(nullptr, bytes + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (taken == MAP_FAILED) return taken;
  auto* const start = static_cast<std::byte*>(taken);
  const std::uint64_t before = (remainder - reinterpret_cast<std::uintptr_t>(start)) % alignment;
  if (before != 0) ::munmap(start, before);
  ::munmap(start + before + bytes, alignment - before);
  return start + before;
}

}  // namespace uffdkit
