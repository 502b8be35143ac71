// Where a session's memory lies in its client's address space, and which part of which region each piece
// shows.
//
// A client starts with whole regions. munmap(2) and mremap(2) cut and move them, so that the layout is a list
// of segments: each maps a run of a region's granules at an address, or stands for memory that reads as zero.
// Shared memory of a file may be mapped at several addresses, so a granule may be in several segments. Pure:
// no kernel, no I/O. Threads: none; owned by one session. Invariants: segments are sorted by address and do
// not overlap, and none could be joined with the one before it; starts and lengths are multiples of 4096.
#pragma once

#include <uffdkit/units.h>

#include <cstdint>
#include <functional>
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
  // mremap(2) has left it behind, and the granules are elsewhere: where the memory is the client's own, this
  // is empty; where it is a file's, the same granules still. Which of these nobody has told yet.
  bool left_behind = false;

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

  // The granules of regions that lie in `memory`, in address order; none of what was left behind.
  std::vector<RegionPart> parts_in(AddressRange memory) const;

  // Adds a segment, joining it with its neighbours where it goes on; whatever lay there before is forgotten.
  void add(const Segment& segment);

  // Forgets what lies in `memory`, cutting segments at its ends.
  void erase(AddressRange memory);

  // What mremap(2) did: what lay in `from` lies at `to` now. An UNMAP event says if it is not mapped at
  // `from` any more; else (MREMAP_DONTUNMAP) that is left behind, or zero where no file can be
  // (`may_be_file`).
  void move(AddressRange from, Address to, const std::function<bool(RegionId)>& may_be_file);

  // Adds as much of the segment as lies before the next one; nothing if its start is taken.
  void add_where_free(Segment segment);

  // It has turned out what a segment that was left behind is: a file's memory, or empty.
  void settle(Address left_behind, bool is_file);

  // A segment that maps the granule, and was not left behind; nullptr if there is none.
  const Segment* find(RegionId region, PageIndex granule) const;

  // The last segment that ends at the address or before; nullptr if there is none.
  const Segment* last_before(Address address) const;

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
