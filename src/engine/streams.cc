#include "engine/streams.h"

#include <algorithm>
#include <cstdlib>
#include <utility>

namespace uffdkit {

Streams::Streams(PageCount around) : around_(static_cast<std::int64_t>(around.value)) {
  // Nowhere.
  from_.fill(-(std::int64_t{1} << 62));
}

std::optional<Streams::Ahead> Streams::next() {
  return std::exchange(ahead_, std::nullopt);
}

[[gnu::hot]] void Streams::begin(std::int64_t place, std::int64_t step) {
  const std::size_t index = std::exchange(oldest_, (oldest_ + 1) % kStreams);
  Stream& stream = streams_[index];
  // The more streams end without having been used, the longer the next one is looked at.
  if (stream.count != 0 && !stream.used) needed_ = std::min(2 * needed_, kNeededMax);
  stream = {.last = place, .step = step, .steps = step == 0 ? 0u : 1u};
  look_for(index, std::max(kStepMax, 2 * around_));
}

bool Streams::follow(RegionId region, std::int64_t place) {
  for (std::size_t i = 0; i < kStreams; ++i)
    if (is_near(i, place) && goes_on(i, region, place)) return streams_[i].count != 0;
  // Whatever is near may be where it came from.
  for (std::size_t i = 0; i < kStreams; ++i)
    if (is_near(i, place) && streams_[i].count == 0) return begin(place, place - streams_[i].last), false;
  begin(place, 0);
  return false;
}

bool Streams::goes_on(std::size_t index, RegionId region, std::int64_t place) {
  Stream& stream = streams_[index];
  if (stream.count == 0) return may_become(index, region, place);
  const std::int64_t direction = stream.step > 0 ? 1 : -1;
  const std::int64_t ahead = (place - stream.last) * direction;
  const std::int64_t to_end = (stream.end - stream.last) * direction;
  if (ahead <= 0 || ahead > to_end + stream.step * direction) return false;
  stream.last = first_touched(place, stream.step);
  if ((place - stream.mark) * direction < 0) return true;
  stream.used = true;
  needed_ = kNeededMin;
  // It may have been faster than what was brought.
  bring(index, region, ahead >= to_end ? stream.last + stream.step : stream.end);
  return true;
}

// Pages of one window are touched in any order, or some of them only: windows that follow each other count
// like equal steps.
bool Streams::may_become(std::size_t index, RegionId region, std::int64_t place) {
  Stream& stream = streams_[index];
  const std::int64_t step = place - stream.last;
  const std::int64_t windows = place / around_ - stream.last / around_;
  const bool is_next_window = windows == 1 || windows == -1;
  const bool is_equal = step == stream.step && step != 0;
  const bool is_equal_window = is_next_window && windows == stream.window;
  const bool is_new = stream.windows == 0 && stream.steps <= 1 && is_next_window;
  if (!is_equal && !is_equal_window && !is_new) return false;
  stream.steps = is_equal ? stream.steps + 1 : 1;
  stream.windows = is_equal_window ? stream.windows + 1 : is_next_window ? 1 : 0;
  stream.window = is_next_window ? windows : 0;
  stream.step = step;
  stream.last = place;
  look_for(index, std::max(kStepMax, 2 * around_));
  if (stream.windows < needed_ && stream.steps < needed_) return true;
  if (stream.windows >= needed_) stream.step = windows * around_;
  stream.last = first_touched(place, stream.step);
  bring(index, region, stream.last + stream.step);
  return true;
}

void Streams::bring(std::size_t index, RegionId region, std::int64_t from) {
  Stream& stream = streams_[index];
  const auto per_step = static_cast<std::uint64_t>(std::min(std::abs(stream.step), around_));
  const std::uint64_t first = std::max<std::uint64_t>(kFirstPages / per_step, 2);
  const std::uint64_t most = std::max<std::uint64_t>(kMaxPages / per_step, 2);
  stream.count = stream.count == 0 ? first : std::min(2 * stream.count, most);
  const auto steps = static_cast<std::int64_t>(stream.count);
  stream.end = from + steps * stream.step;
  stream.mark = from + steps / 2 * stream.step;
  look_for(index, std::abs(stream.end - stream.last) + std::abs(stream.step));
  const std::int64_t start_of_region = place_of(region, PageIndex(0));
  ahead_ = Ahead{.region = region,
                 .first = from - start_of_region,
                 .step = stream.step,
                 .count = stream.count,
                 .mark = stream.mark - start_of_region};
}

bool Streams::is_near(std::size_t index, std::int64_t place) const {
  return static_cast<std::uint64_t>(place - from_[index]) <= span_[index];
}

void Streams::look_for(std::size_t index, std::int64_t reach) {
  from_[index] = streams_[index].last - reach;
  span_[index] = static_cast<std::uint32_t>(2 * reach);
}

// Of the window that holds the place, which page is touched first by who goes on by such steps.
std::int64_t Streams::first_touched(std::int64_t place, std::int64_t step) const {
  if (step == around_) return place / around_ * around_;
  if (step == -around_) return place / around_ * around_ + around_ - 1;
  return place;
}

}  // namespace uffdkit
