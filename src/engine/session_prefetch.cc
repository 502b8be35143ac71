// Pages before they are asked for: those of a working set, in its order, or those that a stream will come to
// (session_streams.cc); then, in the background, the others.
//
// What is under way here holds no page: its pages stay `absent`, so that a fault for one of them is served as
// if nobody had thought of it before. When the bytes are there, they are put where pages are `absent` still.
// A page that was asked for, removed, or cannot be read meanwhile is no longer `absent`; pages keep their
// states where they are moved; and what is unmapped lies in no segment. So nothing that is gone comes back.
#include "engine/session.h"

#include <algorithm>
#include <cerrno>
#include <new>
#include <utility>

#include "base/check.h"
#include "engine/session_detail.h"

namespace uffdkit {
namespace {

// Pages that are read together: enough to keep a disk busy.
constexpr std::size_t kPagesPerBatch = 64;
// Pages put into place in one step, then messages are read again: some 40 us.
constexpr std::size_t kInstalledPerStep = 16;
// The same while faults come for pages that are not expected, and shortly after: a fault waits behind all
// reads that the disk has already, and for the piece of work that its worker is about. bench_cold_reads says
// what a disk gives for how many reads at once: with 4, a third to a half.
constexpr std::size_t kPagesPerBatchBeside = 4;
constexpr unsigned kDepthBeside = 1;
constexpr std::size_t kInstalledPerStepBeside = 2;
constexpr std::int64_t kBesideNs = 10'000'000;
// Pages of the order that are looked at in one step.
constexpr std::size_t kLookedAtPerStep = 1024;
// Page states, likewise, in the background.
constexpr std::uint64_t kScannedPerStep = 1u << 14;
// How long no fault must have come for a session to be idle.
constexpr std::int64_t kIdleNs = 50'000'000;
// Batches that may be under way: at first, and at most.
constexpr unsigned kDepthFirst = 4;
constexpr unsigned kDepthMax = 8;
// A fault that had to wait for the store so long while batches were under way, and twice as long as one that
// had the store for itself, was late: half as many from then on, and at last a rest. So many batches without
// one, and there may be one more.
constexpr std::int64_t kLateNs = 20'000'000;
constexpr unsigned kGoodBatches = 16;
// A rest ends when a fault had the store for itself, since that shows what it takes, or when for so long none
// had to wait for the store. Each rest that follows a rest is twice as long, up to so many times.
constexpr std::int64_t kRestNs = 1'000'000'000;
constexpr unsigned kRestDoubledMax = 6;
// One page in so many of a working set is left out, to see whether it is asked for.
constexpr std::uint64_t kLeftOutOf = 128;
// A layout of more segments is not searched for each page.
constexpr std::size_t kSegmentsSearchedMax = 256;
// How often in a row putting pages into place is tried while the client changes its memory.
constexpr unsigned kPutOffMax = 50;

// When a lane is looked at again that had no room.
constexpr std::int64_t kLaneFullRetryNs = 5'000'000;

unsigned doublings(unsigned rests) {
  return std::min(rests - 1, kRestDoubledMax);
}

std::int64_t rest_ns(unsigned rests) {
  return kRestNs << doublings(rests);
}

// A number that has nothing to do with the page's place.
std::uint64_t mixed(std::uint64_t number) {
  number = (number ^ number >> 30) * 0xbf58476d1ce4e5b9;
  number = (number ^ number >> 27) * 0x94d049bb133111eb;
  return number ^ number >> 31;
}

}  // namespace

using namespace session;

void Session::prefetch(std::shared_ptr<const PrefetchOrder> order, std::shared_ptr<StoreLane> lane,
                       std::uint64_t seed) {
  prefetching().order = std::move(order);
  prefetching().lane = std::move(lane);
  prefetching().seed = seed;
  streams_.reset();
}

void Session::record_what_is_there() {
  for (RegionId id = 0; id < serving_.size(); ++id) {
    const RegionRecord& region = state_.regions()[id];
    const PageTable& table = state_.table(id);
    // More than is ever noted would take long to look at, while the client waits.
    if (serving_[id].lane != record_.lane || table.granules().value > AccessRecord::kPagesMax) continue;
    const PageCount before = kPage4K.pages(ByteCount(region.offset.value));
    const PageIndex end(table.granules().value);
    for (PageIndex at = table.end_of_run(PageIndex(0), end, PageState::absent); at < end;
         at = table.end_of_run(at + kOneGranule, end, PageState::absent))
      if (table.get(at) == PageState::installed) record_.pages->wanted(at + before);
  }
}

Session::Prefetching& Session::prefetching() {
  if (prefetching_ == nullptr) {
    prefetching_ = std::make_unique<Prefetching>();
    prefetching_->depth = kDepthFirst;
    notes_wanted_ = true;
  }
  return *prefetching_;
}

Session::Pace Session::pace() const {
  const unsigned depth = prefetching_->depth;
  const auto waits_for_the_store = [](const Pending& pending) {
    return pending.unexpected && (pending.fetch != 0 || pending.blocked);
  };
  if (host_.now_ns() - prefetching_->missed_at_ns >= kBesideNs &&
      std::ranges::none_of(pending_, waits_for_the_store))
    return {.batch_pages = kPagesPerBatch, .batches = depth, .step_pages = kInstalledPerStep};
  return {.batch_pages = kPagesPerBatchBeside,
          .batches = std::min(depth, kDepthBeside),
          .step_pages = kInstalledPerStepBeside};
}

bool Session::is_left_out(PageIndex image_page) const {
  return mixed(image_page.value + prefetching_->seed) % kLeftOutOf == 0;
}

bool Session::note_wanted(const Segment& segment, PageIndex granule) {
  const RegionServing& serving = serving_[segment.region];
  const PageIndex page(kPage4K.pages(ByteCount(offset_of(segment, granule).value)).value);
  // What was asked for before is no news.
  if (state_.table(segment.region).get(granule) != PageState::absent) return false;
  if (record_.pages && serving.lane == record_.lane) record_.pages->wanted(page);
  if (prefetching_ == nullptr) return false;
  const bool has_order = prefetching_->order && serving.lane == prefetching_->lane;
  const bool unexpected = !has_order || !prefetching_->order->has(page);
  if (unexpected) prefetching_->missed_at_ns = host_.now_ns();
  if (has_order && unexpected) add(counters_->prefetch_missed);
  if (!unexpected) add(is_left_out(page) ? counters_->prefetch_left_out_used : counters_->prefetch_late);
  return unexpected;
}

PageRange Session::expected_of(const Segment& segment, PageRange run, PageIndex wanted) const {
  if (prefetching_ == nullptr || !prefetching_->order ||
      serving_[segment.region].lane != prefetching_->lane || granules_per_page(segment) > kOneGranule)
    return run;
  const PageCount before = kPage4K.pages(ByteCount(offset_of(segment, PageIndex(0)).value));
  const auto is_expected = [&](PageIndex granule) { return prefetching_->order->has(granule + before); };
  if (!is_expected(wanted)) return run;
  PageIndex first = wanted;
  while (first > run.first && is_expected(PageIndex(first.value - 1))) first = PageIndex(first.value - 1);
  PageIndex end = wanted + kOneGranule;
  while (end < run.end() && is_expected(end)) end = end + kOneGranule;
  return {first, end - first};
}

// The segment that shows a page of the image which nobody has asked for.
std::optional<Session::Place> Session::place_of(PageIndex image_page) const {
  const std::uint64_t offset = kPage4K.bytes(PageCount(image_page.value)).value;
  for (const Segment& segment : state_.layout().segments()) {
    if (segment.region == kZeroRegion || segment.left_behind ||
        serving_[segment.region].lane != prefetching_->lane)
      continue;
    const std::uint64_t first = offset_of(segment, segment.first).value;
    if (offset < first || offset - first >= segment.memory.length.value) continue;
    const PageIndex granule = segment.first + kPage4K.pages(ByteCount(offset - first));
    return Place{.region = segment.region, .granules = page_of(segment, granule)};
  }
  return std::nullopt;
}

bool Session::is_untouched(RegionId region, PageRange granules) {
  const PageTable& table = state_.table(region);
  return table.end_of_run(granules.first, granules.end(), PageState::absent) == granules.end();
}

bool Session::prefetch_step() {
  Prefetching& prefetching = *prefetching_;
  if (!prefetching.has_something() || prefetching.not_before_ns > host_.now_ns()) return false;
  prefetching.not_before_ns = 0;
  install_arrived();
  if (end_) return false;
  // What was put into place has made room.
  const bool more = start_batches();
  return prefetching.not_before_ns == 0 && (more || !prefetching.arrived.empty());
}

bool Session::start_batches() {
  Prefetching& prefetching = *prefetching_;
  if (is_resting()) return false;
  if (state_.layout().segments().size() > kSegmentsSearchedMax) return stop_prefetching(), false;
  // What is at hand is as soon read when it can be put into place. No thread has to be woken for it, and a
  // worker that does not sleep between is there when a fault comes.
  if (prefetching.arrived.empty()) prefetching.at_hand = false;
  if (prefetching.at_hand) return false;
  const auto outstanding = [&] { return prefetching.under_way + prefetching.arrived.size(); };
  const auto has_room = [&] { return outstanding() < pace().batches; };
  while (has_room() && prefetching.has_order()) {
    const std::optional<Place> next = place_of(PageIndex(prefetching.order->pages()[prefetching.next]));
    // One at a time, since others of the order may lie in it too.
    if (next && next->granules.count > kOneGranule && outstanding() > 0) return false;
    if (!prefetching.lane->takes_unasked()) {
      // Others have their turn. What is under way comes back by itself.
      if (prefetching.under_way == 0 && prefetching.arrived.empty())
        prefetching.not_before_ns = host_.now_ns() + kLaneFullRetryNs;
      return false;
    }
    if (!start_batch_of_order()) return prefetching.has_order();
  }
  while (has_room() && !prefetching.ahead.empty())
    if (!start_batch_of_stream()) return !prefetching.ahead.empty() && prefetching.arrived.empty();
  while (has_room() && prefetching.background && !prefetching.has_order() && prefetching.ahead.empty())
    if (!may_start_in_background() || !start_background_batch()) break;
  return false;
}

bool Session::start_batch_of_order() {
  Prefetching& prefetching = *prefetching_;
  const std::vector<std::uint32_t>& pages = prefetching.order->pages();
  const std::size_t granules_max = pace().batch_pages;
  std::vector<FetchPiece> pieces;
  std::size_t granules = 0;
  std::size_t looked_at = 0;
  RegionId region = kZeroRegion;
  for (; prefetching.next < pages.size() && looked_at < kLookedAtPerStep; ++prefetching.next, ++looked_at) {
    const PageIndex page(pages[prefetching.next]);
    const std::optional<Place> place = place_of(page);
    // Regions that share the image's memory get it by their faults.
    if (!place || serving_[place->region].shared || !is_untouched(place->region, place->granules)) continue;
    const bool is_huge = place->granules.count > kOneGranule;
    if (is_huge && prefetching.under_way + prefetching.arrived.size() > 0) break;
    const bool is_other = region != kZeroRegion && place->region != region;
    if (is_other || (granules > 0 && granules + place->granules.count.value > granules_max)) break;
    region = place->region;
    // One that is left out comes from the page cache when it is asked for.
    const bool left_out = !is_huge && is_left_out(page);
    if (left_out) add(counters_->prefetch_left_out);
    const StoreOffset from =
        state_.regions()[region].offset + kPage4K.bytes(PageCount(place->granules.first.value));
    pieces.push_back({.from = from, .granules = place->granules, .read = !left_out});
    if (!left_out) granules += place->granules.count.value;
  }
  if (pieces.empty()) return looked_at < kLookedAtPerStep;

  std::ranges::sort(pieces, {}, [](const FetchPiece& piece) { return piece.granules.first; });
  std::vector<FetchPiece> joined;
  for (const FetchPiece& piece : pieces) {
    // A huge page that is named twice.
    if (!joined.empty() && piece.granules.first < joined.back().granules.end()) {
      granules -= piece.granules.count.value;
      continue;
    }
    if (!joined.empty() && joined.back().granules.end() == piece.granules.first &&
        joined.back().read == piece.read)
      joined.back().granules.count = joined.back().granules.count + piece.granules.count;
    else
      joined.push_back(piece);
  }
  return submit(region, std::move(joined), granules, Urgency::prefetch);
}

bool Session::may_start_in_background() {
  Prefetching& prefetching = *prefetching_;
  const std::int64_t now = host_.now_ns();
  // What is asked for has the disk.
  if (!pending_.empty()) return false;
  const std::uint64_t faults = counters_->faults.load(std::memory_order_relaxed);
  if (std::exchange(prefetching.faults_seen, faults) != faults) prefetching.last_fault_ns = now;
  const std::int64_t quiet_at =
      options_.background == Background::idle ? prefetching.last_fault_ns + kIdleNs : 0;
  if (prefetching.background_at_ns <= now && quiet_at > now) {
    prefetching.background_at_ns = quiet_at;
    return false;
  }
  if (prefetching.background_at_ns > now) return false;
  prefetching.background_at_ns = 0;
  return true;
}

bool Session::start_background_batch() {
  Prefetching& prefetching = *prefetching_;
  const auto segments = state_.layout().segments();
  std::uint64_t looked_at = 0;
  while (looked_at < kScannedPerStep) {
    const auto segment = std::ranges::find_if(
        segments, [&](const Segment& each) { return each.memory.end() > prefetching.background_from; });
    if (segment == segments.end()) {
      prefetching.background = false;
      return false;
    }
    const RegionId region = segment->region;
    if (region == kZeroRegion || segment->left_behind || serving_[region].shared) {
      prefetching.background_from = segment->memory.end();
      continue;
    }
    const PageCount page = granules_per_page(*segment);
    const PageIndex from =
        page_of(*segment, segment->granule_at(std::max(prefetching.background_from, segment->memory.start)))
            .first;
    const PageIndex end = segment->granules().end();
    Store& store = *serving_[region].lane->store();
    // A hole costs nothing when it is asked for.
    const Extent extent = store.extent_at(offset_of(*segment, from));
    const std::uint64_t of_kind = kPage4K.pages(extent.end - offset_of(*segment, from)).value;
    if (extent.zero && of_kind >= page.value) {
      looked_at += page.value;
      prefetching.background_from =
          segment->address_of(std::min(end, from + PageCount(of_kind / page.value * page.value)));
      continue;
    }
    // Not on into a hole.
    const PageIndex run_end =
        std::min(end, from + std::max(PageCount(of_kind / page.value * page.value), page));
    PageRange run{from, PageCount(0)};
    while (run.end() < run_end && run.count + page <= std::max(PageCount(pace().batch_pages), page) &&
           is_untouched(region, {run.end(), page}))
      run.count = run.count + page;
    looked_at += std::max(run.count, page).value;
    prefetching.background_from = segment->address_of(run.count.value > 0 ? run.end() : from + page);
    if (run.count.value == 0) continue;
    if (!serving_[region].lane->takes_unasked()) {
      prefetching.background_from = segment->address_of(from);
      prefetching.background_at_ns = host_.now_ns() + kLaneFullRetryNs;
      return false;
    }
    const std::int64_t now = host_.now_ns();
    if (options_.background_budget && !std::exchange(prefetching.background_paid, true))
      prefetching.background_at_ns = options_.background_budget->take(kPage4K.bytes(run.count), now);
    if (prefetching.background_at_ns > now) {
      prefetching.background_from = segment->address_of(from);
      return false;
    }
    prefetching.background_paid = false;
    return submit(region, {{.from = offset_of(*segment, run.first), .granules = run}}, run.count.value,
                  Urgency::background);
  }
  // The next step goes on.
  prefetching.background_at_ns = host_.now_ns() + 1;
  return false;
}

bool Session::submit(RegionId region, std::vector<FetchPiece> pieces, std::size_t granules, Urgency urgency) {
  Prefetching& prefetching = *prefetching_;
  CHECK(granules <= kFetchGranulesMax);
  const std::shared_ptr<StoreLane>& lane = serving_[region].lane;
  auto fetch = std::make_unique<Fetch>();
  fetch->buffer.reset(new (std::nothrow) std::byte[kPage4K.bytes(PageCount(granules)).value]);
  // Without memory for it there is none for what is not needed now.
  if (!fetch->buffer) return stop_prefetching(), false;
  fetch->id = 0;
  fetch->granules = PageCount(granules);
  fetch->from = pieces.front().from;
  fetch->store = lane->store();
  fetch->urgency = urgency;
  fetch->pieces = std::move(pieces);
  fetch->region = region;
  fetch->region_serial = serving_[region].serial;
  prefetching.begun = true;
  // A huge page would keep the worker too long.
  if (granules <= kPagesPerBatch && read_at_hand(*fetch)) {
    add(counters_->bytes_read, fetch->bytes().value);
    prefetching.arrived.push_back(std::move(fetch));
    prefetching.at_hand = true;
    return false;
  }
  ++prefetching.under_way;
  host_.start_fetch(*lane, std::move(fetch));
  return true;
}

void Session::prefetched(std::unique_ptr<Fetch> fetch) {
  if (prefetching_ == nullptr) return;
  --prefetching_->under_way;
  prefetching_->last_back_ns = host_.now_ns();
  add(counters_->bytes_read, fetch->bytes().value);
  prefetching_->arrived.push_back(std::move(fetch));
  if (prefetching_->depth == 0 || ++prefetching_->good < kGoodBatches) return;
  prefetching_->good = 0;
  prefetching_->rests = 0;
  prefetching_->depth = std::min(prefetching_->depth + 1, kDepthMax);
}

void Session::fault_was_read(std::int64_t since_ns) {
  if (prefetching_ == nullptr) return;
  Prefetching& prefetching = *prefetching_;
  const std::int64_t now = host_.now_ns();
  const std::int64_t took = now - since_ns;
  if (prefetching.under_way == 0 && prefetching.last_back_ns <= since_ns) {
    prefetching.alone_ns = took;
    if (prefetching.rests_for_faults == 0) return;
    --prefetching.rests_for_faults;
    prefetching.rests_until_ns = prefetching.rests_for_faults == 0 ? now : now + rest_ns(prefetching.rests);
    return;
  }
  if (prefetching.depth == 0 || took < std::max(kLateNs, 2 * prefetching.alone_ns)) return;
  prefetching.good = 0;
  prefetching.depth /= 2;
  if (prefetching.depth == 0) rest();
}

void Session::rest() {
  Prefetching& prefetching = *prefetching_;
  ++prefetching.rests;
  prefetching.rests_for_faults = 1u << doublings(prefetching.rests);
  prefetching.rests_until_ns = host_.now_ns() + rest_ns(prefetching.rests);
  // The client is past it by then.
  prefetching.ahead.clear();
  counters_->prefetch_given_up.store(1, std::memory_order_relaxed);
}

bool Session::is_resting() {
  Prefetching& prefetching = *prefetching_;
  if (prefetching.depth > 0) return false;
  if (prefetching.stopped || host_.now_ns() < prefetching.rests_until_ns) return true;
  prefetching.rests_until_ns = 0;
  prefetching.rests_for_faults = 0;
  prefetching.depth = 1;
  counters_->prefetch_given_up.store(0, std::memory_order_relaxed);
  return false;
}

void Session::stop_prefetching() {
  Prefetching& prefetching = *prefetching_;
  if (prefetching.has_order()) counters_->prefetch_given_up.store(1, std::memory_order_relaxed);
  if (prefetching.order) prefetching.next = prefetching.order->pages().size();
  prefetching.ahead.clear();
  prefetching.background = false;
  prefetching.depth = 0;
  prefetching.rests_until_ns = 0;
  prefetching.stopped = true;
}

void Session::install_arrived() {
  Prefetching& prefetching = *prefetching_;
  std::size_t left = pace().step_pages;
  while (left > 0 && !prefetching.arrived.empty()) {
    Fetch& fetch = *prefetching.arrived.front();
    const bool is_current = serving_[fetch.region].serial == fetch.region_serial;
    if (!is_current || prefetching.piece == fetch.pieces.size()) {
      prefetching.arrived.pop_front();
      prefetching.piece = 0;
      prefetching.done = PageCount(0);
      prefetching.buffered = PageCount(0);
      continue;
    }
    const FetchPiece& piece = fetch.pieces[prefetching.piece];
    if (!piece.read || prefetching.done == piece.granules.count) {
      if (piece.read) prefetching.buffered = prefetching.buffered + piece.granules.count;
      ++prefetching.piece;
      prefetching.done = PageCount(0);
      continue;
    }
    const PageRange rest{piece.granules.first + prefetching.done, piece.granules.count - prefetching.done};
    const std::uint64_t at = (prefetching.buffered + prefetching.done).value;
    const PageCount passed = install_run(fetch, rest, at, left);
    if (end_ || passed.value == 0) return;
    prefetching.done = prefetching.done + passed;
    left -= std::min<std::size_t>(left, passed.value);
  }
}

PageCount Session::install_run(Fetch& fetch, PageRange rest, std::uint64_t at, std::size_t granules_max) {
  Prefetching& prefetching = *prefetching_;
  const Segment* segment = state_.layout().find(fetch.region, rest.first);
  // Unmapped meanwhile.
  if (segment == nullptr) return kOneGranule;
  const PageCount page = granules_per_page(*segment);
  const PageIndex end = std::min(rest.end(), segment->granules().end());
  // What was left of a huge page when it was cut.
  if (end - rest.first < page || page_of(*segment, rest.first).first != rest.first) return kOneGranule;
  const auto may_put = [&](PageIndex first) {
    return is_untouched(fetch.region, {first, page}) && !fetch.failed[at + (first - rest.first).value];
  };
  if (!may_put(rest.first)) return page;
  PageRange run{rest.first, page};
  while (run.count.value < granules_max && run.end() + page <= end && may_put(run.end()))
    run.count = run.count + page;
  const std::span<std::byte> bytes(fetch.buffer.get() + kPage4K.bytes(PageCount(at)).value,
                                   kPage4K.bytes(run.count).value);
  switch (install_part(*segment, run, bytes, std::nullopt)) {
    case Put::gone:
      finish(SessionEnd::gone);
      return run.count;
    case Put::no_memory:
      // It is better kept for what is asked for.
      stop_prefetching();
      prefetching.arrived.clear();
      prefetching.piece = 0;
      prefetching.done = prefetching.buffered = PageCount(0);
      return PageCount(0);
    case Put::put_off:
      if (++prefetching.attempts > kPutOffMax) break;
      prefetching.not_before_ns = host_.now_ns() + put_off_ns(prefetching.attempts);
      return PageCount(0);
    case Put::done:
    case Put::failed:
      break;
  }
  prefetching.attempts = 0;
  const PageTable& table = state_.table(fetch.region);
  add(fetch.urgency == Urgency::prefetch ? counters_->pages_prefetched : counters_->pages_background,
      (table.end_of_run(run.first, run.end(), PageState::installed) - run.first).value);
  return run.count;
}

}  // namespace uffdkit
