#include "layout.h"

#include <bit>

namespace tinyvmm {

Result<GuestLayout> GuestLayout::plan(std::uint64_t memory_bytes, unsigned zero_percent, std::uint32_t seed) {
  if (zero_percent > 90)
    return failure("{} % of zero pages leave too few for the nodes: at most 90", zero_percent);
  const std::uint64_t pages = memory_bytes / kPageBytes;
  const std::uint64_t zero_pages = pages * zero_percent / 100;
  return from_state(memory_bytes, static_cast<std::uint32_t>(pages - zero_pages - 1), seed);
}

Result<GuestLayout> GuestLayout::from_state(std::uint64_t memory_bytes, std::uint32_t node_pages,
                                            std::uint32_t seed) {
  if (memory_bytes < kMemoryBytesMin || memory_bytes > kMemoryBytesMax ||
      memory_bytes % kHugePageBytes != 0) {
    return failure(
        "a guest cannot have {} bytes of memory: it must be a multiple of 2 MiB, from 2 MiB to 3 GiB",
        memory_bytes);
  }
  if (node_pages == 0 || node_pages > memory_bytes / kPageBytes - 1) {
    return failure("{} pages of nodes do not fit in {} bytes of memory", node_pages, memory_bytes);
  }
  return GuestLayout(static_cast<std::uint32_t>(memory_bytes), node_pages, seed);
}

std::uint32_t GuestLayout::mask() const {
  return static_cast<std::uint32_t>(std::bit_ceil(std::uint64_t{nodes_end()}) - 1);
}

GuestAddress GuestLayout::next(GuestAddress node) const {
  do {
    node = (node * GUEST_MULTIPLIER + increment()) & mask();
  } while (node >= nodes_end());
  return node;
}

std::uint32_t GuestLayout::check_word(GuestAddress node, GuestAddress next) const {
  return (node * GUEST_MIX ^ salt()) + next;
}

}  // namespace tinyvmm
