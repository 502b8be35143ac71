#include "image/piece_file.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

namespace uffdkit::image {
namespace {

class PieceStore final : public Store {
 public:
  PieceStore(UniqueFd file, std::string name, std::vector<FilePiece> pieces)
      : file_(std::move(file)), name_(std::move(name)), pieces_(std::move(pieces)) {
    for (const FilePiece& piece : pieces_) {
      starts_.push_back(bytes_);
      bytes_ += piece.bytes;
    }
  }

  ByteCount size() const noexcept override { return ByteCount(bytes_); }
  std::string name() const override { return name_; }
  Extent extent_at(StoreOffset) const noexcept override {
    return {.zero = false, .end = StoreOffset(bytes_)};
  }

  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    if (wait == Wait::no) return ReadStatus::would_block;
    auto index =
        static_cast<std::size_t>(std::ranges::upper_bound(starts_, from.value) - starts_.begin() - 1);
    std::uint64_t at = from.value - starts_[index];
    for (; !to.empty(); ++index, at = 0) {
      const FilePiece& piece = pieces_[index];
      const auto part = to.first(std::min<std::uint64_t>(to.size(), piece.bytes - at));
      const std::size_t stored =
          std::min<std::uint64_t>(part.size(), piece.stored - std::min(piece.stored, at));
      std::memset(part.data() + stored, 0, part.size() - stored);
      if (auto read = read_file(piece.position + at, part.first(stored)); !read)
        return Failure(std::move(read).error());
      to = to.subspan(part.size());
    }
    return ReadStatus::done;
  }

 private:
  Result<void> read_file(std::uint64_t position, std::span<std::byte> to) const {
    while (!to.empty()) {
      const ssize_t bytes = ::pread(file_.get(), to.data(), to.size(), static_cast<off_t>(position));
      if (bytes < 0 && errno == EINTR) continue;
      if (bytes < 0)
        return Failure(Error::from_errno(fmt::format("read {} at {:#x}", name_, position), errno));
      if (bytes == 0) return Failure(Error(fmt::format("{} ends at {:#x}", name_, position), EIO));
      position += static_cast<std::uint64_t>(bytes);
      to = to.subspan(static_cast<std::size_t>(bytes));
    }
    return {};
  }

  const UniqueFd file_;
  const std::string name_;
  const std::vector<FilePiece> pieces_;
  std::vector<std::uint64_t> starts_;
  std::uint64_t bytes_ = 0;
};

}  // namespace

std::shared_ptr<Store> make_piece_store(UniqueFd file, std::string name, std::vector<FilePiece> pieces) {
  return std::make_shared<PieceStore>(std::move(file), std::move(name), std::move(pieces));
}

}  // namespace uffdkit::image
