// Reads that a store could not answer at once: their start, and what becomes of their pages when they are
// back.
#include "engine/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <bitset>
#include <new>
#include <utility>

#include "base/check.h"
#include "engine/session_detail.h"

namespace uffdkit {
namespace {

constexpr std::size_t kFetchesMax = 16;  // under way at once for one store, so that buffers are bounded

}  // namespace

using namespace session;

bool Session::may_fetch(RegionId region) const {
  const auto of_same_lane = [&](const UnderWay& fetch) { return fetch.lane == serving_[region].lane; };
  return std::count_if(fetches_.begin(), fetches_.end(), of_same_lane) <
         static_cast<std::ptrdiff_t>(kFetchesMax);
}

std::uint64_t Session::start_fetch(const Segment& segment, PageRange run) {
  CHECK(run.count.value <= kFetchGranulesMax);
  auto fetch = std::make_unique<Fetch>();
  const auto& [lane, serial, tag, shared] = serving_[segment.region];
  fetch->shared = shared;
  if (!shared) fetch->buffer.reset(new (std::nothrow) std::byte[kPage4K.bytes(run.count).value]);
  if (!shared && !fetch->buffer) return 0;
  fetch->id = ++last_fetch_;
  fetch->granules = run.count;
  fetch->from = offset_of(segment, run.first);
  fetch->store = lane->store();

  // What was removed of a huge page stays so.
  state_.table(segment.region).change(run, [](PageState state) {
    return reads_as_zero(state) ? state : PageState::fetching;
  });
  fetches_.push_back({.id = fetch->id,
                      .region = segment.region,
                      .serial = serial,
                      .lane = lane,
                      .granules = run,
                      .since_ns = host_.now_ns()});
  add(counters_->fetches);
  host_.start_fetch(*lane, std::move(fetch));
  return last_fetch_;
}

void Session::install_returned() {
  for (std::unique_ptr<Fetch>& fetch : std::exchange(returned_, {})) {
    if (fetch->urgency != Urgency::demand) {
      prefetched(std::move(fetch));
      continue;
    }
    install(std::move(fetch));
    if (end_) return;
  }
}

void Session::install(std::unique_ptr<Fetch> read) {
  const auto found = std::find_if(fetches_.begin(), fetches_.end(),
                                  [&](const UnderWay& fetch) { return fetch.id == read->id; });
  CHECK(found != fetches_.end());
  const UnderWay fetch = std::move(*found);
  fetches_.erase(found);
  fault_was_read(fetch.since_ns);
  for (Pending& pending : pending_) pending.blocked = false;
  if (!read->shared) add(counters_->bytes_read, read->bytes().value);
  add(counters_->read_retries, read->retries);
  // The region may be gone, and its number and its table another's.
  if (!is_current(fetch)) return settle_pending(fetch, Put::done);
  if (read->failed.any()) settle_failed_pages(fetch, *read);
  if (end_) return;

  PageTable& table = state_.table(fetch.region);
  Put worst = Put::done;
  std::bitset<kFetchGranulesMax> fetched;
  for (std::size_t i = 0; i < fetch.granules.count.value; ++i)
    fetched[i] = table.get(fetch.granules.first + PageCount(i)) == PageState::fetching;
  for (const Segment& segment : state_.layout().segments()) {
    if (segment.region != fetch.region || segment.left_behind) continue;
    const PageCount page = granules_per_page(segment);
    // What is not mapped in one place may be in another.
    for (std::size_t i = 0; i < fetch.granules.count.value; ++i)
      if (const PageIndex granule = fetch.granules.first + PageCount(i);
          fetched[i] && table.get(granule) == PageState::absent && segment.granules().contains(granule))
        table.set(granule, PageState::fetching);
    // A page of which nothing is `fetching` any more has been removed meanwhile, or could not be read.
    const auto is_wanted = [&](PageIndex first) {
      for (PageIndex granule = first; granule < first + page; granule = granule + kOneGranule)
        if (table.get(granule) == PageState::fetching) return true;
      return false;
    };
    PageIndex first = std::max(fetch.granules.first, segment.granules().first);
    const PageIndex end = std::min(fetch.granules.end(), segment.granules().end());
    while (first < end) {
      PageIndex run_end = first;
      while (run_end < end && is_wanted(run_end)) run_end = run_end + page;
      const PageRange run{first, run_end - first};
      first = run.count.value > 0 ? run_end : first + page;
      if (run.count.value == 0) continue;
      Put put = Put::done;
      if (read->shared) {
        put = put_filled(segment, run);
      } else {
        const std::span<std::byte> bytes(
            read->buffer.get() + kPage4K.bytes(run.first - fetch.granules.first).value,
            kPage4K.bytes(run.count).value);
        put = install_part(segment, run, bytes, std::nullopt);
      }
      if (put == Put::gone) return finish(SessionEnd::gone);
      if (put == Put::put_off || put == Put::no_memory) worst = put;
      if (put != Put::failed) continue;
      for (PageIndex at = run.first; at < run.end(); at = at + page) {
        if (!is_wanted(at)) continue;
        give_up(fetch, segment, at,
                Error(fmt::format("the page at {:#x} cannot be filled", segment.address_of(at).value)));
        if (end_) return;
      }
    }
  }
  // What could not be put into place, or is not mapped any more, is nobody's again.
  table.change(fetch.granules, [&](PageState state) {
    if (state != PageState::fetching) return state;
    populate_again_ = true;
    return PageState::absent;
  });
  settle_pending(fetch, worst);
}

void Session::settle_failed_pages(const UnderWay& fetch, const Fetch& read) {
  PageTable& table = state_.table(fetch.region);
  for (const Segment& segment : state_.layout().segments()) {
    if (segment.region != fetch.region || segment.left_behind) continue;
    const PageCount page = granules_per_page(segment);
    PageIndex first = std::max(fetch.granules.first, segment.granules().first);
    const PageIndex end = std::min(fetch.granules.end(), segment.granules().end());
    for (; first < end; first = first + page) {
      bool failed = false;
      for (std::size_t i = 0; i < page.value; ++i)
        failed = failed || (read.failed[(first - fetch.granules.first).value + i] &&
                            table.get(first + PageCount(i)) == PageState::fetching);
      if (!failed) continue;
      CHECK(read.error.has_value());
      give_up(
          fetch, segment, first,
          Error(fmt::format("the page at offset {} of {} cannot be read: {}", offset_of(segment, first).value,
                            fetch.lane->store()->name(), read.error->message()),
                read.error->os_error()));
      if (end_) return;
    }
  }
}

bool Session::is_demanded(const UnderWay& fetch, const Segment& segment, PageIndex first) const {
  return std::any_of(pending_.begin(), pending_.end(), [&](const Pending& pending) {
    if (pending.fetch != fetch.id) return false;
    const Segment* at = state_.layout().find(pending.page);
    return at != nullptr && at->region == segment.region && at->granule_at(pending.page) == first;
  });
}

void Session::give_up(const UnderWay& fetch, const Segment& segment, PageIndex first, const Error& error) {
  PageTable& table = state_.table(fetch.region);
  const PageRange page{first, granules_per_page(segment)};
  const Address address = segment.address_of(first);
  const bool demanded = is_demanded(fetch, segment, first);
  const bool condemns = demanded || (detaching_ && unreadable_ == Unreadable::poison);
  if (demanded && options_.on_error == OnError::pause && pause(fetch, address, error)) {
    table.set(page, PageState::absent);
    add(counters_->read_errors);
    return host_.page_failed(error);
  }
  table.set(page, condemns ? PageState::poisoned : PageState::absent);
  if (!condemns) {
    if (std::exchange(detaching_, false)) host_.detach_failed(error);
    return;
  }
  add(counters_->read_errors);
  host_.page_failed(error);
  if (demanded && options_.on_error == OnError::kill && !host_.client_has_exited())
    return fail("its client needs a page that cannot be read");
  // Those who wait are answered in this step, by their own faults.
  if (demanded || poison(segment, first)) return;
  table.set(page, PageState::absent);
  populate_again_ = true;
}

bool Session::pause(const UnderWay& fetch, Address page, const Error& error) {
  // A client that is completed at the manager's end has nobody left who would let it go on.
  if ((detaching_ && unreadable_ == Unreadable::poison) || !host_.stop_client()) return false;
  if (std::exchange(detaching_, false)) host_.detach_failed(error);
  for (Pending& pending : pending_)
    if (pending.fetch == fetch.id && pending.page == page) pending.paused = true;
  stopped_ = true;
  waiting_.paused.store(true, std::memory_order_relaxed);
  host_.warn("its client was stopped, which needs a page that cannot be read");
  return true;
}

void Session::unpause() {
  for (Pending& pending : pending_) pending.paused = false;
  waiting_.paused.store(false, std::memory_order_relaxed);
}

void Session::resume() {
  unpause();
  // Also where nothing is known of it: whoever stopped it may have been another manager, which has died.
  stopped_ = false;
  host_.continue_client();
}

void Session::settle_pending(const UnderWay& fetch, Put put) {
  std::erase_if(pending_, [&](Pending& pending) {
    if (pending.fetch != fetch.id) return false;
    pending.fetch = 0;
    if (pending.paused) return false;
    const Segment* segment = state_.layout().find(pending.page);
    // Something else lies there now.
    if (segment == nullptr || segment->region != fetch.region || !is_current(fetch)) return false;
    const PageIndex granule = segment->granule_at(pending.page);
    if (!fetch.granules.contains(granule)) return false;
    PageTable& table = state_.table(segment->region);
    const PageState state = table.get(granule);
    const bool is_there = state == PageState::installed || state == PageState::zeroed;
    // Whether that is here as well is found now.
    if (segment->left_behind && (is_there || put == Put::done)) {
      pending.in_vain = !is_there;
      return false;
    }
    if (!is_there && state != PageState::absent) return false;
    // Its reader was woken by that, unless the page came otherwise, and was moved to where the reader waits.
    // It faults again if there is anything to be had.
    if (is_there || put == Put::done) {
      wake({pending.page, segment->page_size.bytes()});
      return true;
    }
    if (put == Put::no_memory && pending.attempts >= kNoMemoryAttemptsMax) {
      host_.page_failed(no_memory_for(pending.page));
      table.set(page_of(*segment, granule), PageState::poisoned);
      return false;
    }
    put_off(pending, put == Put::no_memory);
    return false;
  });
}

}  // namespace uffdkit
