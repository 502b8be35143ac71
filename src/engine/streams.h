// Whether a client goes through its memory in order: forwards, backwards, or in equal steps; and what it will
// ask for next if it does.
//
// Each fault is told, and is compared with the last ones of a few streams. Equal steps make a stream, which
// is brought ahead of. Of what is brought one page in the middle is left to a fault, the mark: when the
// client comes there, twice as much is brought behind the end, and so on up to a limit. Where nobody comes
// nothing more is brought; and after streams that came to nothing, more steps are waited for. Pure: no
// kernel, no I/O. Threads: none; owned by one session.
#pragma once

#include <uffdkit/units.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>

#include "engine/layout.h"

namespace uffdkit {

class Streams {
 public:
  // What a stream brings at first, and at most: as much as kernels read ahead of a file.
  static constexpr std::uint64_t kFirstPages = 64;
  static constexpr std::uint64_t kMaxPages = 512;

  // Pages `first`, `first` + `step`, ... of a region, `count` of them, each with its neighbours; `mark` is
  // that one of them which is only to be read from the disk. They may lie outside of the region.
  struct Ahead {
    RegionId region;
    std::int64_t first;
    std::int64_t step;
    std::uint64_t count;
    std::int64_t mark;
  };

  // `around`: see SessionOptions::fault_around. Neighbours that were brought with a page are not asked for.
  explicit Streams(PageCount around);

  // A page is asked for that was never there. True if it was expected; then next() may have something.
  bool wanted(RegionId region, PageIndex page) {
    const std::int64_t place = place_of(region, page);
    for (std::size_t i = 0; i < kStreams; ++i)
      if (static_cast<std::uint64_t>(place - from_[i]) <= span_[i]) return follow(region, place);
    begin(place, 0);
    return false;
  }

  // What is to be brought now, once.
  std::optional<Ahead> next();

 private:
  static constexpr std::size_t kStreams = 8;
  // Between two pages of one stream: 1 MiB.
  static constexpr std::int64_t kStepMax = 256;
  // Equal steps that make a stream: at first, and after many that came to nothing.
  static constexpr unsigned kNeededMin = 2;
  static constexpr unsigned kNeededMax = 16;

  struct Stream {
    std::int64_t last = 0;    // where the client was; see place_of()
    std::int64_t step = 0;    // the last one; 0: not known
    unsigned steps = 0;       // that were equal
    unsigned windows = 0;     // how often in a row it was in the next window of neighbours,
    std::int64_t window = 0;  // or in the one before: 1 or -1
    std::uint64_t count = 0;  // of steps that were brought the last time; 0: it is no stream yet
    std::int64_t end = 0;     // the first page that was not
    std::int64_t mark = 0;
    bool used = false;  // it has come to a mark
  };

  // Pages of all regions in one line, far from each other.
  static constexpr unsigned kRegionShift = 40;
  static std::int64_t place_of(RegionId region, PageIndex page) {
    return static_cast<std::int64_t>((std::uint64_t{region} << kRegionShift) + page.value);
  }

  // A stream of which this is all that is known.
  void begin(std::int64_t place, std::int64_t step);
  // Finds the stream that goes on there, or begins one.
  bool follow(RegionId region, std::int64_t place);
  // Whether this is its next page, and then what follows from that.
  bool goes_on(std::size_t index, RegionId region, std::int64_t place);
  // The same of what is no stream yet.
  bool may_become(std::size_t index, RegionId region, std::int64_t place);
  void bring(std::size_t index, RegionId region, std::int64_t from);
  bool is_near(std::size_t index, std::int64_t place) const;
  // How far from its last place it may be found again.
  void look_for(std::size_t index, std::int64_t reach);
  std::int64_t first_touched(std::int64_t place, std::int64_t step) const;

  // Of each stream, where it may be found again: all that most faults look at.
  std::array<std::int64_t, kStreams> from_;
  std::array<std::uint32_t, kStreams> span_{};
  std::array<Stream, kStreams> streams_{};
  const std::int64_t around_;
  std::size_t oldest_ = 0;
  unsigned needed_ = kNeededMin;
  std::optional<Ahead> ahead_;
};

}  // namespace uffdkit
