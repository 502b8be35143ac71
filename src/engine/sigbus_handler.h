// The process's handler of SIGBUS: finds whose memory a fault lies in, and passes on what is nobody's.
//
// A signal handler can be given nothing, so what it uses is the process's: one table of ranges. It takes no
// lock. A fault announces itself in a range's count of readers, and then looks whether the range is still
// there; whoever takes a range out waits until the count is 0. fork(2) gives the child an empty table, since
// the userfaultfds in it fill memory of the parent.
#pragma once

#include <sys/types.h>
#include <uffdkit/error.h>
#include <uffdkit/units.h>

namespace uffdkit {

// Who brings the missing pages of a range.
class FaultResolver {
 public:
  virtual ~FaultResolver() = default;
  // Brings the page of `address`, which is in the range; on the thread that touched it, which has all signals
  // blocked and cannot be cancelled. Must be async-signal-safe. False: the page cannot be had.
  virtual bool resolve(Address address) noexcept = 0;
};

// The handler is installed while one of these exists. What it does not handle goes to the handler that was
// there before the first.
class SigbusHandler {
 public:
  // Errors: somebody else's handler took this one's place and is still there; no memory.
  static Result<SigbusHandler> install();
  SigbusHandler(SigbusHandler&& other) noexcept;
  SigbusHandler& operator=(SigbusHandler&&) = delete;
  ~SigbusHandler();

 private:
  SigbusHandler() = default;
  bool installed_ = true;
};

// A range whose faults go to `resolver`. There must be a SigbusHandler as long.
class HandledRange {
 public:
  // Errors: the process has 512 already.
  static Result<HandledRange> add(AddressRange range, FaultResolver& resolver);
  HandledRange(HandledRange&& other) noexcept;
  HandledRange& operator=(HandledRange&&) = delete;
  // Returns when no thread is in the resolver any more.
  ~HandledRange();

 private:
  struct Slot;
  struct Table;
  friend struct SigbusHandling;
  explicit HandledRange(Slot* slot);
  Slot* slot_;
  pid_t process_;
};

}  // namespace uffdkit
