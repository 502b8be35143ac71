#include "simulate/engine_client.h"

#include <fmt/format.h>

#include <array>

namespace uffdkit::simulate {

void EngineClient::begin_session(Uffd its_uffd, SessionState state,
                                 std::vector<std::shared_ptr<StoreLane>> lanes,
                                 const std::shared_ptr<StoreLane>& lane) {
  session = std::make_unique<Session>(
      std::move(its_uffd), std::move(state), std::move(lanes),
      SessionOptions{.fault_around = PageCount(std::uint64_t{1} << story.draw(5)),
                     .background = story.one_in(4) ? Background::full : Background::off,
                     .follow_streams = story.one_in(2)},
      *this);
  if (story.one_in(2)) prefetch(lane);
  next = {.again = true};
}

void EngineClient::prefetch(const std::shared_ptr<StoreLane>& lane) {
  std::vector<std::uint32_t> order;
  for (std::uint64_t page = story.draw(4); page < SeededStore::kPages; page += 1 + story.draw(4))
    order.push_back(static_cast<std::uint32_t>(page));
  story.shuffle(order);
  story.note(fmt::format("process {} is brought {} pages", process.pid(), order.size()));
  session->prefetch(std::make_shared<PrefetchOrder>(std::move(order)), lane, story.draw(1000));
}

bool EngineClient::is_due(const ManagerCalls& manager) const {
  if (!session) return false;
  return next.again || mail || process.alive() != was_alive ||
         (next.wake_at_ns != 0 && next.wake_at_ns <= clock) || manager.has_messages(session->uffd().fd());
}

void EngineClient::give_back_a_fetch(Bug bug) {
  if (!session) reading.clear();
  if (reading.empty()) return;
  const auto chosen = reading.begin() + static_cast<std::ptrdiff_t>(story.draw(reading.size()));
  std::unique_ptr<Fetch> fetch = std::move(*chosen);
  reading.erase(chosen);
  read_fetch(*fetch);
  if (bug == Bug::stale_fetch) forget_removals(*fetch);
  session->fetched(std::move(fetch));
  mail = true;
}

void EngineClient::forget_removals(const Fetch& fetch) {
  auto& state = const_cast<SessionState&>(session->state());
  for (RegionId id = 0; id < state.regions().size(); ++id) {
    if (!state.regions()[id].live) continue;
    const PageIndex first((fetch.from - state.regions()[id].offset).value / kPage);
    state.table(id).set({first, fetch.granules}, PageState::fetching);
  }
}

void EngineClient::look_at_end() {
  if (!session || !session->end()) return;
  constexpr std::array kNames = {"gone", "detached", "released", "abandoned", "failed"};
  story.note(fmt::format("the session of process {} has ended: {}", process.pid(),
                         kNames[static_cast<std::size_t>(*session->end())]));
  session.reset();
  // Nothing is registered any more when the client has closed its own descriptor, too: what it has added by
  // mremap(2) is known to nobody else.
  uffd.reset();
  reading.clear();
  next = {};
}

}  // namespace uffdkit::simulate
