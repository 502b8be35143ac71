// What a client has done to its address space: each message changes the layout and the page states.
#include "engine/session.h"

#include <fmt/format.h>

#include <utility>

#include "base/step.h"
#include "engine/session_detail.h"

namespace uffdkit {

using namespace session;

std::uint64_t Session::apply(const Message& event, std::uint8_t kind) {
  // Somebody else has let the client go on, and what lies where may not be what it was.
  if (waiting_.paused.load(std::memory_order_relaxed)) unpause();
  if (const auto* removed = std::get_if<RemoveEvent>(&event)) {
    apply(*removed);
    return kPage4K.pages(removed->range.length).value;
  }
  if (const auto* unmapped = std::get_if<UnmapEvent>(&event)) {
    apply(*unmapped);
    return kPage4K.pages(unmapped->range.length).value;
  }
  if (const auto* moved = std::get_if<RemapEvent>(&event)) {
    apply(*moved);
  } else if (const auto* forked = std::get_if<ForkEvent>(&event)) {
    apply(*forked);
  } else {
    fail(fmt::format("an event of kind {:#x} cannot be followed", kind));
  }
  return 0;
}

void Session::apply_inbox(const std::function<bool(int)>& may_adopt) {
  const std::span<const abi::Msg> messages = state_.inbox();
  for (std::size_t i = state_.unapplied(); i < messages.size() && messages[i].event != 0; ++i) {
    const abi::Msg raw = messages[i];
    const Message message = decode(raw);
    if (std::holds_alternative<Fault>(message)) continue;
    const auto* forked = std::get_if<ForkEvent>(&message);
    state_.applying(i);
    if (forked == nullptr || may_adopt(forked->child_fd)) apply(message, raw.event);
    uffdkit::step();
    state_.applied();
  }
  (void)state_.empty_inbox();
}

void Session::apply(const RemoveEvent& event) {
  add(counters_->events);
  for (const RegionPart& part : state_.layout().parts_in(event.range)) {
    // There the kernel shows what is in the image's memory, now and later: so do we.
    const SharingMode sharing = state_.regions()[part.region].sharing;
    if (sharing != SharingMode::page_cache) state_.table(part.region).set(part.granules, PageState::removed);
    // That has to become zero before the memory is left to itself.
    if (sharing == SharingMode::resolve) populate_again_from(event.range.start);
    add(counters_->pages_removed, part.granules.count.value);
  }
}

void Session::apply(const UnmapEvent& event) {
  add(counters_->events);
  if (auto erased = state_.erase(event.range); !erased) fail(erased.error().message());
  forget_dropped_regions();
}

void Session::apply(const RemapEvent& event) {
  add(counters_->events);
  // Without a length it is a second mapping of the same file.
  auto moved = event.from.length.value != 0 ? state_.move(event.from, event.to)
                                            : state_.map_again(event.from.start, event.to);
  if (!moved) fail(moved.error().message());
  populate_again_from(event.to);
  forget_dropped_regions();
}

void Session::apply(const ForkEvent& event) {
  add(counters_->events);
  // The kernel made the child's with the features of its parent's.
  Uffd child = uffd_.adopt_child(event.child_fd);
  // What the parent's memory holds, the child's holds too: nothing was filled since fork(2) began, because
  // the kernel refuses that until this message has been read.
  Result<SessionState> state = state_.clone();
  if (!state) return condemn_child(std::move(child), std::move(state).error());
  std::vector<std::shared_ptr<StoreLane>> lanes;
  std::vector<std::shared_ptr<SharedImage>> shared;
  for (const RegionServing& serving : serving_) {
    lanes.push_back(serving.lane);
    shared.push_back(serving.shared);
  }
  auto session = std::make_unique<ForkedSession>(ForkedSession{.uffd = std::move(child),
                                                               .state = std::move(*state),
                                                               .lanes = std::move(lanes),
                                                               .shared = std::move(shared)});
  if (auto taken = host_.forked(session); !taken)
    condemn_child(std::move(session->uffd), std::move(taken).error());
}

}  // namespace uffdkit
