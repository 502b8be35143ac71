#include "engine/handler_buffers.h"

#include <fmt/format.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <bit>
#include <cerrno>
#include <chrono>
#include <thread>

namespace uffdkit {
namespace {

// How often wait_for() looks again.
constexpr std::chrono::microseconds kLook{50};

// A 32-bit number that threads can sleep on. std::atomic's own waiting promises nothing to signal handlers.
static_assert(sizeof(std::atomic<std::uint32_t>) == sizeof(std::uint32_t));

void sleep_while(std::atomic<std::uint32_t>& word, std::uint32_t value) {
  ::syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
}

void wake_one(std::atomic<std::uint32_t>& word) {
  ::syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

}  // namespace

Result<std::unique_ptr<HandlerBuffers>> HandlerBuffers::create(ByteCount bytes_each) {
  // Its own pages, all there: reading into a buffer must not need memory that has to be found first.
  const std::size_t bytes = bytes_each.value * kCount;
  void* memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
  if (memory == MAP_FAILED)
    return Failure(Error::from_errno(fmt::format("map {} bytes for buffers", bytes), errno));
  return std::unique_ptr<HandlerBuffers>(new HandlerBuffers(static_cast<std::byte*>(memory), bytes_each));
}

HandlerBuffers::~HandlerBuffers() {
  ::munmap(memory_, bytes_each_.value * kCount);
}

HandlerBuffers::Claim HandlerBuffers::claim() noexcept {
  std::uint32_t free = free_.load();
  for (;;) {
    if (free == 0) {
      ++sleepers_;
      sleep_while(free_, 0);
      --sleepers_;
      free = free_.load();
      continue;
    }
    const std::uint32_t without_lowest = free & (free - 1);
    if (free_.compare_exchange_weak(free, without_lowest))
      return Claim(*this, static_cast<unsigned>(std::countr_zero(free)));
  }
}

void HandlerBuffers::wait_for(AddressRange range) const {
  for (const Use& use : uses_) {
    const std::uint32_t turn = use.turn.load();
    if (turn % 2 == 0) continue;
    const AddressRange announced{Address(use.start.load()), ByteCount(use.length.load())};
    if (!announced.overlaps(range)) continue;
    while (use.turn.load() == turn) std::this_thread::sleep_for(kLook);
  }
}

std::span<std::byte> HandlerBuffers::Claim::bytes() const {
  return {buffers_.memory_ + index_ * buffers_.bytes_each_.value, buffers_.bytes_each_.value};
}

void HandlerBuffers::Claim::announce(AddressRange range) noexcept {
  Use& use = buffers_.uses_[index_];
  use.start = range.start.value;
  use.length = range.length.value;
  ++use.turn;
}

HandlerBuffers::Claim::~Claim() {
  Use& use = buffers_.uses_[index_];
  if (use.turn.load() % 2 != 0) ++use.turn;
  buffers_.free_.fetch_or(1u << index_);
  // A sleeper that is not counted yet finds the bit: it looks at free_ after it has counted itself.
  if (buffers_.sleepers_.load() != 0) wake_one(buffers_.free_);
}

}  // namespace uffdkit
