// Where a session's memory lies in its client's address space, and which part of which region each piece
// shows.
//
// A client starts with whole regions. munmap(2) and mremap(2) cut and move them, so that the layout is a list
// of segments: each maps a run of a region's granules at an address, or, where mremap(2) left an emptied
// range behind, stands for memory that reads as zero. Pure: no kernel, no I/O. Threads: none; owned by one
// session. Invariants: segments are sorted by address and do not overlap, and none could be joined with the
// one before it; starts and lengths are multiples of 4096.
#pragma once

#include <uffdkit/units.h>

#include <cstdint>
#include <span>
#include <vector>

namespace uffdkit {

// A region's number within its session.
using RegionId = std::uint32_t;
// Memory without an image behind it.
inline constexpr RegionId kZeroRegion = 0xffffffff;

struct Segment {
  AddressRange memory;
  RegionId region;
  PageSize page_size;
  PageIndex first;  // the granule of the region at memory.start; meaningless for kZeroRegion

  // The granule at `address`, which lies in the segment.
  PageIndex granule_at(Address address) const { return first + kPage4K.pages(address - memory.start); }
  // The address of `granule`, which lies in the segment.
  Address address_of(PageIndex granule) const { return memory.start + kPage4K.bytes(granule - first); }
  PageRange granules() const { return {first, kPage4K.pages(memory.length)}; }
};

// A run of one region's granules.
struct RegionPart {
  RegionId region;
  PageRange granules;
};

class Layout {
 public:
  std::span<const Segment> segments() const { return segments_; }

  // The segment that holds `address`; nullptr if there is none.
  const Segment* find(Address address) const {
    // The next fault is most often in the segment of the last one.
    if (last_found_ < segments_.size() && segments_[last_found_].memory.contains(address))
      return &segments_[last_found_];
    return search(address);
  }

  // The granules of regions that lie in `memory`, in address order.
  std::vector<RegionPart> parts_in(AddressRange memory) const;

  // Adds a segment, joining it with its neighbours where it goes on; whatever lay there before is forgotten.
  void add(const Segment& segment);

  // Forgets what lies in `memory`, cutting segments at its ends.
  void erase(AddressRange memory);

  // What mremap(2) did: what lay in `from` lies at `to` now, and what is left behind, if it is still mapped
  // (MREMAP_DONTUNMAP), reads as zero; an UNMAP event says if it is not.
  void move(AddressRange from, Address to);

 private:
  struct IndexRange {
    std::size_t first;
    std::size_t last;  // exclusive
  };
  const Segment* search(Address address) const;
  IndexRange overlapping(AddressRange memory) const;
  // Takes what lies in `memory` out of the layout, and returns it.
  std::vector<Segment> cut(AddressRange memory);

  std::vector<Segment> segments_;
  mutable std::size_t last_found_ = 0;  // may be any number
};

}  // namespace uffdkit
