// The pauses between tries: each twice as long as the one before, up to a limit.
#pragma once

#include <algorithm>
#include <chrono>
#include <utility>

namespace uffdkit::internal {

class Backoff {
 public:
  using Pause = std::chrono::milliseconds;
  Backoff(Pause first, Pause most) : next_(first), most_(most) {}

  Pause next() { return std::exchange(next_, std::min(2 * next_, most_)); }

 private:
  Pause next_;
  const Pause most_;
};

}  // namespace uffdkit::internal
