// Children of a case: forked by a thread of their own, because fork(2) returns only when its event has been
// read.
#pragma once

#include <functional>
#include <optional>

#include "selftests/case.h"

namespace uffdkit::selftests {

// A child that runs `body` in a copy of this process and ends with what it returns, 99 for an exception.
// `uffd` serves `served`; who made it with EVENT_FORK reads the fork's message from it.
class ForkedChild {
 public:
  ForkedChild(const Uffd& uffd, AddressRange served, const std::function<int()>& body);

  const test::Background& waiter() const { return waiter_; }
  // What it ended with; minus the signal that killed it.
  int wait();

 private:
  int status_ = 0;
  test::Background waiter_;
};

// The userfaultfd of the child, whose fork is the next message.
Uffd take_child(const Uffd& uffd);

}  // namespace uffdkit::selftests
