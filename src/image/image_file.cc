#include "image/image_file.h"

#include <fmt/format.h>
#include <zstd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace uffdkit::image {
namespace {

struct Free {
  void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
};

// What a thread decompresses with, made when it does so first.
struct Scratch {
  std::unique_ptr<ZSTD_DCtx, Free> context{ZSTD_createDCtx()};
  std::vector<std::byte> buffer;  // for a frame as it is in the file; as long as the longest so far
};

Scratch& scratch() {
  thread_local Scratch of_this_thread;
  CHECK(of_this_thread.context != nullptr);
  return of_this_thread;
}

// Bytes [from, from + bytes) of a file, which lie within it.
Result<std::vector<std::byte>> read_part(Store& file, std::uint64_t from, std::uint64_t bytes) {
  std::vector<std::byte> to(bytes);
  Result<ReadStatus> read = file.read(StoreOffset(from), to, Wait::yes);
  if (!read) return Failure(std::move(read).error());
  return to;
}

Result<Contents> read_contents(Store& file, std::uint64_t file_bytes) {
  const std::string name = file.name();
  const auto in_file = [&](Error error) { return Failure(std::move(error).within(name)); };
  std::array<std::byte, kSeekFooterBytes> footer;
  if (file_bytes < footer.size()) return in_file(Error("it is too short for an image", EBADMSG));
  if (auto read = file.read(StoreOffset(file_bytes - footer.size()), footer, Wait::yes); !read)
    return Failure(std::move(read).error());
  Result<std::uint64_t> table_bytes = decode_footer(footer, file_bytes);
  if (!table_bytes) return in_file(std::move(table_bytes).error());
  const std::uint64_t table = file_bytes - *table_bytes;

  std::array<std::byte, 8> tail{};
  if (table >= tail.size())
    if (auto read = file.read(StoreOffset(table - tail.size()), tail, Wait::yes); !read)
      return Failure(std::move(read).error());
  Result<std::uint64_t> record_bytes = decode_record_length(tail, table);
  if (!record_bytes) return in_file(std::move(record_bytes).error());

  Result<std::vector<std::byte>> record = read_part(file, table - *record_bytes, *record_bytes);
  if (!record) return Failure(std::move(record).error());
  Result<std::vector<std::byte>> seek_table = read_part(file, table, *table_bytes);
  if (!seek_table) return Failure(std::move(seek_table).error());
  Result<Contents> contents = decode_contents(*record, *seek_table, file_bytes);
  if (!contents) return in_file(std::move(contents).error());
  return contents;
}

}  // namespace

Result<std::shared_ptr<ImageFile>> ImageFile::open(Store& file, std::uint64_t file_bytes,
                                                   std::shared_ptr<Store> frames,
                                                   std::shared_ptr<FrameCache> cache) {
  Result<Contents> contents = read_contents(file, file_bytes);
  if (!contents) return Failure(std::move(contents).error());
  return std::shared_ptr<ImageFile>(
      new ImageFile(file_bytes, std::move(frames), std::move(cache), std::move(*contents)));
}

ImageFile::ImageFile(std::uint64_t file_bytes, std::shared_ptr<Store> frames,
                     std::shared_ptr<FrameCache> cache, Contents contents)
    : file_bytes_(file_bytes),
      frames_(std::move(frames)),
      frames_ahead_(dynamic_cast<ReadAhead*>(frames_.get())),
      cache_(std::move(cache)),
      record_(std::move(contents.record)) {
  stream_starts_.reserve(contents.frames.size() + 1);
  file_starts_.reserve(contents.frames.size() + 1);
  checksums_.reserve(contents.frames.size());
  stream_starts_.push_back(0);
  file_starts_.push_back(0);
  for (const FrameEntry& frame : contents.frames) {
    stream_starts_.push_back(stream_starts_.back() + frame.bytes);
    file_starts_.push_back(file_starts_.back() + frame.compressed_bytes);
    checksums_.push_back(frame.checksum);
  }
}

