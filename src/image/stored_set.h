// The pages of an image's working set, stored for themselves in a file beside the image, and read there in
// the image's place: to bring them, nothing else has to be read and decompressed.
//
// The file is a diff of the image that shows the same memory (docs/working-sets.md). Like the working set it
// is a hint: one that is not of this image is left alone, and one that turns out to be damaged is read no
// more.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>

#include "store/read_ahead.h"

namespace uffdkit::image {

// What the file's name ends with, behind the image's own.
inline constexpr const char* kStoredSetSuffix = ".ws.img";

// The memory of an image that has such a file. Threads: any.
class StoredSet final : public Store, public ReadAhead {
 public:
  // Two stores of the same memory, each a ReadAhead: by the file first, and by the image alone.
  StoredSet(std::shared_ptr<Store> by_file, std::shared_ptr<Store> alone);

  // Why the file is read no more; told once.
  std::optional<Error> problem();

  ByteCount size() const noexcept override { return alone_->size(); }
  std::string name() const override { return alone_->name(); }
  Extent extent_at(StoreOffset from) const noexcept override { return alone_->extent_at(from); }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override;

  void will_need(StoreOffset from, ByteCount bytes) noexcept override { ahead().will_need(from, bytes); }
  std::uint64_t unit_at(StoreOffset from) const noexcept override { return ahead().unit_at(from); }
  bool is_only_copied() const noexcept override { return ahead().is_only_copied(); }

 private:
  void give_up(Error error);
  ReadAhead& ahead() const {
    return is_damaged_.load(std::memory_order_relaxed) ? alone_ahead_ : file_ahead_;
  }

  const std::shared_ptr<Store> by_file_;
  const std::shared_ptr<Store> alone_;
  ReadAhead& file_ahead_;
  ReadAhead& alone_ahead_;
  std::atomic<bool> is_damaged_{false};
  std::mutex mutex_;  // guards problem_
  std::optional<Error> problem_;
};

}  // namespace uffdkit::image
