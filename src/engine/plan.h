// What to do about a fault: decided from what is known of the pages, without asking anybody. Pure.
#pragma once

#include <uffdkit/units.h>

#include <cstdint>

#include "engine/layout.h"
#include "engine/page_table.h"

namespace uffdkit {

struct FaultPlan {
  enum class Action : std::uint8_t {
    read,    // bring `granules` from the store
    zero,    // map zero pages over `granules`
    poison,  // the page cannot be had: `granules` is the page
    wait,    // the page is being fetched: whoever brings it wakes its readers
  };
  Action action;
  PageRange granules;  // a run of whole pages around the fault, within the segment
};

// What a page that was put there once, and is missing again, reads as.
enum class Lost : std::uint8_t {
  store,  // the store again: it may have gone without a word
  zero,   // it can only have been given back
};

// The page of the segment that holds `granule`.
inline PageRange page_of(const Segment& segment, PageIndex granule) {
  // Pages are counted from the segment's start, which is page aligned; they are powers of two.
  const std::uint64_t per_page = kPage4K.pages(segment.page_size.bytes()).value;
  const std::uint64_t into_segment = granule.value - segment.first.value;
  return {PageIndex(segment.first.value + (into_segment & ~(per_page - 1))), PageCount(per_page)};
}

// `fault` is the granule of the faulting address, within `segment`. `around` bounds the run that comes with
// the page: it is cut out of the aligned window of so many granules (a power of two), and holds, besides the
// faulting page, only pages which have never been asked for (read) or all have been removed (zero).
FaultPlan plan_fault(const PageTable& table, const Segment& segment, PageIndex fault, PageCount around,
                     Lost lost);

}  // namespace uffdkit
