#include "manager/read_rings.h"

#include <liburing.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <utility>

#include "base/check.h"

namespace uffdkit {
namespace {

constexpr unsigned kReadsMost = 64;

Failure refused(int os_error) {
  return Failure(Error::from_errno("make an io_uring that only reads", os_error)
                     .with_remedy("images are read by threads instead, which serves as well, but keeps more "
                                  "of a CPU busy where many single pages come from a disk"));
}

}  // namespace

class ReadRings::Ring final : public BatchReader {
 public:
  static Result<std::unique_ptr<Ring>> make() {
    auto made = std::unique_ptr<Ring>(new Ring());
    // Without interrupting a thread that has something else to do: who reads waits for it. Since 5.19.
    int refusal = made->set_up(IORING_SETUP_R_DISABLED | IORING_SETUP_COOP_TASKRUN);
    if (refusal == -EINVAL) refusal = made->set_up(IORING_SETUP_R_DISABLED);
    if (refusal < 0) return refused(-refusal);
    io_uring_restriction only_reads{};
    only_reads.opcode = IORING_RESTRICTION_SQE_OP;
    only_reads.sqe_op = IORING_OP_READ;
    if (!made->registers(IORING_REGISTER_RESTRICTIONS, &only_reads, 1) ||
        !made->registers(IORING_REGISTER_ENABLE_RINGS, nullptr, 0))
      return refused(errno);
    // Entries would be two processes' otherwise, and the completions whoever's comes first.
    if (const int result = ::io_uring_ring_dontfork(&made->ring_); result < 0) return refused(-result);
    return made;
  }
  ~Ring() override {
    if (is_set_up_) ::io_uring_queue_exit(&ring_);
  }
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  std::size_t most() const override { return kReadsMost; }

  void begin(FilePart from, std::span<std::byte> to, std::uint64_t tag) override {
    waiting_.push_back(tag);
    if (!begins_) return;
    io_uring_sqe* entry = ::io_uring_get_sqe(&ring_);
    CHECK(entry != nullptr);
    ::io_uring_prep_read(entry, from.file, to.data(), static_cast<unsigned>(to.size()), from.offset);
    entry->user_data = tag;
  }

  std::span<const Done> wait() override {
    done_.clear();
    while (done_.empty() && (under_way_ > 0 || !waiting_.empty())) {
      const int result = begins_ ? ::io_uring_submit_and_wait(&ring_, 1) : -EAGAIN;
      if (result > 0) {
        under_way_ += static_cast<std::size_t>(result);
        waiting_.erase(waiting_.begin(), waiting_.begin() + result);
      } else if (result < 0 && result != -EINTR) {
        give_up(result);
      }
      take_completions();
    }
    return done_;
  }

  bool is_usable() const { return begins_; }

 private:
  Ring() = default;

  int set_up(unsigned flags) {
    io_uring_params params{};
    params.flags = flags;
    const int result = ::io_uring_queue_init_params(kReadsMost, &ring_, &params);
    is_set_up_ = result == 0;
    return result;
  }

  // The library's own functions for these are not in Debian 12's shared one.
  bool registers(unsigned what, const void* argument, unsigned count) const {
    return ::syscall(SYS_io_uring_register, ring_.ring_fd, what, argument, count) == 0;
  }

  // The kernel has no memory for more. What it has begun is waited for, since it has the buffers; the rest
  // are told as failed, and stay in the ring's queue, so that nothing is begun by it any more.
  void give_up(int os_error) {
    begins_ = false;
    for (const std::uint64_t tag : std::exchange(waiting_, {}))
      done_.push_back({.tag = tag, .result = os_error});
    io_uring_cqe* completion = nullptr;
    if (done_.empty()) (void)::io_uring_wait_cqe(&ring_, &completion);
  }

  void take_completions() {
    unsigned head = 0;
    unsigned count = 0;
    const io_uring_cqe* completion = nullptr;
    io_uring_for_each_cqe(&ring_, head, completion) {
      done_.push_back({.tag = completion->user_data, .result = completion->res});
      ++count;
    }
    ::io_uring_cq_advance(&ring_, count);
    under_way_ -= count;
  }

  io_uring ring_{};
  bool is_set_up_ = false;
  bool begins_ = true;
  std::vector<std::uint64_t> waiting_;  // tags of those that the kernel has not seen, oldest first
  std::size_t under_way_ = 0;           // those that it has
  std::vector<Done> done_;
};

Result<std::shared_ptr<ReadRings>> ReadRings::create() {
  std::vector<std::unique_ptr<Ring>> rings;
  for (unsigned i = 0; i < kRings; ++i) {
    Result<std::unique_ptr<Ring>> ring = Ring::make();
    if (!ring) return Failure(std::move(ring).error());
    rings.push_back(std::move(*ring));
  }
  return std::shared_ptr<ReadRings>(new ReadRings(std::move(rings)));
}

ReadRings::ReadRings(std::vector<std::unique_ptr<Ring>> rings) : rings_(std::move(rings)) {
  for (const auto& ring : rings_) free_.push_back(ring.get());
}

ReadRings::~ReadRings() = default;

BatchReader* ReadRings::take() {
  const std::lock_guard lock(mutex_);
  if (free_.empty()) return nullptr;
  Ring* ring = free_.back();
  free_.pop_back();
  return ring;
}

void ReadRings::give_back(BatchReader& reader) {
  auto& ring = static_cast<Ring&>(reader);
  const std::lock_guard lock(mutex_);
  if (ring.is_usable())
    free_.push_back(&ring);
  else
    --usable_;
}

}  // namespace uffdkit
