// Buffers that threads in a signal handler read pages into; and for what memory each is in use.
//
// All of it is async-signal-safe but create() and wait_for(). Whoever has a buffer waits for no other, so who
// waits for one gets it.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/units.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace uffdkit {

class HandlerBuffers {
 public:
  // As many threads as one may expect to fault at the same moment, with their reads under way.
  static constexpr unsigned kCount = 16;

  // A buffer, until the end of this object.
  class Claim {
   public:
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;
    ~Claim();

    std::span<std::byte> bytes() const;
    // Says that bytes for `range` are read from here on. Once for each claim.
    void announce(AddressRange range) noexcept;

   private:
    friend class HandlerBuffers;
    Claim(HandlerBuffers& buffers, unsigned index) : buffers_(buffers), index_(index) {}
    HandlerBuffers& buffers_;
    const unsigned index_;
  };

  static Result<std::unique_ptr<HandlerBuffers>> create(ByteCount bytes_each);
  HandlerBuffers(const HandlerBuffers&) = delete;
  HandlerBuffers& operator=(const HandlerBuffers&) = delete;
  ~HandlerBuffers();

  // Waits until one is free.
  Claim claim() noexcept;

  // Waits until all claims have ended whose announcements overlap `range` and came before this call. Whatever
  // the caller wrote before (sequentially consistent) is seen by those who announce after.
  void wait_for(AddressRange range) const;

 private:
  struct Use {
    std::atomic<std::uint32_t> turn{0};  // odd while there is an announcement
    std::atomic<std::uint64_t> start{0};
    std::atomic<std::uint64_t> length{0};
  };

  HandlerBuffers(std::byte* memory, ByteCount bytes_each) : memory_(memory), bytes_each_(bytes_each) {}

  std::byte* const memory_;
  const ByteCount bytes_each_;
  std::array<Use, kCount> uses_;
  std::atomic<std::uint32_t> free_{(1u << kCount) - 1};  // a bit for each
  std::atomic<std::uint32_t> sleepers_{0};               // threads that wait for free_ to change from 0
};

}  // namespace uffdkit
