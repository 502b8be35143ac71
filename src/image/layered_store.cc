#include "image/layered_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "store/read_ahead.h"

namespace uffdkit::image {
namespace {

// A run of pages, up to the next one's first page.
class Segment {
 public:
  static constexpr std::uint64_t kZero = 0xff;  // in place of a layer

  Segment(std::uint64_t first_page, std::uint64_t in_layer, std::uint64_t at_stream_page)
      : page(first_page), place_(in_one(in_layer, at_stream_page)) {}

  std::uint64_t layer() const { return place_ >> kPageBits; }
  // Of the layer's stream.
  std::uint64_t stream_page() const { return place_ & ((std::uint64_t{1} << kPageBits) - 1); }
  // A layer, and a page or frame of its, as one number.
  static std::uint64_t in_one(std::uint64_t in_layer, std::uint64_t number) {
    return in_layer << kPageBits | number;
  }
  // What is left of it without its first pages.
  Segment without(std::uint64_t pages) const {
    return {page + pages, layer(), layer() == kZero ? 0 : stream_page() + pages};
  }

  std::uint64_t page;

 private:
  static constexpr unsigned kPageBits = 56;
  static_assert(kMemoryBytesMax / kPageBytes < std::uint64_t{1} << kPageBits);
  std::uint64_t place_;
};
static_assert(sizeof(Segment) == 16);

// Appends what continues the last segment to it.
void append(std::vector<Segment>& to, Segment segment) {
  if (!to.empty()) {
    const Segment continued = to.back().without(segment.page - to.back().page);
    if (continued.layer() == segment.layer() && continued.stream_page() == segment.stream_page()) return;
  }
  to.push_back(segment);
}

// Appends pages [page, page + pages) of `from`, which has them.
void append_slice(std::vector<Segment>& to, const std::vector<Segment>& from, std::uint64_t page,
                  std::uint64_t pages) {
  auto segment = std::ranges::upper_bound(from, page, {}, &Segment::page) - 1;
  for (; segment != from.end() && segment->page < page + pages; ++segment)
    append(to, segment->without(page > segment->page ? page - segment->page : 0));
}

class LayeredStore final : public Store, public ReadAhead {
 public:
  LayeredStore(std::string name, std::vector<std::shared_ptr<ImageFile>> layers,
               std::vector<Segment> segments)
      : name_(std::move(name)),
        layers_(std::move(layers)),
        bytes_(layers_.front()->record().pages() * kPageBytes),
        segments_(std::move(segments)),
        extents_(extents_of(segments_)) {}

  ByteCount size() const noexcept override { return ByteCount(bytes_); }
  std::string name() const override { return name_; }

  Extent extent_at(StoreOffset from) const noexcept override {
    const auto next = std::ranges::upper_bound(extents_, from.value / kPageBytes);
    // Behind an odd number of them there is data.
    return {.zero = (next - extents_.begin()) % 2 == 0,
            .end = StoreOffset(next == extents_.end() ? bytes_ : *next * kPageBytes)};
  }

  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    std::uint64_t at = from.value;
    for (auto segment = segment_at(at); !to.empty(); ++segment) {
      const std::uint64_t end = start_of(segment + 1);
      const auto part = to.first(std::min<std::uint64_t>(to.size(), end - at));
      if (segment->layer() == Segment::kZero) {
        std::memset(part.data(), 0, part.size());
      } else {
        Result<ReadStatus> read =
            layers_[segment->layer()]->read_stream(stream_offset(segment, at), part, wait);
        if (!read)
          return Failure(std::move(read).error().within(fmt::format("read {} at offset {}", name_, at)));
        if (*read != ReadStatus::done) return read;
      }
      at += part.size();
      to = to.subspan(part.size());
    }
    return ReadStatus::done;
  }

  void will_need(StoreOffset from, ByteCount bytes) noexcept override {
    std::uint64_t at = from.value;
    const std::uint64_t end = std::min(at + bytes.value, bytes_);
    for (auto segment = segment_at(at); at < end; ++segment) {
      const std::uint64_t part_end = std::min(end, start_of(segment + 1));
      if (segment->layer() != Segment::kZero)
        layers_[segment->layer()]->will_need(stream_offset(segment, at), part_end - at);
      at = part_end;
    }
  }
  std::uint64_t unit_at(StoreOffset from) const noexcept override {
    const auto segment = segment_at(from.value);
    // Zeros are not read: each page is for itself.
    if (segment->layer() == Segment::kZero) return Segment::in_one(Segment::kZero, from.value / kPageBytes);
    return Segment::in_one(segment->layer(),
                           layers_[segment->layer()]->frame_at(stream_offset(segment, from.value)));
  }
  bool is_only_copied() const noexcept override { return false; }

 private:
  using Place = std::vector<Segment>::const_iterator;

  // The pages where data and zeros begin in turns, data first.
  static std::vector<std::uint64_t> extents_of(const std::vector<Segment>& segments) {
    std::vector<std::uint64_t> starts;
    for (const Segment& segment : segments) {
      const bool zero = segment.layer() == Segment::kZero;
      const bool after_zero = starts.size() % 2 == 0;
      if (zero != after_zero) starts.push_back(segment.page);
    }
    starts.shrink_to_fit();
    return starts;
  }

  Place segment_at(std::uint64_t offset) const {
    return std::ranges::upper_bound(segments_, offset / kPageBytes, {}, &Segment::page) - 1;
  }
  // Where its layer's stream has the byte at `offset`, which lies in the segment.
  static std::uint64_t stream_offset(Place segment, std::uint64_t offset) {
    return segment->stream_page() * kPageBytes + (offset - segment->page * kPageBytes);
  }
  std::uint64_t start_of(Place segment) const {
    return segment == segments_.end() ? bytes_ : segment->page * kPageBytes;
  }

  const std::string name_;
  const std::vector<std::shared_ptr<ImageFile>> layers_;
  const std::uint64_t bytes_;
  const std::vector<Segment> segments_;
  // So that nobody has to go through segments of one kind, which may be a hundred thousand.
  const std::vector<std::uint64_t> extents_;
};

}  // namespace

Result<std::shared_ptr<Store>> make_layered_store(std::string name,
                                                  std::vector<std::shared_ptr<ImageFile>> layers) {
  CHECK(!layers.empty() && layers.size() < Segment::kZero);
  std::vector<Segment> below;
  std::uint64_t pages_below = 0;
  for (std::size_t layer = layers.size(); layer-- > 0;) {
    const Record& record = layers[layer]->record();
    std::vector<Segment> resolved;
    std::uint64_t page = 0;
    std::uint64_t stored = 0;  // of a diff; a whole image's stream has its zero pages too
    for (const PageRun& run : record.runs) {
      switch (run.kind) {
        case PageKind::zero:
          append(resolved, {page, Segment::kZero, 0});
          break;
        case PageKind::stored:
          append(resolved, {page, layer, record.is_diff ? stored : page});
          stored += run.pages;
          break;
        case PageKind::parent:
          if (page + run.pages > pages_below)
            return Failure(
                Error(fmt::format("{}: pages {} to {} are said to be the parent's, which has {}",
                                  layers[layer]->name(), page, page + run.pages, pages_below),
                      EBADMSG)
                    .with_remedy("the image is damaged: restore it from a copy, or make it again"));
          append_slice(resolved, below, page, run.pages);
          break;
      }
      page += run.pages;
    }
    below = std::move(resolved);
    pages_below = page;
  }
  below.shrink_to_fit();
  return std::make_shared<LayeredStore>(std::move(name), std::move(layers), std::move(below));
}

}  // namespace uffdkit::image
