// Where things are in the guest's memory, and what the guest's data must be: the monitor's own knowledge of
// what guest.S does, against which the guest's reports are held.
//
//   0 ............ nodes_end ............ code ....... memory
//   node pages     pages that stay zero   one page of code
#pragma once

#include <cstdint>

#include "guest_abi.h"
#include "result.h"

namespace tinyvmm {

using GuestAddress = std::uint32_t;

constexpr std::uint32_t kPageBytes = 4096;
constexpr std::uint32_t kHugePageBytes = 2 * 1024 * 1024;
constexpr std::uint64_t kMemoryBytesMin = kHugePageBytes;
constexpr std::uint64_t kMemoryBytesMax = 3ULL << 30;  // above it are the addresses that KVM needs for itself

struct PageSpan {
  GuestAddress first;
  std::uint32_t pages;
};

class GuestLayout {
 public:
  /// memory_bytes: a multiple of 2 MiB from kMemoryBytesMin to kMemoryBytesMax. zero_percent: 0 to 90.
  static Result<GuestLayout> plan(std::uint64_t memory_bytes, unsigned zero_percent, std::uint32_t seed);
  /// The same from the values that a state file keeps.
  static Result<GuestLayout> from_state(std::uint64_t memory_bytes, std::uint32_t node_pages,
                                        std::uint32_t seed);

  std::uint32_t memory_bytes() const { return memory_bytes_; }
  std::uint32_t seed() const { return seed_; }
  std::uint32_t node_pages() const { return node_pages_; }
  GuestAddress nodes_end() const { return node_pages_ * kPageBytes; }
  PageSpan zero_pages() const { return {nodes_end(), (code() - nodes_end()) / kPageBytes}; }
  GuestAddress code() const { return memory_bytes_ - kPageBytes; }

  // What the guest gets in registers.
  std::uint32_t increment() const { return (seed_ * 2 + 1) * kPageBytes; }
  std::uint32_t salt() const { return seed_ * 0x85ebca6bU | 1U; }
  std::uint32_t mask() const;

  GuestAddress next(GuestAddress node) const;
  std::uint32_t check_word(GuestAddress node, GuestAddress next) const;

 private:
  GuestLayout(std::uint32_t memory_bytes, std::uint32_t node_pages, std::uint32_t seed)
      : memory_bytes_(memory_bytes), node_pages_(node_pages), seed_(seed) {}

  std::uint32_t memory_bytes_;
  std::uint32_t node_pages_;
  std::uint32_t seed_;
};

}  // namespace tinyvmm
