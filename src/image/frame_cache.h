// Decompressed frames of images, kept as long as there is room.
//
// One for all images of a program. What is asked for by several threads at once is decompressed once: the
// first decompresses it, and the others wait for it, if they may. Frames that were not used for the longest
// time make room. Threads: any. No lock is held while a frame is read or decompressed.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <span>
#include <unordered_map>
#include <vector>

#include "image/frame_memory.h"

namespace uffdkit::image {

inline constexpr ByteCount kCacheBytesDefault{256u << 20};

// Where frames come from. Its address is its name in the cache, so it calls FrameCache::forget() at its end.
class FrameSource {
 public:
  virtual ~FrameSource() = default;
  // Fills `to` with frame number `frame`, all of it. As Store::read().
  virtual Result<ReadStatus> decode_frame(std::size_t frame, std::span<std::byte> to, Wait wait) noexcept = 0;
};

class FrameCache {
 public:
  // A frame's bytes, for as long as somebody holds it.
  struct Frame;
  using FrameRef = std::shared_ptr<const Frame>;

  // Keeps at most so many bytes, besides the frames that are being decompressed or copied from at this
  // moment: one a thread.
  explicit FrameCache(ByteCount bytes_max);
  ~FrameCache();
  FrameCache(const FrameCache&) = delete;
  FrameCache& operator=(const FrameCache&) = delete;

  // Frame number `frame` of `source`, which has `bytes` bytes. Null: it would have to be waited for; only
  // with Wait::no. Errors are those of decode_frame(); they are not kept, so that the next who asks tries
  // again.
  Result<FrameRef> get(FrameSource& source, std::size_t frame, std::size_t bytes, Wait wait) noexcept;
  static std::span<const std::byte> bytes_of(const Frame& frame);

  // Lets go of all frames of `source`, of which nobody is asking for one.
  void forget(const FrameSource& source);

  struct Statistics {
    std::uint64_t bytes = 0;    // kept
    std::uint64_t frames = 0;   // likewise
    std::uint64_t hits = 0;     // frames that were there
    std::uint64_t joined = 0;   // frames that somebody else was decompressing
    std::uint64_t decoded = 0;  // frames that were decompressed
    std::uint64_t failed = 0;   // frames that could not be
  };
  Statistics statistics() const;
  ByteCount bytes_max() const { return ByteCount(shard_bytes_max_ * shards_.size()); }

 private:
  struct Key {
    const FrameSource* source;
    std::size_t frame;
    friend bool operator==(const Key&, const Key&) = default;
  };
  struct KeyHash {
    std::size_t operator()(const Key& key) const noexcept;
  };
  struct Shard;

  Shard& shard_of(const Key& key) const;

  const std::vector<std::unique_ptr<Shard>> shards_;
  const std::size_t shard_bytes_max_;
  const std::shared_ptr<FrameMemory> memory_;
};

}  // namespace uffdkit::image
