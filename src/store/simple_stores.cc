// The stores that need no I/O: zeros, and bytes in memory.
#include <uffdkit/signal_safe_store.h>
#include <uffdkit/store.h>

#include <cstring>
#include <utility>
#include <vector>

namespace uffdkit {
namespace {

ByteCount round_up_to_page(std::uint64_t bytes) {
  return ByteCount(kPage4K.round_down(bytes + 4095));
}

class ZeroStore final : public Store, public SignalSafeStore {
 public:
  explicit ZeroStore(ByteCount size) : size_(size) {}
  ByteCount size() const noexcept override { return size_; }
  std::string name() const override { return "zero"; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = true, .end = StoreOffset(size_.value)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait) noexcept override {
    read_in_handler(from, to);
    return ReadStatus::done;
  }
  int read_in_handler(StoreOffset, std::span<std::byte> to) noexcept override {
    std::memset(to.data(), 0, to.size());
    return 0;
  }

 private:
  const ByteCount size_;
};

class MemoryStore final : public Store, public SignalSafeStore {
 public:
  MemoryStore(std::span<const std::byte> bytes, std::string name)
      : bytes_(bytes.begin(), bytes.end()), name_(std::move(name)) {
    bytes_.resize(round_up_to_page(bytes.size()).value);
  }
  ByteCount size() const noexcept override { return ByteCount(bytes_.size()); }
  std::string name() const override { return name_; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(bytes_.size())};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait) noexcept override {
    read_in_handler(from, to);
    return ReadStatus::done;
  }
  int read_in_handler(StoreOffset from, std::span<std::byte> to) noexcept override {
    std::memcpy(to.data(), bytes_.data() + from.value, to.size());
    return 0;
  }

 private:
  std::vector<std::byte> bytes_;
  const std::string name_;
};

}  // namespace

std::shared_ptr<Store> make_zero_store(ByteCount size) {
  return std::make_shared<ZeroStore>(round_up_to_page(size.value));
}

std::shared_ptr<Store> make_memory_store(std::span<const std::byte> bytes, std::string name) {
  return std::make_shared<MemoryStore>(bytes, std::move(name));
}

}  // namespace uffdkit
