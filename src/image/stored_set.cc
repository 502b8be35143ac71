#include "image/stored_set.h"

#include <utility>

namespace uffdkit::image {

StoredSet::StoredSet(std::shared_ptr<Store> by_file, std::shared_ptr<Store> alone)
    : by_file_(std::move(by_file)),
      alone_(std::move(alone)),
      file_ahead_(dynamic_cast<ReadAhead&>(*by_file_)),
      alone_ahead_(dynamic_cast<ReadAhead&>(*alone_)) {}

std::optional<Error> StoredSet::problem() {
  const std::lock_guard lock(mutex_);
  return std::exchange(problem_, std::nullopt);
}

Result<ReadStatus> StoredSet::read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept {
  if (is_damaged_.load(std::memory_order_relaxed)) return alone_->read(from, to, wait);
  Result<ReadStatus> read = by_file_->read(from, to, wait);
  if (read) return read;
  Result<ReadStatus> without = alone_->read(from, to, wait);
  // Where the image cannot be read either, it may be the image's fault.
  if (!without || *without != ReadStatus::done || is_damaged_.exchange(true)) return without;
  const std::lock_guard lock(mutex_);
  problem_ = std::move(read).error();
  return without;
}

}  // namespace uffdkit::image
