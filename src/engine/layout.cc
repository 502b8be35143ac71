#include "engine/layout.h"

#include <algorithm>
#include <optional>

namespace uffdkit {
namespace {

// The part of `segment` that lies in `memory`.
std::optional<Segment> intersection(const Segment& segment, AddressRange memory) {
  if (!segment.memory.overlaps(memory)) return std::nullopt;
  const Address start = std::max(segment.memory.start, memory.start);
  const Address end = std::min(segment.memory.end(), memory.end());
  return Segment{.memory = {start, end - start},
                 .region = segment.region,
                 .page_size = segment.page_size,
                 .first = segment.granule_at(start),
                 .left_behind = segment.left_behind};
}

// Whether `next` goes on where `segment` ends, so that one segment can stand for both.
bool continues(const Segment& segment, const Segment& next) {
  return segment.memory.end() == next.memory.start && segment.region == next.region &&
         segment.page_size == next.page_size && segment.left_behind == next.left_behind &&
         (segment.region == kZeroRegion || segment.granules().end() == next.first);
}

// Events come in whole pages; a length that is not is a bug of somebody else, and is widened.
AddressRange whole_pages(AddressRange memory) {
  const Address start(kPage4K.round_down(memory.start.value));
  const Address end(kPage4K.round_down(memory.end().value + 4095));
  return {start, end - start};
}

}  // namespace

const Segment* Layout::search(Address address) const {
  const auto [first, last] = overlapping({address, ByteCount(1)});
  if (first == last) return nullptr;
  last_found_ = first;
  return &segments_[first];
}

Layout::IndexRange Layout::overlapping(AddressRange memory) const {
  const auto first = std::partition_point(segments_.begin(), segments_.end(), [&](const Segment& segment) {
    return segment.memory.end() <= memory.start;
  });
  const auto last = std::partition_point(
      first, segments_.end(), [&](const Segment& segment) { return segment.memory.start < memory.end(); });
  return {static_cast<std::size_t>(first - segments_.begin()),
          static_cast<std::size_t>(last - segments_.begin())};
}

std::vector<RegionPart> Layout::parts_in(AddressRange memory) const {
  memory = whole_pages(memory);
  std::vector<RegionPart> parts;
  const auto [first, last] = overlapping(memory);
  for (std::size_t i = first; i < last; ++i) {
    const auto part = intersection(segments_[i], memory);
    if (part && part->region != kZeroRegion && !part->left_behind)
      parts.push_back({.region = part->region, .granules = part->granules()});
  }
  return parts;
}

void Layout::add(const Segment& segment) {
  erase(segment.memory);
  const auto place = segments_.begin() + static_cast<std::ptrdiff_t>(overlapping(segment.memory).first);
  auto added = segments_.insert(place, segment);
  // What a client moves away and back in pieces becomes whole again; else it could make pieces without end.
  const auto next = added + 1;
  if (next != segments_.end() && continues(*added, *next)) {
    added->memory.length = added->memory.length + next->memory.length;
    segments_.erase(next);
  }
  if (added != segments_.begin() && continues(*(added - 1), *added)) {
    (added - 1)->memory.length = (added - 1)->memory.length + added->memory.length;
    segments_.erase(added);
  }
}

void Layout::erase(AddressRange memory) {
  cut(memory);
}

std::vector<Segment> Layout::cut(AddressRange memory) {
  if (memory.length.value == 0) return {};
  memory = whole_pages(memory);
  const auto [first, last] = overlapping(memory);
  std::vector<Segment> taken;
  std::vector<Segment> kept;
  for (std::size_t i = first; i < last; ++i) {
    const Segment& segment = segments_[i];
    const auto inside = intersection(segment, memory);
    if (!inside) continue;
    const AddressRange before{segment.memory.start, inside->memory.start - segment.memory.start};
    const AddressRange behind{inside->memory.end(), segment.memory.end() - inside->memory.end()};
    if (const auto rest = intersection(segment, before)) kept.push_back(*rest);
    taken.push_back(*inside);
    if (const auto rest = intersection(segment, behind)) kept.push_back(*rest);
  }
  const auto place = segments_.erase(segments_.begin() + static_cast<std::ptrdiff_t>(first),
                                     segments_.begin() + static_cast<std::ptrdiff_t>(last));
  segments_.insert(place, kept.begin(), kept.end());
  return taken;
}

void Layout::move(AddressRange from, Address to, const std::function<bool(RegionId)>& may_be_file) {
  const std::vector<Segment> moving = cut(from);
  for (const Segment& segment : moving) {
    Segment left = segment;
    left.left_behind = segment.region != kZeroRegion && may_be_file(segment.region);
    if (!left.left_behind) left.region = kZeroRegion;
    add(left);
  }
  for (Segment segment : moving) {
    segment.memory.start = to + (segment.memory.start - from.start);
    add(segment);
  }
}

void Layout::add_where_free(Segment segment) {
  const auto [first, last] = overlapping(segment.memory);
  if (first != last) {
    if (segments_[first].memory.start <= segment.memory.start) return;
    segment.memory.length = segments_[first].memory.start - segment.memory.start;
  }
  if (segment.memory.length.value > 0) add(segment);
}

void Layout::settle(Address left_behind, bool is_file) {
  const Segment* found = search(left_behind);
  if (found == nullptr || !found->left_behind) return;
  Segment settled = *found;
  settled.left_behind = false;
  if (!is_file) settled.region = kZeroRegion;
  add(settled);
}

const Segment* Layout::find(RegionId region, PageIndex granule) const {
  const auto maps = [&](const Segment& segment) {
    return segment.region == region && !segment.left_behind && segment.granules().contains(granule);
  };
  const auto found = std::find_if(segments_.begin(), segments_.end(), maps);
  return found == segments_.end() ? nullptr : &*found;
}

const Segment* Layout::last_before(Address address) const {
  const std::size_t behind = overlapping({address, ByteCount(1)}).first;
  return behind == 0 ? nullptr : &segments_[behind - 1];
}

}  // namespace uffdkit
