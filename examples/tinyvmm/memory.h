// The guest's memory as mappings of this process: one, or several as monitors have that leave a hole for
// devices. To the guest it is one piece, from address 0 up.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "layout.h"
#include "result.h"

namespace tinyvmm {

struct MemoryRegion {
  std::byte* host;
  std::uint64_t size;
  std::uint64_t offset;  // guest address, and position in the snapshot's memory file
};

class GuestMemory {
 public:
  /// Anonymous private memory, nothing of it present yet. region_count: 1 to the number of 2 MiB pieces.
  /// With huge pages the whole size is reserved from the pool, so a small pool is an error here and not
  /// later.
  static Result<GuestMemory> map(std::uint64_t bytes, unsigned region_count, bool huge_pages);

  GuestMemory(GuestMemory&& other) noexcept = default;
  GuestMemory& operator=(GuestMemory&&) = delete;
  ~GuestMemory();

  std::span<const MemoryRegion> regions() const { return regions_; }
  std::uint64_t size() const { return size_; }
  std::uint32_t page_bytes() const { return page_bytes_; }

  /// Where a guest address is; bytes beyond its page may be in another region.
  std::byte* at(GuestAddress address) const;
  /// The 32-bit word at a guest address, as the guest's processor would access it: every access really
  /// happens.
  volatile std::uint32_t& word(GuestAddress address) const;

  /// Gives the pages back to the host, as a balloon does: they must read as zero from now on.
  /// With a userfaultfd that has EVENT_REMOVE this returns only after its handler has read the event.
  Result<void> discard(GuestAddress first, std::uint64_t bytes) const;

 private:
  struct Reservation {
    void* start;
    std::size_t size;
  };

  GuestMemory(std::uint64_t size, std::uint32_t page_bytes) : size_(size), page_bytes_(page_bytes) {}

  std::uint64_t size_;
  std::uint32_t page_bytes_;
  std::vector<MemoryRegion> regions_;
  std::vector<Reservation> reservations_;
};

}  // namespace tinyvmm
