// A userfaultfd: its queues, and the protocol by which threads sleep in them and readers take from them.
//
// The life of a fault: a thread puts itself into `unread` and sleeps; a read moves it to `taken`; a wake
// takes it out of either. The life of an event: a thread raises `changing`, puts its event into `events` and
// sleeps; a read takes the event out and makes the thread runnable; `changing` falls when the thread has had
// its next turn. Source: fs/userfaultfd.c, struct userfaultfd_ctx, struct userfaultfd_wait_queue.
#pragma once

#include <uffdkit/abi.h>

#include <list>
#include <memory>

#include "sim/address_space.h"

namespace uffdkit::sim {

// What sleeps in a queue.
class Sleeper {
 public:
  virtual ~Sleeper() = default;
  // Makes it runnable.
  virtual void wake() = 0;
};

class FaultWait;
class EventWait;
class DescriptorTable;

class Context : public std::enable_shared_from_this<Context> {
 public:
  Context(int creation_flags, std::weak_ptr<AddressSpace> memory)
      : flags(creation_flags), space_(std::move(memory)) {}

  const int flags;
  bool enabled = false;  // UFFDIO_API has been done
  std::uint64_t features = 0;
  bool released = false;  // its last descriptor is closed
  // Operations on the address space whose events are not read, or whose threads have not run since.
  int changing = 0;

  // The memory that it serves; nullptr when that process has exited or called exec.
  std::shared_ptr<AddressSpace> space() const;

  // UFFDIO_WAKE: whoever waits for an address in [start, end), read or unread, for whatever reason.
  void wake(std::uint64_t start, std::uint64_t end);

  // One message, as read(2) takes it: 0, -EAGAIN if there is none, or what kept the descriptor of a fork
  // event from being made in `reader`.
  int take_message(DescriptorTable& reader, abi::Msg& message);
  bool readable() const { return !unread_.empty() || !events_.empty(); }
  std::size_t unread_faults() const { return unread_.size(); }
  std::size_t waiting_faults() const { return unread_.size() + taken_.size(); }

  // Its last descriptor is closed: areas are nobody's from now on, and all sleepers go on.
  void release();
  // Its areas in `space` are nobody's from now on. The uffd-wp bits stay where they are.
  void forget_areas();

  bool has_queued(const Sleeper& sleeper) const;

 private:
  friend class FaultWait;
  friend class EventWait;

  std::weak_ptr<AddressSpace> space_;
  std::list<FaultWait*> unread_;
  std::list<FaultWait*> taken_;
  std::list<EventWait*> events_;
};

// A thread in a fault, queued as long as this object lives or until it is woken.
class FaultWait {
 public:
  FaultWait(ContextPtr context, Sleeper& sleeper, abi::Msg message);
  ~FaultWait();
  FaultWait(const FaultWait&) = delete;
  FaultWait& operator=(const FaultWait&) = delete;

 private:
  friend class Context;
  ContextPtr context_;
  Sleeper& sleeper_;
  abi::Msg message_;
};

// Keeps a userfaultfd's memory "changing": made when an operation begins, gone when its thread has run to the
// end of it.
class Changing {
 public:
  explicit Changing(ContextPtr context) : context_(std::move(context)) { ++context_->changing; }
  Changing(Changing&& other) noexcept = default;
  Changing& operator=(Changing&&) = delete;
  ~Changing() {
    if (context_) --context_->changing;
  }
  const ContextPtr& context() const { return context_; }

 private:
  ContextPtr context_;
};

// An event that nobody has read yet, queued as long as this object lives or until it is read.
class EventWait {
 public:
  // `forked`: of a fork event, the child's userfaultfd.
  EventWait(Changing changing, Sleeper& sleeper, abi::Msg message, ContextPtr forked = nullptr);
  ~EventWait();
  EventWait(const EventWait&) = delete;
  EventWait& operator=(const EventWait&) = delete;

  const Context& context() const { return *changing_.context(); }
  // False when it has been read, or when there is nobody left to read it.
  bool must_sleep() const { return !read_ && !changing_.context()->released; }

 private:
  friend class Context;
  Changing changing_;
  Sleeper& sleeper_;
  abi::Msg message_;
  ContextPtr forked_;
  bool read_ = false;
};

}  // namespace uffdkit::sim