ImageFile::~ImageFile() {
  cache_->forget(*this);
}

std::size_t ImageFile::frame_at(std::uint64_t from) const {
  return static_cast<std::size_t>(std::ranges::upper_bound(stream_starts_, from) - stream_starts_.begin() -
                                  1);
}

Result<ReadStatus> ImageFile::read_stream(std::uint64_t from, std::span<std::byte> to, Wait wait) noexcept {
  const std::uint64_t left = from < stream_bytes() ? stream_bytes() - from : 0;
  if (to.size() > left) {
    std::memset(to.data() + left, 0, to.size() - left);
    to = to.first(left);
  }
  for (std::size_t frame = frame_at(from); !to.empty(); ++frame) {
    CHECK(!is_long(frame));
    Result<FrameCache::FrameRef> found = cache_->get(*this, frame, frame_bytes(frame), wait);
    if (!found) return Failure(std::move(found).error());
    if (*found == nullptr) return ReadStatus::would_block;
    const auto bytes = FrameCache::bytes_of(**found).subspan(from - stream_starts_[frame]);
    const std::size_t taken = std::min(bytes.size(), to.size());
    std::memcpy(to.data(), bytes.data(), taken);
    to = to.subspan(taken);
    from += taken;
  }
  return ReadStatus::done;
}

void ImageFile::will_need(std::uint64_t from, std::uint64_t bytes) noexcept {
  const std::uint64_t end = std::min(from + bytes, stream_bytes());
  if (frames_ahead_ == nullptr || from >= end) return;
  const std::size_t first = frame_at(from);
  std::size_t frame = first;
  while (frame < frame_count() && stream_starts_[frame] < end) ++frame;
  frames_ahead_->will_need(StoreOffset(file_starts_[first]),
                           ByteCount(file_starts_[frame] - file_starts_[first]));
}

Result<ReadStatus> ImageFile::decode_frame(std::size_t frame, std::span<std::byte> to, Wait wait) noexcept {
  Scratch& with = scratch();
  const std::size_t compressed_bytes = file_starts_[frame + 1] - file_starts_[frame];
  if (with.buffer.size() < compressed_bytes) with.buffer.resize(compressed_bytes);
  const auto compressed = std::span(with.buffer).first(compressed_bytes);
  Result<ReadStatus> read = frames_->read(StoreOffset(file_starts_[frame]), compressed, wait);
  if (!read || *read != ReadStatus::done) return read;
  if (is_long(frame)) {
    // Only one sequence of bytes is accepted there, so it need not be decompressed.
    const auto bytes = static_cast<std::uint32_t>(frame_bytes(frame));
    if (!std::ranges::equal(compressed, encode_zero_frame(bytes)))
      return damaged(frame, "it is not all zero");
    if (checksum_of_zeros(bytes) != checksums_[frame]) return damaged(frame, "its checksum is wrong");
    return ReadStatus::done;
  }
  CHECK(to.size() == frame_bytes(frame));
  const std::size_t bytes =
      ZSTD_decompressDCtx(with.context.get(), to.data(), to.size(), compressed.data(), compressed.size());
  if (ZSTD_isError(bytes) != 0) return damaged(frame, ZSTD_getErrorName(bytes));
  if (bytes != to.size()) return damaged(frame, fmt::format("it has {} bytes, not {}", bytes, to.size()));
  if (checksum_of(to) != checksums_[frame]) return damaged(frame, "its checksum is wrong");
  return ReadStatus::done;
}

Failure ImageFile::damaged(std::size_t frame, const std::string& what) const {
  return Failure(
      Error(fmt::format("{}: frame {}, at bytes {} to {} of the file: {}", name(), frame, file_starts_[frame],
                        file_starts_[frame + 1], what),
            EBADMSG)
          .with_remedy("the image is damaged: restore it from a copy, or make it again; 'uffdkit image "
                       "verify' says whether anything else is"));
}

}  // namespace uffdkit::image
