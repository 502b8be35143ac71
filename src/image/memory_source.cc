#include "image/memory_source.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>
#include <zstd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"

namespace uffdkit::image {
namespace {

std::size_t whole_pages(std::size_t bytes) {
  return (bytes + kPageBytes - 1) / kPageBytes * kPageBytes;
}

// The chunk of `raw_bytes` of memory at `at`; null at the end.
std::optional<Chunk> chunk_at(std::uint64_t at, std::uint64_t raw_bytes) {
  if (at >= raw_bytes) return std::nullopt;
  return Chunk{.offset = at, .bytes = std::min<std::uint64_t>(kChunkBytes, raw_bytes - at)};
}

bool has_zeros(const Store& store, const Chunk& chunk) {
  if (chunk.offset >= store.size().value) return true;
  const Extent extent = store.extent_at(StoreOffset(chunk.offset));
  return extent.zero && extent.end.value >= std::min(chunk.offset + chunk.bytes, store.size().value);
}

// Fills `to` with what `store` has at `from`, holes without reading; what is behind its end is zero.
Result<void> read_extents(Store& store, std::uint64_t from, std::span<std::byte> to) {
  const std::uint64_t end = std::min(from + to.size(), store.size().value);
  std::memset(to.data(), 0, to.size());
  for (std::uint64_t at = from; at < end;) {
    const Extent extent = store.extent_at(StoreOffset(at));
    const std::uint64_t stop = std::min(end, extent.end.value);
    if (!extent.zero)
      if (auto read = store.read(StoreOffset(at), to.subspan(at - from, stop - at), Wait::yes); !read)
        return Failure(std::move(read).error());
    at = stop;
  }
  return {};
}

class StoreSource : public MemorySource {
 public:
  StoreSource(std::shared_ptr<Store> store, std::uint64_t raw_bytes)
      : store_(std::move(store)), raw_bytes_(raw_bytes) {}

  std::uint64_t raw_bytes() const override { return raw_bytes_; }

  Result<std::optional<Chunk>> next() override {
    std::optional<Chunk> chunk = chunk_at(at_, raw_bytes_);
    if (!chunk) return std::nullopt;
    at_ += chunk->bytes;
    chunk->zero = has_zeros(*store_, *chunk);
    return chunk;
  }

  Result<void> fill(Chunk& chunk) override {
    chunk.memory.resize(whole_pages(chunk.bytes));
    return read_extents(*store_, chunk.offset, chunk.memory);
  }

 private:
  const std::shared_ptr<Store> store_;
  const std::uint64_t raw_bytes_;
  std::uint64_t at_ = 0;
};

class DifferenceSource final : public StoreSource {
 public:
  DifferenceSource(std::shared_ptr<Store> parent, std::shared_ptr<Store> store, std::uint64_t raw_bytes,
                   std::vector<bool> kept)
      : StoreSource(std::move(store), raw_bytes), parent_(std::move(parent)), kept_(std::move(kept)) {}

  Result<void> fill(Chunk& chunk) override {
    if (auto filled = StoreSource::fill(chunk); !filled) return filled;
    std::vector<std::byte> before(chunk.memory.size());
    if (auto read = read_extents(*parent_, chunk.offset, before); !read) return read;
    for (std::size_t at = 0; at < before.size(); at += kPageBytes)
      chunk.parents.push_back(chunk.offset + at < parent_->size().value &&
                              !is_kept((chunk.offset + at) / kPageBytes) &&
                              std::memcmp(before.data() + at, chunk.memory.data() + at, kPageBytes) == 0);
    return {};
  }

 private:
  bool is_kept(std::uint64_t page) const { return page < kept_.size() && kept_[page]; }

  const std::shared_ptr<Store> parent_;
  const std::vector<bool> kept_;
};

class RunsSource final : public StoreSource {
 public:
  RunsSource(std::shared_ptr<Store> store, std::uint64_t raw_bytes, std::vector<PageRun> runs)
      : StoreSource(std::move(store), raw_bytes), runs_(std::move(runs)) {}

  Result<std::optional<Chunk>> next() override {
    Result<std::optional<Chunk>> next = StoreSource::next();
    if (!next) return next;
    std::optional<Chunk>& chunk = *next;
    if (!chunk) return next;
    for (std::size_t at = 0; at < chunk->bytes; at += kPageBytes) {
      for (; left_ == 0; ++run_) left_ = runs_[run_].pages;
      --left_;
      chunk->parents.push_back(runs_[run_ - 1].kind == PageKind::parent);
    }
    return next;
  }

