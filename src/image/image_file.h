// One file of a compressed image, open for reading: its tables, and its frames as they are asked for.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "image/format.h"
#include "image/frame_cache.h"
#include "store/read_ahead.h"

namespace uffdkit::image {

// Threads: any, after open().
class ImageFile final : public FrameSource {
 public:
  // `file` gives the bytes of a file of `file_bytes`; `frames` gives the same ones, and is what frames are
  // read from. Reads and checks the tables, no frame. May block. Errors: it cannot be read; it is no image of
  // ours, or a damaged one. They name the file.
  static Result<std::shared_ptr<ImageFile>> open(Store& file, std::uint64_t file_bytes,
                                                 std::shared_ptr<Store> frames,
                                                 std::shared_ptr<FrameCache> cache);
  ~ImageFile() override;
  ImageFile(const ImageFile&) = delete;
  ImageFile& operator=(const ImageFile&) = delete;

  std::string name() const { return frames_->name(); }
  const Record& record() const { return record_; }
  std::uint64_t file_bytes() const { return file_bytes_; }
  std::size_t frame_count() const { return checksums_.size(); }
  // Of what its frames hold, put together.
  std::uint64_t stream_bytes() const { return stream_starts_.back(); }
  std::uint64_t stream_start(std::size_t frame) const { return stream_starts_[frame]; }
  std::uint64_t frame_bytes(std::size_t frame) const {
    return stream_starts_[frame + 1] - stream_starts_[frame];
  }
  // Of all frames.
  std::uint64_t compressed_bytes() const { return file_starts_.back(); }

  // The frame that has the byte of the stream at `from`; frame_count() behind its end.
  std::size_t frame_at(std::uint64_t from) const;

  // Fills `to` with the bytes of the stream at `from`; behind its end they are zero. Frames come from the
  // cache or into it. With Wait::no it decompresses what the file gives without blocking. Frames of zeros
  // that are longer than a frame's size must not be asked for.
  Result<ReadStatus> read_stream(std::uint64_t from, std::span<std::byte> to, Wait wait) noexcept;

  // Has the disk read ahead the frames that hold these bytes of the stream.
  void will_need(std::uint64_t from, std::uint64_t bytes) noexcept;

  // Decompresses a frame and checks it; also one of zeros of any length, for which `to` is left alone. For
  // others `to` has frame_bytes().
  Result<ReadStatus> decode_frame(std::size_t frame, std::span<std::byte> to, Wait wait) noexcept override;
  // Whether this is a frame of zeros that is longer than others may be.
  bool is_long(std::size_t frame) const { return frame_bytes(frame) > record_.frame_bytes; }

 private:
  ImageFile(std::uint64_t file_bytes, std::shared_ptr<Store> frames, std::shared_ptr<FrameCache> cache,
            Contents contents);
  Failure damaged(std::size_t frame, const std::string& what) const;

  const std::uint64_t file_bytes_;
  const std::shared_ptr<Store> frames_;
  ReadAhead* const frames_ahead_;  // the same; nullptr if it cannot be told
  const std::shared_ptr<FrameCache> cache_;
  const Record record_;
  // Where each frame begins, in the stream and in the file, and the end of the last.
  std::vector<std::uint64_t> stream_starts_;
  std::vector<std::uint64_t> file_starts_;
  std::vector<std::uint32_t> checksums_;
};

}  // namespace uffdkit::image
