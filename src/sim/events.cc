#include "sim/events.h"

#include <algorithm>

namespace uffdkit::sim {

bool wants(const Area& area, std::uint64_t feature) {
  return area.context && (area.context->features & feature) != 0;
}

abi::Msg event_message(std::uint8_t event, std::uint64_t start, std::uint64_t end) {
  abi::Msg message{};
  message.event = event;
  message.arg.remove = {.start = start, .end = end};
  return message;
}

// Source: fs/userfaultfd.c, userfaultfd_unmap_prep(), has_unmap_ctx().
void take_away(AddressSpace& space, std::uint64_t start, std::uint64_t end,
               std::vector<UnmapNotice>& notices) {
  if (start == end) return;
  for (Area* area : space.in_range(start, end)) {
    if (!wants(*area, abi::kFeatureEventUnmap)) continue;
    const bool told = std::ranges::any_of(notices, [&](const UnmapNotice& notice) {
      return notice.changing.context() == area->context && notice.start == start && notice.end == end;
    });
    if (!told) notices.push_back({.changing = Changing(area->context), .start = start, .end = end});
  }
  space.remove(start, end);
}

}  // namespace uffdkit::sim
