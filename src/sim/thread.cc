#include "sim/thread.h"

#include "base/check.h"

namespace uffdkit::sim {

void ThreadImpl::start(Operation operation) {
  CHECK(state_ == State::idle);
  operation_ = std::move(operation);
  last_.reset();
  state_ = State::runnable;
}

void ThreadImpl::turn() {
  CHECK(state_ == State::runnable);
  operation_.resume();
  if (!operation_.done()) return;
  last_ = operation_.completion();
  operation_ = Operation();
  state_ = State::idle;
  signal_pending_ = false;  // its handler runs on the way back to user mode
}

void ThreadImpl::end() {
  state_ = State::dead;
  waits_for_ = nullptr;
  operation_ = Operation();
}

void ThreadImpl::wake() {
  if (state_ == State::fault_sleep || state_ == State::event_sleep) state_ = State::runnable;
}

// A sleep in a fault is interrupted; one for an event only by death. Source: fs/userfaultfd.c,
// userfaultfd_get_blocking_state(), userfaultfd_event_wait_completion().
void ThreadImpl::signal() {
  if (state_ == State::idle || state_ == State::dead) return;
  signal_pending_ = true;
  if (state_ == State::fault_sleep) wake();
}

void ThreadImpl::access(Access access) {
  start(access_memory(*this, access));
}
void ThreadImpl::map(MapRequest request) {
  start(map_memory(*this, std::move(request)));
}
void ThreadImpl::unmap(AddressRange range) {
  start(unmap_memory(*this, range));
}
void ThreadImpl::advise(AddressRange range, Advice advice) {
  switch (advice) {
    case Advice::dont_need:
    case Advice::free:
    case Advice::remove:
      return start(advise_memory(*this, range, advice));
    case Advice::dont_fork:
    case Advice::huge_page:
    case Advice::no_huge_page:
      return start(mark_memory(*this, range, advice));
    case Advice::page_out:
      return start(page_out_memory(*this, range));
    case Advice::collapse:
      return start(collapse_memory(*this, range));
  }
}
void ThreadImpl::remap(Remap remap) {
  start(remap_memory(*this, remap));
}
void ThreadImpl::protect(AddressRange range, bool readable, bool writable) {
  start(protect_memory(*this, range, readable, writable));
}
void ThreadImpl::fork() {
  start(fork_process(*this));
}

}  // namespace uffdkit::sim
