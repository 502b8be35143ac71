// io_uring, for the reads of images that wait for a disk (docs/decisions/0014-reads.md).
//
// The rings are made before the process gives up the system calls that make them, and can do nothing but read
// what is open: what io_uring does, no filter of system calls sees. Threads: any.
#pragma once

#include <uffdkit/error.h>

#include <atomic>
#include <cstddef>
#include <memory>
#include <mutex>
#include <vector>

#include "store/batch_reader.h"

namespace uffdkit {

class ReadRings final : public BatchReaders {
 public:
  // Enough for the threads of one image that read what nobody waits for.
  static constexpr unsigned kRings = 4;

  // Errors: the kernel has no such io_uring (before 5.10), or it is refused, as many containers do.
  static Result<std::shared_ptr<ReadRings>> create();
  ~ReadRings() override;

  BatchReader* take() override;
  bool has_any() const override { return usable_.load(std::memory_order_relaxed) > 0; }
  void give_back(BatchReader& reader) override;

 private:
  class Ring;
  explicit ReadRings(std::vector<std::unique_ptr<Ring>> rings);

  const std::vector<std::unique_ptr<Ring>> rings_;
  std::mutex mutex_;
  std::vector<Ring*> free_;  // the one that was used last is last
  std::atomic<std::size_t> usable_{rings_.size()};
};

}  // namespace uffdkit
