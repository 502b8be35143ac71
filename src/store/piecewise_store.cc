#include "store/piecewise_store.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace uffdkit {
namespace {

StoreOffset end_of(const StorePiece& piece) {
  return piece.at + piece.length;
}

class PiecewiseStore final : public Store {
 public:
  PiecewiseStore(std::string name, ByteCount size, std::vector<StorePiece> pieces)
      : name_(std::move(name)), size_(size), pieces_(std::move(pieces)) {
    StoreOffset free_from(0);
    for (const StorePiece& piece : pieces_) {
      CHECK(piece.at >= free_from && piece.length.value > 0 && end_of(piece).value <= size_.value);
      CHECK(piece.from.value + piece.length.value <= piece.source->size().value);
      CHECK(kPage4K.is_aligned(piece.at.value | piece.length.value | piece.from.value));
      free_from = end_of(piece);
    }
  }

  ByteCount size() const noexcept override { return size_; }
  std::string name() const override { return name_; }

  Extent extent_at(StoreOffset from) const noexcept override {
    const auto piece = piece_at(from);
    if (piece == pieces_.end()) return {.zero = true, .end = StoreOffset(size_.value)};
    if (from < piece->at) return {.zero = true, .end = piece->at};
    const Extent inner = piece->source->extent_at(piece->from + (from - piece->at));
    return {.zero = inner.zero, .end = std::min(end_of(*piece), piece->at + (inner.end - piece->from))};
  }

  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    for (auto piece = piece_at(from); !to.empty(); ++piece) {
      const StoreOffset data = piece == pieces_.end() ? StoreOffset(size_.value) : piece->at;
      if (from < data) {
        const std::size_t zeros = std::min<std::uint64_t>(to.size(), (data - from).value);
        std::memset(to.data(), 0, zeros);
        to = to.subspan(zeros);
        from = from + ByteCount(zeros);
      }
      if (to.empty()) break;
      const std::size_t bytes = std::min<std::uint64_t>(to.size(), (end_of(*piece) - from).value);
      Result<ReadStatus> read = piece->source->read(piece->from + (from - piece->at), to.first(bytes), wait);
      if (!read || *read != ReadStatus::done) return read;
      to = to.subspan(bytes);
      from = from + ByteCount(bytes);
    }
    return ReadStatus::done;
  }

 private:
  // The first piece that ends behind `from`.
  std::vector<StorePiece>::const_iterator piece_at(StoreOffset from) const {
    return std::partition_point(pieces_.begin(), pieces_.end(),
                                [&](const StorePiece& piece) { return end_of(piece) <= from; });
  }

  const std::string name_;
  const ByteCount size_;
  const std::vector<StorePiece> pieces_;
};

}  // namespace

std::shared_ptr<Store> make_piecewise_store(std::string name, ByteCount size,
                                            std::vector<StorePiece> pieces) {
  return std::make_shared<PiecewiseStore>(std::move(name), size, std::move(pieces));
}

}  // namespace uffdkit