 private:
  const std::vector<PageRun> runs_;
  std::size_t run_ = 0;     // the next one
  std::uint64_t left_ = 0;  // pages of the one before
};

class SparseSource final : public MemorySource {
 public:
  SparseSource(std::shared_ptr<Store> parent, UniqueFd file, std::shared_ptr<Store> store,
               std::uint64_t raw_bytes)
      : parent_(std::move(parent)), file_(std::move(file)), store_(std::move(store)), raw_bytes_(raw_bytes) {}

  std::uint64_t raw_bytes() const override { return raw_bytes_; }

  Result<std::optional<Chunk>> next() override {
    std::optional<Chunk> chunk = chunk_at(at_, raw_bytes_);
    if (!chunk) return std::nullopt;
    at_ += chunk->bytes;
    chunk->parents.assign(whole_pages(chunk->bytes) / kPageBytes, true);
    bool data = false;
    while (true) {
      if (hole_ <= chunk->offset)
        if (auto found = find_data(chunk->offset); !found) return Failure(std::move(found).error());
      for (std::uint64_t page = std::max(data_, chunk->offset) / kPageBytes;
           page * kPageBytes < std::min(hole_, at_); ++page) {
        chunk->parents[page - chunk->offset / kPageBytes] = false;
        data = true;
      }
      if (hole_ >= at_) break;
      if (auto found = find_data(hole_); !found) return Failure(std::move(found).error());
    }
    chunk->zero = !data && has_zeros(*parent_, *chunk);
    return chunk;
  }

  Result<void> fill(Chunk& chunk) override {
    chunk.memory.resize(whole_pages(chunk.bytes));
    const std::span<std::byte> memory(chunk.memory);
    for (std::size_t page = 0; page < chunk.parents.size();) {
      std::size_t end = page;
      while (end < chunk.parents.size() && chunk.parents[end] == chunk.parents[page]) ++end;
      Store& from = chunk.parents[page] ? *parent_ : *store_;
      const auto part = memory.subspan(page * kPageBytes, (end - page) * kPageBytes);
      if (auto read = read_extents(from, chunk.offset + page * kPageBytes, part); !read) return read;
      page = end;
    }
    return {};
  }

 private:
  // The first data at or behind `from`; at the end of the file if there is none.
  Result<void> find_data(std::uint64_t from) {
    const off_t data = ::lseek(file_.get(), static_cast<off_t>(from), SEEK_DATA);
    const off_t hole = data < 0 ? data : ::lseek(file_.get(), data, SEEK_HOLE);
    if (hole < 0 && errno != ENXIO)
      return Failure(Error::from_errno("find the holes of " + store_->name(), errno));
    data_ = hole < 0 ? raw_bytes_ : static_cast<std::uint64_t>(data);
    hole_ = hole < 0 ? raw_bytes_ : static_cast<std::uint64_t>(hole);
    if (hole_ <= from && hole_ < raw_bytes_)
      return Failure(Error(store_->name() + " changes while it is read", EBUSY));
    return {};
  }

  const std::shared_ptr<Store> parent_;
  const UniqueFd file_;
  const std::shared_ptr<Store> store_;
  const std::uint64_t raw_bytes_;
  std::uint64_t at_ = 0;
  // The data that was found last, and where it ends.
  std::uint64_t data_ = 0;
  std::uint64_t hole_ = 0;
};

class ZstdSource final : public MemorySource {
 public:
  ZstdSource(UniqueFd file, std::string path) : file_(std::move(file)), path_(std::move(path)) {
    CHECK(context_ != nullptr);
    compressed_.resize(ZSTD_DStreamInSize());
  }

  std::uint64_t raw_bytes() const override { return 0; }

