#include "image/write_image.h"

#include <fmt/format.h>
#include <zstd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <memory>
#include <span>
#include <utility>

#include "base/check.h"
#include "image/identity.h"
#include "image/ordered.h"
#include "image/output_file.h"

namespace uffdkit::image {
namespace {

struct Free {
  void operator()(ZSTD_CCtx* context) const { ZSTD_freeCCtx(context); }
};

// A part of the stream: a compressed frame, or zeros.
struct Piece {
  FrameEntry entry;  // of zeros only `bytes` counts
  bool zero;
};

// What became of a chunk.
struct Compressed {
  std::size_t bytes = 0;          // of memory
  std::vector<std::byte> data;    // the frames, one behind the other
  std::vector<Piece> pieces;      // of the stream, in order
  std::vector<PageRun> runs;      // the chunk's pages
  std::vector<BlockHash> hashes;  // its blocks
};

void add_run(std::vector<PageRun>& runs, PageRun run) {
  if (!runs.empty() && runs.back().kind == run.kind) {
    runs.back().pages += run.pages;
  } else {
    runs.push_back(run);
  }
}

// Compresses chunks; one for each thread.
class Compressor {
 public:
  Compressor(const WriteOptions& options, bool is_diff)
      : frame_bytes_(options.frame_bytes), is_diff_(is_diff) {
    CHECK(context_ != nullptr);
    CHECK(ZSTD_isError(ZSTD_CCtx_setParameter(context_.get(), ZSTD_c_compressionLevel, options.level)) == 0);
    buffer_.resize(ZSTD_compressBound(frame_bytes_));
  }

  Compressed compress(const Chunk& chunk) {
    Compressed done{.bytes = chunk.bytes, .data = {}, .pieces = {}, .runs = {}, .hashes = {}};
    if (chunk.zero) {
      const std::uint64_t pages = (chunk.bytes + kPageBytes - 1) / kPageBytes;
      done.runs.push_back({.pages = pages, .kind = PageKind::zero});
      if (!is_diff_) add_zeros(done, chunk.bytes);
      for (std::size_t at = 0; at < chunk.bytes; at += kIdentityBlockBytes)
        done.hashes.push_back(hash_zero_block(std::min(kIdentityBlockBytes, chunk.bytes - at)));
      return done;
    }
    const std::span<const std::byte> memory(chunk.memory);
    for (std::size_t at = 0; at < chunk.bytes; at += kIdentityBlockBytes)
      done.hashes.push_back(hash_block(memory.subspan(at, std::min(kIdentityBlockBytes, chunk.bytes - at))));
    const std::size_t pages = memory.size() / kPageBytes;
    std::vector<PageKind> kinds(pages, PageKind::stored);
    for (std::size_t page = 0; page < pages; ++page) {
      if (is_all_zero(memory.subspan(page * kPageBytes, kPageBytes))) {
        kinds[page] = PageKind::zero;
      } else if (!chunk.parents.empty() && chunk.parents[page]) {
        kinds[page] = PageKind::parent;
      }
      add_run(done.runs, {.pages = 1, .kind = kinds[page]});
    }
    is_diff_ ? add_stored(done, memory, kinds) : add_whole(done, memory.first(chunk.bytes), kinds);
    return done;
  }

 private:
  static void add_zeros(Compressed& done, std::size_t bytes) {
    if (done.pieces.empty() || !done.pieces.back().zero)
      done.pieces.push_back({.entry = {.compressed_bytes = 0, .bytes = 0, .checksum = 0}, .zero = true});
    done.pieces.back().entry.bytes += static_cast<std::uint32_t>(bytes);
  }

  void add_frame(Compressed& done, std::span<const std::byte> bytes) {
    const std::size_t size =
        ZSTD_compress2(context_.get(), buffer_.data(), buffer_.size(), bytes.data(), bytes.size());
    CHECK(ZSTD_isError(size) == 0);  // the buffer has room for whatever comes
    done.data.insert(done.data.end(), buffer_.begin(), buffer_.begin() + static_cast<std::ptrdiff_t>(size));
    done.pieces.push_back({.entry = {.compressed_bytes = static_cast<std::uint32_t>(size),
                                     .bytes = static_cast<std::uint32_t>(bytes.size()),
                                     .checksum = checksum_of(bytes)},
                           .zero = false});
  }

  // A whole image's stream has all pages, so frames lie where the memory has them.
  void add_whole(Compressed& done, std::span<const std::byte> memory, const std::vector<PageKind>& kinds) {
    for (std::size_t at = 0; at < memory.size(); at += frame_bytes_) {
      const auto frame = memory.subspan(at, std::min<std::size_t>(frame_bytes_, memory.size() - at));
      const auto first = kinds.begin() + static_cast<std::ptrdiff_t>(at / kPageBytes);
      const auto pages = static_cast<std::ptrdiff_t>((frame.size() + kPageBytes - 1) / kPageBytes);
      if (std::all_of(first, first + pages, [](PageKind kind) { return kind == PageKind::zero; })) {
        add_zeros(done, frame.size());
      } else {
        add_frame(done, frame);
      }
    }
  }

