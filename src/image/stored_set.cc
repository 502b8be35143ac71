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
  const Result<ReadStatus> without = alone_->read(from, to, wait);
  if (!without || *without != ReadStatus::done) return without;
  // An error that has gone was not the file's, or not for long.
  read = by_file_->read(from, to, wait);
  if (read && *read == ReadStatus::done) return read;
  if (!read) give_up(std::move(read).error());
  return alone_->read(from, to, wait);
}

void StoredSet::give_up(Error error) {
  if (is_damaged_.exchange(true)) return;
  const std::lock_guard lock(mutex_);
  problem_ = std::move(error);
}

}  // namespace uffdkit::image
