// Regions that are private mappings of their image's memory (SharedImage): what differs from memory of a
// client's own.
//
// A fault is answered by filling a window of the image's memory, for all clients, and then by a wake (page
// cache: the kernel maps what is there) or by UFFDIO_CONTINUE (resolve). Once such memory is not registered
// any more, the kernel fills the hole that a client touches with zeros, for all clients: so a client is let
// go only when nothing that it can touch is a hole.
#include <algorithm>

#include "engine/session.h"
#include "engine/session_detail.h"

namespace uffdkit {

using namespace session;

void Session::share(const std::vector<std::shared_ptr<SharedImage>>& images) {
  for (RegionId id = 0; id < serving_.size() && id < images.size(); ++id) serving_[id].shared = images[id];
}

void Session::share_all(const std::shared_ptr<SharedImage>& image) {
  for (RegionId id = 0; id < serving_.size(); ++id)
    if (state_.regions()[id].live && state_.regions()[id].sharing != SharingMode::none)
      serving_[id].shared = image;
  if (sharing() == SharingMode::resolve) image->keep_small_pages();
}

SharingMode Session::sharing() const {
  for (const RegionRecord& region : state_.regions())
    if (region.live && region.sharing != SharingMode::none) return region.sharing;
  return SharingMode::none;
}

SharingMode Session::sharing_of(const Segment& segment) const {
  return state_.regions()[segment.region].sharing;
}

bool Session::shares(const Segment* segment) const {
  // What mremap(2) has added or left behind is zero, whatever the image's memory has there.
  if (segment == nullptr || segment->region == kZeroRegion) return sharing() != SharingMode::none;
  return sharing_of(*segment) != SharingMode::none;
}

PageRange Session::image_pages(const Segment& segment, PageRange run) const {
  return {PageIndex(offset_of(segment, run.first).value / 4096), run.count};
}

SharedImage::Fill Session::fill_and_count(const Segment& segment, PageRange run) {
  const SharedImage::Filled filled = serving_[segment.region].shared->fill(
      image_pages(segment, run), host_.scratch().first(kPage4K.bytes(run.count).value));
  add(counters_->bytes_read, filled.read.value);
  return filled.fill;
}

Session::Served Session::serve_shared(Pending& pending, const Segment& segment, PageRange run,
                                      PageIndex wanted) {
  // It was shown already, and is missing again: somebody may have punched a hole.
  if (state_.table(segment.region).get(wanted) == PageState::installed)
    serving_[segment.region].shared->look_again(image_pages(segment, {wanted, kOneGranule}).first);
  switch (fill_and_count(segment, run)) {
    case SharedImage::Fill::under_way:
      return serve_by_fetch(pending, segment, run);
    case SharedImage::Fill::no_memory:
      return served_by(Put::no_memory, pending, segment, wanted);
    case SharedImage::Fill::done:
      break;
  }
  return served_by(put_filled(segment, run), pending, segment, wanted);
}

Session::Put Session::put_filled(const Segment& segment, PageRange run) {
  const SharedImage& image = *serving_[segment.region].shared;
  const PageRange pages = image_pages(segment, run);
  Put result = Put::done;
  for (PageIndex page = pages.first; page < pages.end();) {
    const bool there = image.has(page);
    const PageIndex end = image.end_of_run(page, pages.end());
    const PageRange part{run.first + (page - pages.first), end - page};
    page = end;
    if (!there) {
      result = Put::put_off;
    } else if (sharing_of(segment) == SharingMode::resolve) {
      const Put put = this->put(segment, part, {.kind = Contents::Kind::shared});
      if (put != Put::done) return put;
    } else {
      wake({segment.address_of(part.first), kPage4K.bytes(part.count)});
      mark_brought(segment, part);
      add(counters_->pages_shared, part.count.value);
    }
  }
  return result;
}

bool Session::must_be_zeroed(const Segment& segment, PageIndex granule) {
  const std::shared_ptr<SharedImage>& image = serving_[segment.region].shared;
  switch (state_.table(segment.region).get(granule)) {
    case PageState::removed:
      return true;
    case PageState::absent:
    case PageState::fetching:
      return !image || !image->has(image_pages(segment, {granule, kOneGranule}).first);
    case PageState::installed:
    case PageState::zeroed:
    case PageState::poisoned:
      break;
  }
  return false;
}

PageRange Session::zero_run(const Segment& segment, PageIndex from, PageIndex end) {
  PageRange run{from, kOneGranule};
  while (run.end() < end && must_be_zeroed(segment, run.end())) run.count = run.count + kOneGranule;
  return run;
}

Session::Put Session::zero_all(AddressRange memory) {
  for (const Segment& segment : state_.layout().segments()) {
    if (!segment.memory.overlaps(memory) || segment.region == kZeroRegion) continue;
    if (sharing_of(segment) == SharingMode::none) continue;
    const Address last = std::min(segment.memory.end(), memory.end());
    PageIndex granule = segment.granule_at(std::max(segment.memory.start, memory.start));
    const PageIndex end = granule + kPage4K.pages(last - segment.address_of(granule));
    while (granule < end) {
      if (!must_be_zeroed(segment, granule)) {
        granule = granule + kOneGranule;
        continue;
      }
      const PageRange run = zero_run(segment, granule, end);
      if (const Put put = this->put(segment, run, {}); put != Put::done) return put;
      granule = run.end();
    }
  }
  return Put::done;
}

}  // namespace uffdkit