  // A diff's stream has the stored pages only. A frame never reaches into the next chunk, so that what lies
  // far apart in memory is not decompressed together.
  void add_stored(Compressed& done, std::span<const std::byte> memory, const std::vector<PageKind>& kinds) {
    std::vector<std::byte> packed;
    packed.reserve(frame_bytes_);
    for (std::size_t page = 0; page < kinds.size(); ++page) {
      if (kinds[page] != PageKind::stored) continue;
      const auto bytes = memory.subspan(page * kPageBytes, kPageBytes);
      packed.insert(packed.end(), bytes.begin(), bytes.end());
      if (packed.size() < frame_bytes_) continue;
      add_frame(done, packed);
      packed.clear();
    }
    if (!packed.empty()) add_frame(done, packed);
  }

  const std::size_t frame_bytes_;
  const bool is_diff_;
  const std::unique_ptr<ZSTD_CCtx, Free> context_{ZSTD_createCCtx()};
  std::vector<std::byte> buffer_;
};

// Puts what became of the chunks together, in order.
class Assembler {
 public:
  Assembler(OutputFile& file, Record& record) : file_(file), record_(record) {}

  Result<void> take(const Compressed& chunk) {
    std::span<const std::byte> data(chunk.data);
    for (const Piece& piece : chunk.pieces) {
      if (piece.zero) {
        zeros_ += piece.entry.bytes;
        continue;
      }
      if (auto written = flush_zeros(); !written) return written;
      if (auto counted = add(piece.entry, data.first(piece.entry.compressed_bytes)); !counted) return counted;
      data = data.subspan(piece.entry.compressed_bytes);
    }
    for (const PageRun& run : chunk.runs) add_run(record_.runs, run);
    for (const BlockHash& hash : chunk.hashes) identity_.add(hash);
    record_.raw_bytes += chunk.bytes;
    return {};
  }

  Result<void> finish() {
    if (auto written = flush_zeros(); !written) return written;
    record_.identity = identity_.finish(record_.raw_bytes);
    const std::vector<std::byte> table = encode_seek_table(frames_);
    Result<std::vector<std::byte>> encoded = encode_record(record_, table, file_.size());
    if (!encoded) return Failure(std::move(encoded).error());
    if (auto written = file_.append(*encoded); !written) return written;
    return file_.append(table);
  }

 private:
  Result<void> add(FrameEntry entry, std::span<const std::byte> bytes) {
    if (frames_.size() == kFramesMax)
      return Failure(Error("the memory has more frames than the format allows", EFBIG)
                         .with_remedy("choose larger frames: --frame-size"));
    frames_.push_back(entry);
    return file_.append(bytes);
  }

  // Zeros go into frames as long as they may be, across chunks.
  Result<void> flush_zeros() {
    while (zeros_ > 0) {
      const auto bytes = static_cast<std::uint32_t>(std::min<std::uint64_t>(zeros_, kZeroFrameBytesMax));
      const std::vector<std::byte> frame = encode_zero_frame(bytes);
      const FrameEntry entry{.compressed_bytes = static_cast<std::uint32_t>(frame.size()),
                             .bytes = bytes,
                             .checksum = checksum_of_zeros(bytes)};
      if (auto written = add(entry, frame); !written) return written;
      zeros_ -= bytes;
    }
    return {};
  }

  OutputFile& file_;
  Record& record_;
  std::vector<FrameEntry> frames_;
  IdentityHash identity_;
  std::uint64_t zeros_ = 0;
};

}  // namespace

Result<Written> write_image(MemorySource& source, const std::string& path,
                            const std::optional<Parent>& parent, std::vector<Region> regions,
                            const WriteOptions& options) {
  CHECK(options.frame_bytes >= kFrameBytesMin && options.frame_bytes <= kFrameBytesMax &&
        std::has_single_bit(options.frame_bytes));
  Written written;
  Record& record = written.record;
  record.frame_bytes = options.frame_bytes;
  record.regions = std::move(regions);
  if (parent) {
    if (auto good = check_parent_name(parent->name); !good) return Failure(std::move(good).error());
    record.is_diff = true;
    record.parent = parent->identity;
    record.parent_name = parent->name;
  }
  Result<OutputFile> file = OutputFile::create(path, options.replace);
  if (!file) return Failure(std::move(file).error());
  Assembler assembler(*file, record);
  const auto next = [&] { return source.next(); };
  const auto work = [&](Chunk chunk) -> Result<Compressed> {
    if (!chunk.zero)
      if (auto filled = source.fill(chunk); !filled) return Failure(std::move(filled).error());
    static thread_local std::unique_ptr<Compressor> compressor;
    if (!compressor) compressor = std::make_unique<Compressor>(options, record.is_diff);
    return compressor->compress(chunk);
  };
  const auto take = [&](const Compressed& chunk) -> Result<void> {
    if (auto taken = assembler.take(chunk); !taken) return taken;
    if (options.progress) options.progress(record.raw_bytes, source.raw_bytes());
    return {};
  };
  const unsigned threads = options.threads != 0 ? options.threads : usable_cpus();
  if (auto done = in_order<Chunk, Compressed>(threads, next, work, take); !done)
    return Failure(std::move(done).error());
  if (record.raw_bytes == 0)
    return Failure(Error("there is no memory to make an image of", EINVAL)
                       .with_remedy("give a source that is not empty"));
  if (auto finished = assembler.finish(); !finished) return Failure(std::move(finished).error());
  if (auto named = file->commit(); !named) return Failure(std::move(named).error());
  written.file_bytes = file->size();
  return written;
}

}  // namespace uffdkit::image
