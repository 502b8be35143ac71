// Bringing everything in, so that the client can do without the session.
#include "engine/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "engine/session_detail.h"

namespace uffdkit {
namespace {

constexpr int kPopulateRunsPerStep = 1;             // then faults get their turn
constexpr std::uint64_t kScannedPerRun = 1u << 16;  // page states looked at in search of one that is absent
constexpr PageCount kPopulateGranules{64};          // 256 KiB: COPY gains nothing from longer runs

}  // namespace

using namespace session;

bool Session::populate() {
  const std::int64_t now = host_.now_ns();
  if (populate_not_before_ns_ > now) return false;
  populate_not_before_ns_ = 0;
  const bool condemned = failing_ == Failing::condemned;
  for (int runs = 0; runs < kPopulateRunsPerStep; ++runs) {
    if (runs > 0 && host_.gives_way()) return true;
    const auto segments = state_.layout().segments();
    const auto segment = std::find_if(segments.begin(), segments.end(),
                                      [&](const Segment& s) { return s.memory.end() > populate_from_; });
    if (segment == segments.end()) {
      if (!condemned && !fetches_.empty()) return false;
      if (!populate_again_) {
        begin_end(condemned ? SessionEnd::failed : releasing_ ? SessionEnd::released : SessionEnd::detached);
        return true;
      }
      populate_again_ = false;
      populate_from_ = Address(0);
      continue;
    }
    const bool shared = segment->region != kZeroRegion && sharing_of(*segment) != SharingMode::none;
    if (segment->region == kZeroRegion || (releasing_ && !shared)) {
      populate_from_ = segment->memory.end();
      continue;
    }
    // Empty, or shown by the file when its region has it elsewhere.
    if (segment->left_behind && !condemned) {
      populate_from_ = segment->memory.end();
      continue;
    }
    const PageTable& table = state_.table(segment->region);
    const PageIndex end = segment->granules().end();
    const PageIndex from = segment->granule_at(std::max(populate_from_, segment->memory.start));
    const PageIndex scan_end = std::min(end, from + PageCount(kScannedPerRun));
    const auto is_to_do = [&](PageIndex granule) {
      const PageState state = table.get(granule);
      // What was removed would be the image again.
      const bool removed = shared && state == PageState::removed;
      if (condemned) return state == PageState::poisoned || removed;
      if (releasing_) return must_be_zeroed(*segment, granule);
      // The kernel may have put off poisoning a page, or a successor have found it so.
      return state == PageState::absent || state == PageState::poisoned || removed;
    };
    PageIndex first = from;
    while (first < scan_end && !is_to_do(first)) {
      const PageIndex next = first + kOneGranule;
      // What must be zeroed is not in the state alone.
      first = releasing_ ? next : table.end_of_run(next, scan_end, table.get(first));
    }
    if (first == scan_end) {
      populate_from_ = segment->address_of(scan_end);
      continue;
    }
    if (condemned || (!releasing_ && table.get(first) == PageState::poisoned)) {
      if (!condemn_run(*segment, first, scan_end)) return false;
      continue;
    }
    if (releasing_ || table.get(first) == PageState::removed) {
      // Behind pages that were given back there may be others that are still to be brought.
      const PageRange run =
          releasing_ ? zero_run(*segment, first, scan_end)
                     : PageRange{first, table.end_of_run(first, scan_end, PageState::removed) - first};
      if (!populated(put(*segment, run, {}), *segment, run)) return false;
      populate_from_ = segment->address_of(run.end());
      continue;
    }
    const FaultPlan plan = plan_fault(
        table, *segment, first, std::max(kPopulateGranules, granules_per_page(*segment)), lost(*segment));
    const Address behind = segment->address_of(plan.granules.end());
    if (plan.action == FaultPlan::Action::read && !populate_run(*segment, plan.granules)) return false;
    populate_from_ = behind;
  }
  return true;
}

bool Session::condemn_run(const Segment& segment, PageIndex first, PageIndex end) {
  const PageRange page = page_of(segment, first);
  const PageIndex poisoned_end = state_.table(segment.region).end_of_run(first, end, PageState::poisoned);
  const std::uint64_t granules = std::max((poisoned_end - page.first).value, page.count.value);
  // Whole pages, at most so many as were in one mapping the last time.
  const std::uint64_t pages = std::min(granules / page.count.value, poison_pages_max_);
  const PageRange run{page.first, PageCount(pages * page.count.value)};
  const Outcome outcome = uffd_.poison({segment.address_of(run.first), kPage4K.bytes(run.count)});
  const PageCount poisoned = kPage4K.pages(outcome.done);
  add(counters_->pages_poisoned, poisoned.value);
  switch (outcome.stop) {
    case Stop::complete:
    case Stop::cut_short:
      poison_pages_max_ = std::min(poison_pages_max_ * 2, kScannedPerRun);
      populate_from_ = segment.address_of(run.first) + outcome.done;
      return true;
    case Stop::not_ready:
      if (pages > 1) {
        // It crosses from one mapping into the next, or one of the pages is not mapped any more.
        poison_pages_max_ = pages / 2;
        return true;
      }
      [[fallthrough]];
    case Stop::present:
    case Stop::bad_memory:
    case Stop::poisoned:
      wake({segment.address_of(run.first), segment.page_size.bytes()});
      populate_from_ = segment.address_of(run.first) + segment.page_size.bytes();
      return true;
    case Stop::changing:
    case Stop::no_memory:
      put_off_populating();
      return false;
    case Stop::gone:
      finish(SessionEnd::gone);
      return false;
    default:
      // Above all a kernel without UFFDIO_POISON.
      detaching_ = false;
      if (failing_ == Failing::no)
        fail("a page cannot be read, and this kernel cannot poison it");
      else
        host_.warn("this kernel cannot poison pages: threads wait for what is missing until they are killed");
      return false;
  }
}

bool Session::populate_run(const Segment& segment, PageRange run) {
  Store& store = *serving_[segment.region].lane->store();
  const Extent extent = store.extent_at(offset_of(segment, run.first));
  // Memory that is not registered any more is zero by itself.
  if (extent.zero && extent.end >= offset_of(segment, run.end())) {
    state_.table(segment.region).set(run, PageState::installed);
    return true;
  }
  if (serving_[segment.region].shared) {
    switch (fill_and_count(segment, run)) {
      case SharedImage::Fill::under_way:
        return populate_by_fetch(segment, run);
      case SharedImage::Fill::no_memory:
        return populated(Put::no_memory, segment, run);
      case SharedImage::Fill::done:
        break;
    }
    // Memory that is not registered any more shows the image's by itself.
    state_.table(segment.region).set(run, PageState::installed);
    return true;
  }
  const std::span<std::byte> buffer = host_.scratch().first(kPage4K.bytes(run.count).value);
  const Result<ReadStatus> read = store.read(offset_of(segment, run.first), buffer, Wait::no);
  if (!read || *read != ReadStatus::done) return populate_by_fetch(segment, run);
  add(counters_->bytes_read, buffer.size());
  return populated(install_part(segment, run, buffer, std::nullopt), segment, run);
}

bool Session::populate_by_fetch(const Segment& segment, PageRange run) {
  if (!may_fetch(segment.region)) return false;
  if (start_fetch(segment, run) != 0) return true;
  put_off_populating();
  return false;
}

void Session::populate_again_from(Address address) {
  populate_from_ = std::min(populate_from_, address);
}

void Session::put_off_populating() {
  populate_not_before_ns_ = host_.now_ns() + put_off_ns(populate_attempts_++);
}

bool Session::populated(Put put, const Segment& segment, PageRange run) {
  switch (put) {
    case Put::done:
      populate_attempts_ = 0;
      return true;
    case Put::put_off:
    case Put::no_memory:
      put_off_populating();
      return false;
    case Put::failed:
      return poison_what_is_missing(segment, run);
    case Put::gone:
      finish(SessionEnd::gone);
      return false;
  }
  return false;
}

// A page that cannot be put is not left behind as zero.
bool Session::poison_what_is_missing(const Segment& segment, PageRange run) {
  const PageCount page = granules_per_page(segment);
  for (PageIndex first = run.first; first < run.end(); first = first + page) {
    if (is_brought(segment, {first, page})) continue;
    const Error error(fmt::format("the page at {:#x} cannot be filled", segment.address_of(first).value));
    if (unreadable_ == Unreadable::keep_serving) {
      detaching_ = false;
      host_.detach_failed(error);
      return false;
    }
    host_.page_failed(error);
    if (poison(segment, first)) {
      if (end_) return false;
      continue;
    }
    state_.table(segment.region).set({first, page}, PageState::absent);
    put_off_populating();
    return false;
  }
  return true;
}

}  // namespace uffdkit