  Result<std::optional<Chunk>> next() override {
    Chunk chunk{.offset = at_, .bytes = 0};
    chunk.memory.resize(kChunkBytes);
    ZSTD_outBuffer out{.dst = chunk.memory.data(), .size = chunk.memory.size(), .pos = 0};
    while (out.pos < out.size) {
      if (in_.pos == in_.size) {
        const ssize_t bytes = ::read(file_.get(), compressed_.data(), compressed_.size());
        if (bytes < 0 && errno == EINTR) continue;
        if (bytes < 0) return Failure(Error::from_errno("read " + path_, errno));
        if (bytes == 0 && within_frame_)
          return Failure(Error(fmt::format("{} ends within a frame of zstd", path_), EBADMSG)
                             .with_remedy("it was cut short: restore it from a copy"));
        if (bytes == 0) break;
        in_ = {.src = compressed_.data(), .size = static_cast<std::size_t>(bytes), .pos = 0};
      }
      const std::size_t wanted = ZSTD_decompressStream(context_.get(), &out, &in_);
      if (ZSTD_isError(wanted) != 0)
        return Failure(
            Error(fmt::format("zstd cannot decompress {}: {}", path_, ZSTD_getErrorName(wanted)), EBADMSG)
                .with_remedy("give a file that zstd compressed, or raw memory: uffdkit image create --raw"));
      within_frame_ = wanted != 0;
    }
    chunk.bytes = out.pos;
    at_ += chunk.bytes;
    if (chunk.bytes == 0) return std::nullopt;
    chunk.memory.resize(whole_pages(chunk.bytes));
    return chunk;
  }

  Result<void> fill(Chunk&) override { return {}; }

 private:
  struct Free {
    void operator()(ZSTD_DCtx* context) const { ZSTD_freeDCtx(context); }
  };

  const UniqueFd file_;
  const std::string path_;
  std::unique_ptr<ZSTD_DCtx, Free> context_{ZSTD_createDCtx()};
  std::vector<std::byte> compressed_;
  ZSTD_inBuffer in_{.src = nullptr, .size = 0, .pos = 0};
  bool within_frame_ = false;
  std::uint64_t at_ = 0;
};

}  // namespace

bool is_all_zero(std::span<const std::byte> bytes) {
  return bytes.front() == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

std::unique_ptr<MemorySource> memory_of(std::shared_ptr<Store> store, std::uint64_t raw_bytes) {
  return std::make_unique<StoreSource>(std::move(store), raw_bytes);
}

std::unique_ptr<MemorySource> difference(std::shared_ptr<Store> parent, std::shared_ptr<Store> store,
                                         std::uint64_t raw_bytes, std::vector<bool> kept) {
  return std::make_unique<DifferenceSource>(std::move(parent), std::move(store), raw_bytes, std::move(kept));
}

std::unique_ptr<MemorySource> memory_with_runs(std::shared_ptr<Store> store, std::uint64_t raw_bytes,
                                               std::vector<PageRun> runs) {
  return std::make_unique<RunsSource>(std::move(store), raw_bytes, std::move(runs));
}

Result<std::unique_ptr<MemorySource>> sparse_difference(std::shared_ptr<Store> parent,
                                                        std::uint64_t parent_bytes, const std::string& path) {
  UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file) return Failure(Error::from_open(path, errno));
  Result<std::shared_ptr<Store>> store = open_file_store(file.get(), path);
  if (!store) return Failure(std::move(store).error());
  struct stat status;
  if (::fstat(file.get(), &status) < 0) return Failure(Error::from_errno("stat " + path, errno));
  const auto bytes = static_cast<std::uint64_t>(status.st_size);
  if (bytes != parent_bytes)
    return Failure(
        Error(fmt::format("{} has {} bytes, and the memory of its parent {}", path, bytes, parent_bytes),
              EINVAL)
            .with_remedy("a sparse diff is as long as the memory, with holes for what did not change"));
  // Where a file system knows no holes, all of the file counts as data: what is the parent's would become
  // zero.
  if (::lseek(file.get(), 0, SEEK_HOLE) == status.st_size && status.st_blocks * 512 < status.st_size)
    return Failure(
        Error(fmt::format("the file system of {} cannot tell where it has holes", path), EOPNOTSUPP)
            .with_remedy("copy it to ext4, xfs, btrfs or tmpfs from where it was made, by cp --sparse=auto"));
  return std::make_unique<SparseSource>(std::move(parent), std::move(file), std::move(*store), bytes);
}

Result<std::unique_ptr<MemorySource>> memory_from_zstd(const std::string& path) {
  UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return Failure(Error::from_open(path, errno));
  return std::make_unique<ZstdSource>(std::move(file), path);
}

}  // namespace uffdkit::image
