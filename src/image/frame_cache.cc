#include "image/frame_cache.h"

#include <algorithm>
#include <bit>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <utility>

namespace uffdkit::image {
namespace {

// Locks are held for the time of a look-up, so some few are enough for many threads. Each shard is to hold
// some dozens of frames, lest those of one place push each other out.
constexpr std::size_t kShardsMax = 16;
constexpr std::size_t kShardBytesMin = 4u << 20;

std::size_t shard_count(std::size_t bytes_max) {
  return std::clamp(bytes_max / kShardBytesMin, std::size_t{1}, kShardsMax);
}

}  // namespace

struct FrameCache::Frame {
  enum class State : std::uint8_t { loading, ready, failed, abandoned };

  const Key key;
  const std::size_t size;
  State state = State::loading;
  FrameMemory::Bytes bytes;    // written by who loads it, before it is ready
  std::optional<Error> error;  // of a failed one
};

struct FrameCache::Shard {
  using Order = std::list<std::shared_ptr<Frame>>;

  std::mutex mutex;
  std::condition_variable changed;  // some frame is no longer loading
  Order order;                      // the one used last comes first
  std::unordered_map<Key, Order::iterator, KeyHash> frames;
  std::size_t bytes = 0;  // of all that are in `order`
  Statistics statistics;

  void remove(Order::iterator entry) {
    bytes -= (*entry)->size;
    frames.erase((*entry)->key);
    order.erase(entry);
  }

  // Lets go of the oldest frames until `wanted` more bytes have room, or all that is left is being loaded.
  void make_room(std::size_t wanted, std::size_t bytes_max) {
    for (auto entry = order.end(); entry != order.begin() && bytes + wanted > bytes_max;) {
      const auto oldest = std::prev(entry);
      if ((*oldest)->state == Frame::State::loading) {
        entry = oldest;
      } else {
        remove(oldest);
      }
    }
  }
};

std::size_t FrameCache::KeyHash::operator()(const Key& key) const noexcept {
  // Multiplied by the golden ratio, so that neighbours are spread over shards and buckets.
  return std::rotl((std::bit_cast<std::uintptr_t>(key.source) ^ key.frame) * 0x9e37'79b9'7f4a'7c15u, 32);
}

FrameCache::FrameCache(ByteCount bytes_max)
    : shards_([&] {
        std::vector<std::unique_ptr<Shard>> shards(shard_count(bytes_max.value));
        for (auto& shard : shards) shard = std::make_unique<Shard>();
        return shards;
      }()),
      shard_bytes_max_(bytes_max.value / shards_.size()),
      memory_(std::make_shared<FrameMemory>(bytes_max)) {}

FrameCache::~FrameCache() = default;

FrameCache::Shard& FrameCache::shard_of(const Key& key) const {
  return *shards_[(KeyHash()(key) >> 8) % shards_.size()];
}

Result<FrameCache::FrameRef> FrameCache::get(FrameSource& source, std::size_t frame, std::size_t bytes,
                                             Wait wait) noexcept {
  const Key key{.source = &source, .frame = frame};
  Shard& shard = shard_of(key);
  std::unique_lock lock(shard.mutex);
  for (auto found = shard.frames.find(key); found != shard.frames.end(); found = shard.frames.find(key)) {
    std::shared_ptr<Frame> entry = *found->second;
    if (entry->state == Frame::State::ready) {
      ++shard.statistics.hits;
      shard.order.splice(shard.order.begin(), shard.order, found->second);
      return entry;
    }
    if (wait == Wait::no) return FrameRef();
    shard.changed.wait(lock, [&] { return entry->state != Frame::State::loading; });
    if (const std::optional<Error>& error = entry->error; error && entry->state == Frame::State::failed)
      return Failure(*error);
    if (entry->state == Frame::State::ready) {
      ++shard.statistics.joined;
      return entry;
    }
    // Who was loading it would have had to wait, and must not. We may.
  }

  shard.make_room(bytes, shard_bytes_max_);
  const auto entry = std::make_shared<Frame>(Frame{.key = key, .size = bytes, .bytes = {}, .error = {}});
  shard.order.push_front(entry);
  const auto place = shard.order.begin();
  shard.frames.emplace(key, place);
  shard.bytes += bytes;
  lock.unlock();

  // Whoever may not wait has a fault to answer, and clearing a huge page would keep it.
  entry->bytes = wait == Wait::yes ? memory_->take(bytes) : FrameMemory::of_heap(bytes);
  Result<ReadStatus> decoded = source.decode_frame(frame, {entry->bytes.get(), bytes}, wait);

  lock.lock();
  if (decoded && *decoded == ReadStatus::done) {
    ++shard.statistics.decoded;
    entry->state = Frame::State::ready;
    // Others may have come meanwhile, and found nothing that could go.
    shard.make_room(0, shard_bytes_max_);
  } else {
    entry->state = decoded ? Frame::State::abandoned : Frame::State::failed;
    if (!decoded) {
      ++shard.statistics.failed;
      entry->error = decoded.error();
    }
    shard.remove(place);
  }
  lock.unlock();
  shard.changed.notify_all();
  if (!decoded) return Failure(std::move(decoded).error());
  return *decoded == ReadStatus::done ? FrameRef(entry) : FrameRef();
}

std::span<const std::byte> FrameCache::bytes_of(const Frame& frame) {
  return {frame.bytes.get(), frame.size};
}

void FrameCache::forget(const FrameSource& source) {
  for (const auto& shard : shards_) {
    const std::lock_guard lock(shard->mutex);
    for (auto entry = shard->order.begin(); entry != shard->order.end();) {
      const auto next = std::next(entry);
      if ((*entry)->key.source == &source) shard->remove(entry);
      entry = next;
    }
  }
}

FrameCache::Statistics FrameCache::statistics() const {
  Statistics sum;
  for (const auto& shard : shards_) {
    const std::lock_guard lock(shard->mutex);
    sum.bytes += shard->bytes;
    sum.frames += shard->order.size();
    sum.hits += shard->statistics.hits;
    sum.joined += shard->statistics.joined;
    sum.decoded += shard->statistics.decoded;
    sum.failed += shard->statistics.failed;
  }
  return sum;
}

}  // namespace uffdkit::image
