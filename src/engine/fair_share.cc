#include "engine/fair_share.h"

namespace uffdkit {
namespace {

constexpr std::int64_t kPeriodNs = 4 * FairShare::kSliceNs;
// In a period. A client that is restored gives nothing back, and seldom has several threads at one page; a
// balloon of one thread never fills a slice.
constexpr std::uint64_t kEventsMax = 2;
constexpr std::uint64_t kDuplicatesMax = 8;

}  // namespace

void FairShare::begin(std::int64_t now_ns, Told told) {
  began_ns_ = now_ns;
  slice_end_ns_ = now_ns + kSliceNs;
  if (now_ns - period_began_ns_ <= kPeriodNs && period_began_ns_ > rests_until_ns_) return;
  period_began_ns_ = now_ns;
  used_ns_ = 0;
  told_before_ = told;
}

bool FairShare::slice_has_ended(std::int64_t now_ns) {
  if (now_ns < slice_end_ns_) return false;
  slice_end_ns_ = now_ns + kSliceNs;
  return true;
}

bool FairShare::floods(std::int64_t now_ns, Told told) const {
  return used_ns_ + (now_ns - began_ns_) >= kSliceNs &&
         (told.events - told_before_.events >= kEventsMax ||
          told.duplicates - told_before_.duplicates >= kDuplicatesMax);
}

}  // namespace uffdkit
