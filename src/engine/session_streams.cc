// Clients that go through their memory in order: what they will come to is brought like pages of a working
// set.
#include <algorithm>
#include <utility>

#include "engine/session.h"
#include "engine/session_detail.h"

namespace uffdkit {
namespace {

// What is still to be begun; the oldest is given up for another.
constexpr std::size_t kAheadMax = 8;

}  // namespace

using namespace session;

bool Session::note(const Segment& segment, PageIndex granule) {
  const bool is_followed = streams_ && segment.page_size == kPage4K && !serving_[segment.region].shared &&
                           state_.table(segment.region).get(granule) == PageState::absent;
  if (is_followed && streams_->wanted(segment.region, granule)) return stream_went_on(), false;
  return notes_wanted_ && note_wanted(segment, granule);
}

void Session::stream_went_on() {
  const std::optional<Streams::Ahead> ahead = streams_ ? streams_->next() : std::nullopt;
  if (!ahead) return;
  std::deque<Streams::Ahead>& waiting = prefetching().ahead;
  if (is_resting()) return;
  waiting.push_back(*ahead);
  if (waiting.size() > kAheadMax) waiting.pop_front();
}

bool Session::start_batch_of_stream() {
  Streams::Ahead& ahead = prefetching_->ahead.front();
  const RegionId region = ahead.region;
  const std::shared_ptr<StoreLane> lane = serving_[region].lane;
  // What comes too late is of no use.
  if (!lane || !lane->takes_unasked()) ahead.count = 0;
  const std::size_t granules_max = pace().batch_pages;
  std::vector<FetchPiece> pieces;
  std::size_t granules = 0;
  while (ahead.count > 0 && (granules == 0 || granules + options_.fault_around.value <= granules_max)) {
    granules += add_around(ahead, pieces);
    ahead.first += ahead.step;
    --ahead.count;
  }
  if (ahead.count == 0) prefetching_->ahead.pop_front();
  return pieces.empty() || submit(region, std::move(pieces), granules, Urgency::prefetch);
}

std::size_t Session::add_around(const Streams::Ahead& ahead, std::vector<FetchPiece>& pieces) {
  if (ahead.first < 0) return 0;
  const PageIndex page(static_cast<std::uint64_t>(ahead.first));
  const Segment* segment = state_.layout().find(ahead.region, page);
  if (segment == nullptr || segment->page_size != kPage4K) return 0;
  const PageTable& table = state_.table(ahead.region);
  const PageIndex window(page.value & ~(options_.fault_around.value - 1));
  const PageIndex end = std::min(window + options_.fault_around, segment->granules().end());
  std::size_t read = 0;
  for (PageIndex at = std::max(window, segment->first); at < end; at = at + kOneGranule) {
    if (table.get(at) != PageState::absent) continue;
    const bool is_mark = static_cast<std::int64_t>(at.value) == ahead.mark;
    read += is_mark ? 0 : 1;
    if (!pieces.empty() && pieces.back().granules.end() == at && pieces.back().read == !is_mark)
      pieces.back().granules.count = pieces.back().granules.count + kOneGranule;
    else
      pieces.push_back({.from = offset_of(*segment, at), .granules = {at, kOneGranule}, .read = !is_mark});
  }
  return read;
}

}  // namespace uffdkit
