// fork(2): what a child gets of its parent's memory, and of its registration.
#include <algorithm>
#include <utility>

#include "sim/events.h"
#include "sim/machine.h"

namespace uffdkit::sim {
namespace {

abi::Msg fork_message() {
  abi::Msg message{};
  message.event = abi::kEventFork;
  return message;
}

// nullptr: the pool of huge pages is empty.
FramePtr copy_of(const Frame& frame) {
  if (frame.pool && !frame.pool->take(false)) return nullptr;
  auto copy = std::make_shared<Frame>(frame.bytes.size(), frame.pool);
  copy->bytes = frame.bytes;
  return copy;
}

struct ForkNotice {
  Changing changing;
  ContextPtr parent;
  ContextPtr child;
};

// The entry that a child gets, and what becomes of the parent's. Private pages are shared from now on, to be
// copied by the next write; those that are pinned are copied at once, because a device must go on seeing the
// parent's. Armed pages stay armed only where the child is registered for it. Source: mm/memory.c,
// copy_present_pte(), copy_present_page(), copy_nonpresent_pte(); mm/hugetlb.c, copy_hugetlb_page_range().
std::optional<Pte> share_entry(Pte& parent, const Area& child_area) {
  const bool armed = parent.wp && child_area.registered_for(abi::kRegisterWp);
  if (parent.marker()) {
    if (!parent.poison && !armed) return std::nullopt;
    return Pte{.wp = armed && !parent.poison, .poison = parent.poison};
  }
  if (parent.anon && parent.frame->pins > 0) {
    FramePtr copy = copy_of(*parent.frame);
    if (copy) return Pte{.frame = std::move(copy), .anon = true, .writable = parent.writable, .wp = armed};
  }
  if (!child_area.shared()) {
    parent.writable = false;
    if (parent.anon) parent.frame->exclusive = false;
  }
  Pte child = parent;
  child.wp = armed;
  return child;
}

// Source: kernel/fork.c, dup_mmap(); fs/userfaultfd.c, dup_userfaultfd(); mm/memory.c, vma_needs_copy().
void share_memory(AddressSpace& parent, const std::shared_ptr<AddressSpace>& child,
                  std::vector<ForkNotice>& notices) {
  for (const auto& [start, parent_area] : parent.areas()) {
    if (parent_area.dont_fork) continue;
    Area area = parent_area;
    area.reservation = nullptr;  // only who made the mapping owns it
    area.context = nullptr;
    area.modes = 0;
    if (wants(parent_area, abi::kFeatureEventFork)) {
      const auto known = std::ranges::find(notices, parent_area.context, &ForkNotice::parent);
      if (known == notices.end()) {
        auto context = std::make_shared<Context>(parent_area.context->flags, child);
        context->enabled = true;
        context->features = parent_area.context->features;
        notices.push_back({.changing = Changing(parent_area.context),
                           .parent = parent_area.context,
                           .child = std::move(context)});
        area.context = notices.back().child;
      } else {
        area.context = known->child;
      }
      area.modes = parent_area.modes;
    }
    // What the child can fault in again by itself is not copied.
    const bool copied = area.registered_for(abi::kRegisterWp) || area.anon_group != 0;
    child->areas().emplace(start, area);
    if (!copied) continue;
    auto& pages = parent.pages();
    for (auto it = pages.lower_bound(area.start); it != pages.end() && it->first < area.end; ++it)
      if (std::optional<Pte> pte = share_entry(it->second, area)) child->set(it->first, std::move(*pte));
    if (!area.anonymous()) continue;
    for (const std::uint64_t huge : parent.huge_in_range(area.start, area.end)) child->map_huge(huge);
  }
}

// A child that is not running yet; it never will if its parent dies before the event is read.
class Unborn {
 public:
  explicit Unborn(Process& child) : child_(&child) {}
  Unborn(const Unborn&) = delete;
  Unborn& operator=(const Unborn&) = delete;
  ~Unborn() {
    if (child_ != nullptr) child_->kill();
  }
  Process& release() { return *std::exchange(child_, nullptr); }

 private:
  Process* child_;
};

}  // namespace

Operation fork_process(ThreadImpl& thread) {
  ProcessImpl& parent = thread.process();
  Machine& machine = parent.machine();
  std::vector<ForkNotice> notices;
  const std::shared_ptr<AddressSpace> memory = machine.new_space();
  Unborn unborn(machine.new_process(parent.credentials(),
                                    std::make_shared<DescriptorTable>(*parent.descriptors()), memory));
  share_memory(*parent.space(), memory, notices);
  for (ForkNotice& notice : notices) {
    EventWait event(std::move(notice.changing), thread, fork_message(), std::move(notice.child));
    while (event.must_sleep()) co_await thread.sleep_for_event(event.context());
  }
  Process& child = unborn.release();
  child.spawn_thread();
  co_return Completion{.kind = Completion::Kind::result, .result = child.pid(), .child = &child};
}

}  // namespace uffdkit::sim
