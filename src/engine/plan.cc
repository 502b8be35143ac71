#include "engine/plan.h"

#include <algorithm>

namespace uffdkit {
namespace {

[[gnu::hot]] FaultPlan::Action action_for(const PageTable& table, PageRange page, Lost lost) {
  bool all_zero = true;
  for (PageIndex at = page.first; at < page.end();) {
    const PageState state = table.get(at);
    if (state == PageState::fetching) return FaultPlan::Action::wait;
    if (state == PageState::poisoned) return FaultPlan::Action::poison;
    const bool was_lost = state == PageState::installed && lost == Lost::zero;
    all_zero = all_zero && (reads_as_zero(state) || was_lost);
    at = at + PageCount(1);
    if (at < page.end()) at = table.end_of_run(at, page.end(), state);
  }
  return all_zero ? FaultPlan::Action::zero : FaultPlan::Action::read;
}

}  // namespace

[[gnu::hot]] FaultPlan plan_fault(const PageTable& table, const Segment& segment, PageIndex fault,
                                  PageCount around, Lost lost) {
  const PageRange page = page_of(segment, fault);
  const FaultPlan::Action action = action_for(table, page, lost);
  FaultPlan plan{.action = action, .granules = page};
  const bool brings_neighbours = action == FaultPlan::Action::read || action == FaultPlan::Action::zero;
  if (!brings_neighbours || around <= page.count) return plan;

  const PageRange segment_granules = segment.granules();
  const PageIndex window_start(page.first.value & ~(around.value - 1));
  const PageIndex first = std::max(window_start, segment_granules.first);
  const PageIndex end = std::min(window_start + around, segment_granules.end());
  const PageState wanted = action == FaultPlan::Action::read ? PageState::absent : PageState::removed;
  // Only regions of 4 KiB pages come here with neighbours unless the window spans several huge pages; then
  // the run is cut back to whole pages.
  const PageIndex run_first = table.start_of_run(page.first, first, wanted);
  const PageIndex run_end = table.end_of_run(page.end(), end, wanted);
  const std::uint64_t whole_pages = ~(page.count.value - 1);
  const std::uint64_t before = (page.first - run_first).value & whole_pages;
  const std::uint64_t behind = (run_end - page.end()).value & whole_pages;
  plan.granules = {page.first - PageCount(before), page.count + PageCount(before + behind)};
  return plan;
}

}  // namespace uffdkit
