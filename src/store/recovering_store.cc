#include "store/recovering_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <mutex>
#include <utility>

#include "base/clock.h"

namespace uffdkit {
namespace {

constexpr std::int64_t kReopenPauseNs = 10'000'000;

class RecoveringStore final : public Store {
 public:
  RecoveringStore(std::string name, ByteCount size, std::shared_ptr<Store> rest, Reopen reopen)
      : name_(std::move(name)), size_(size), reopen_(std::move(reopen)), rest_(std::move(rest)) {}

  ByteCount size() const noexcept override { return size_; }
  std::string name() const override { return name_; }

  Extent extent_at(StoreOffset from) const noexcept override {
    const std::shared_ptr<Store> rest = this->rest();
    if (!has(rest, from, ByteCount(1))) return {.zero = false, .end = StoreOffset(size_.value)};
    const Extent extent = rest->extent_at(from);
    return {.zero = extent.zero, .end = std::min(extent.end, StoreOffset(size_.value))};
  }

  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    std::shared_ptr<Store> rest = this->rest();
    if (!has(rest, from, ByteCount(to.size()))) {
      if (wait == Wait::no) return ReadStatus::would_block;
      if (auto there = look_again(); !there)
        return Failure(
            std::move(there).error().within(fmt::format("read {} at offset {}", name_, from.value)));
      rest = this->rest();
    }
    if (has(rest, from, ByteCount(to.size()))) return rest->read(from, to, wait);
    return Failure(Error(fmt::format("read {} at offset {}: it has {} bytes now, and had {}", name_,
                                     from.value, rest ? rest->size().value : 0, size_.value),
                         EIO));
  }

 private:
  static bool has(const std::shared_ptr<Store>& rest, StoreOffset from, ByteCount length) {
    return rest && from.value + length.value <= rest->size().value;
  }
  std::shared_ptr<Store> rest() const {
    const std::lock_guard lock(mutex_);
    return rest_;
  }
  Result<void> look_again() {
    const std::lock_guard only(reopen_mutex_);
    if (monotonic_ns() - reopened_ns_ < kReopenPauseNs) return last_;
    reopened_ns_ = monotonic_ns();
    Result<std::shared_ptr<Store>> opened = reopen_();
    last_ = opened ? Result<void>() : Failure(opened.error());
    const std::lock_guard lock(mutex_);
    if (opened) rest_ = *std::move(opened);
    return last_;
  }

  const std::string name_;
  const ByteCount size_;
  std::mutex reopen_mutex_;  // held while something may block, by those who may; guards the next three
  const Reopen reopen_;
  std::int64_t reopened_ns_ = 0;
  Result<void> last_;
  mutable std::mutex mutex_;  // guards rest_
  std::shared_ptr<Store> rest_;
};

}  // namespace

std::shared_ptr<Store> make_recovering_store(std::string name, ByteCount size, std::shared_ptr<Store> rest,
                                             Reopen reopen) {
  return std::make_shared<RecoveringStore>(std::move(name), size, std::move(rest), std::move(reopen));
}

}  // namespace uffdkit
