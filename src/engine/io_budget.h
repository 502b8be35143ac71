// How fast may be read what nobody has asked for, by all sessions together.
//
// Whoever wants to read is told when, one behind the other in the order in which they asked: so all have
// their turn. Threads: any.
#pragma once

#include <uffdkit/units.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace uffdkit {

class IoBudget {
 public:
  // 0: as fast as it goes.
  explicit IoBudget(ByteCount bytes_per_second) : bytes_per_second_(bytes_per_second.value) {}

  // Takes so many bytes, and says at what time they may be read: `now_ns`, or later. Once for each read.
  std::int64_t take(ByteCount bytes, std::int64_t now_ns) {
    if (bytes_per_second_ == 0) return now_ns;
    const auto lasts = static_cast<std::int64_t>(static_cast<double>(bytes.value) * 1e9 /
                                                 static_cast<double>(bytes_per_second_));
    std::int64_t free = free_at_ns_.load(std::memory_order_relaxed);
    std::int64_t at = 0;
    do {
      at = std::max(free, now_ns);
    } while (!free_at_ns_.compare_exchange_weak(free, at + lasts, std::memory_order_relaxed));
    return at;
  }

 private:
  const std::uint64_t bytes_per_second_;
  std::atomic<std::int64_t> free_at_ns_{0};  // when all is read that was granted
};

}  // namespace uffdkit
