#include "sim/context.h"

#include <algorithm>
#include <cerrno>

#include "base/check.h"
#include "sim/descriptors.h"

namespace uffdkit::sim {

std::shared_ptr<AddressSpace> Context::space() const {
  std::shared_ptr<AddressSpace> space = space_.lock();
  return space && space->alive ? space : nullptr;
}

// Source: ioctl_userfaultfd(2), UFFDIO_WAKE. What is compared is the address of the message, which is that of
// the page unless EXACT_ADDRESS is enabled.
void Context::wake(std::uint64_t start, std::uint64_t end) {
  for (std::list<FaultWait*>* queue : {&unread_, &taken_}) {
    for (auto it = queue->begin(); it != queue->end();) {
      const std::uint64_t address = (*it)->message_.arg.pagefault.address;
      if (address < start || address >= end) {
        ++it;
        continue;
      }
      (*it)->sleeper_.wake();
      it = queue->erase(it);
    }
  }
}

// Faults first, in their order, then events in theirs, even if an event came before the first fault: a reader
// has to empty the descriptor before it serves anything. Source: fs/userfaultfd.c, userfaultfd_ctx_read().
int Context::take_message(DescriptorTable& reader, abi::Msg& message) {
  if (!unread_.empty()) {
    FaultWait* fault = unread_.front();
    unread_.pop_front();
    taken_.push_back(fault);
    message = fault->message_;
    return 0;
  }
  if (events_.empty()) return -EAGAIN;

  EventWait* event = events_.front();
  events_.pop_front();
  if (event->forked_) {
    // The child's userfaultfd becomes a descriptor of whoever reads, with the flags of the parent's. If there
    // is no room for it, the event goes back, behind the others.
    const int fd = reader.install(std::make_shared<UffdFile>(event->forked_), event->forked_->flags);
    if (fd < 0) {
      events_.push_back(event);
      return fd;
    }
    event->message_.arg.fork.ufd = static_cast<std::uint32_t>(fd);
  }
  message = event->message_;
  event->read_ = true;
  event->sleeper_.wake();
  return 0;
}

// Source: userfaultfd(2), "when all file descriptors ... are closed".
void Context::release() {
  released = true;
  if (const std::shared_ptr<AddressSpace> memory = space()) {
    for (Area* area : memory->in_range(0, UINT64_MAX))
      if (area->context.get() == this && area->registered_for(abi::kRegisterWp))
        memory->protect(*area, area->start, area->end, false);
    forget_areas();
  }
  wake(0, UINT64_MAX);
  for (EventWait* event : events_) event->sleeper_.wake();
}

void Context::forget_areas() {
  const std::shared_ptr<AddressSpace> memory = space();
  if (!memory) return;
  const ContextPtr self = shared_from_this();
  memory->change(0, UINT64_MAX, [&](Area& area) {
    if (area.context != self) return;
    area.context = nullptr;
    area.modes = 0;
  });
}

bool Context::has_queued(const Sleeper& sleeper) const {
  const auto is_it = [&](const auto* wait) { return &wait->sleeper_ == &sleeper; };
  return std::ranges::any_of(unread_, is_it) || std::ranges::any_of(taken_, is_it) ||
         std::ranges::any_of(events_, is_it);
}

FaultWait::FaultWait(ContextPtr context, Sleeper& sleeper, abi::Msg message)
    : context_(std::move(context)), sleeper_(sleeper), message_(message) {
  context_->unread_.push_back(this);
}

FaultWait::~FaultWait() {
  context_->unread_.remove(this);
  context_->taken_.remove(this);
}

EventWait::EventWait(Changing changing, Sleeper& sleeper, abi::Msg message, ContextPtr forked)
    : changing_(std::move(changing)), sleeper_(sleeper), message_(message), forked_(std::move(forked)) {
  if (!changing_.context()->released) changing_.context()->events_.push_back(this);
}

// NOLINTNEXTLINE(bugprone-exception-escape): only want of memory throws.
EventWait::~EventWait() {
  changing_.context()->events_.remove(this);
  // Nobody will ever hold a descriptor for the child's memory, so its areas must not wait for one.
  if (forked_ && !read_) forked_->forget_areas();
}

}  // namespace uffdkit::sim
