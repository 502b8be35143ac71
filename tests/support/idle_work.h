// Work for a lane that has nothing to read, which does nothing but count.
#pragma once

#include <atomic>
#include <semaphore>

#include "engine/store_lane.h"

namespace uffdkit::test {

class CountedWork final : public IdleWork {
 public:
  void work_a_piece() override {
    ++done_;
    came_.release();
  }
  // Waits for one piece more.
  void wait() { came_.acquire(); }
  int done() const { return done_; }

 private:
  std::atomic<int> done_ = 0;
  std::counting_semaphore<> came_{0};
};

}  // namespace uffdkit::test
