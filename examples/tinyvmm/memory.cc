#include "memory.h"

#include <linux/mman.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

namespace tinyvmm {

Result<GuestMemory> GuestMemory::map(std::uint64_t bytes, unsigned region_count, bool huge_pages) {
  const std::uint64_t pieces = bytes / kHugePageBytes;
  if (region_count == 0 || region_count > pieces) {
    return failure("{} bytes of memory can be had in 1 to {} regions, not in {}", bytes, pieces,
                   region_count);
  }
  GuestMemory memory(bytes, huge_pages ? kHugePageBytes : kPageBytes);
  const std::uint64_t region_size = pieces / region_count * kHugePageBytes;
  for (unsigned i = 0; i < region_count; ++i) {
    const std::uint64_t offset = i * region_size;
    const std::uint64_t size = i + 1 == region_count ? bytes - offset : region_size;

    // A larger piece of address space is taken first and the region put inside it: that gives alignment, and
    // a gap between any two regions, without which the kernel might make one mapping of them.
    const std::size_t reserved = size + 2 * std::uint64_t{kHugePageBytes};
    void* const start =
        mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) {
      return failure("cannot get {} bytes of address space: {}", reserved, reason(errno));
    }
    memory.reservations_.push_back({start, reserved});
    std::byte* const gap = static_cast<std::byte*>(start) + 1;
    std::byte* const host = gap + (-reinterpret_cast<std::uintptr_t>(gap) & (kHugePageBytes - 1));

    const int kind = huge_pages ? MAP_HUGETLB | MAP_HUGE_2MB : MAP_NORESERVE;
    if (mmap(host, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | kind, -1, 0) ==
        MAP_FAILED) {
      if (huge_pages && errno == ENOMEM) {
        return failure(
            "there are not enough free huge pages for {} MiB of guest memory; make some with\n"
            "  sysctl vm.nr_hugepages={}   (times the number of clones)",
            bytes >> 20, bytes / kHugePageBytes);
      }
      return failure("cannot map {} bytes of guest memory: {}", size, reason(errno));
    }
    memory.regions_.push_back({host, size, offset});
  }
  return memory;
}

GuestMemory::~GuestMemory() {
  for (const Reservation& reservation : reservations_) munmap(reservation.start, reservation.size);
}

std::byte* GuestMemory::at(GuestAddress address) const {
  // All regions but the last have the size of the first.
  const std::size_t index = std::min<std::size_t>(address / regions_.front().size, regions_.size() - 1);
  const MemoryRegion& region = regions_[index];
  return region.host + (address - region.offset);
}

volatile std::uint32_t& GuestMemory::word(GuestAddress address) const {
  return *reinterpret_cast<volatile std::uint32_t*>(at(address));
}

Result<void> GuestMemory::discard(GuestAddress first, std::uint64_t bytes) const {
  for (const MemoryRegion& region : regions_) {
    const std::uint64_t from = std::max<std::uint64_t>(first, region.offset);
    const std::uint64_t to = std::min(first + bytes, region.offset + region.size);
    if (from >= to) continue;
    if (madvise(region.host + (from - region.offset), to - from, MADV_DONTNEED) != 0) {
      return failure("cannot give back {} bytes at guest address {:#x}: {}", to - from, from, reason(errno));
    }
  }
  return {};
}

}  // namespace tinyvmm
