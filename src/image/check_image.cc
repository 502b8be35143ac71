#include "image/check_image.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <optional>
#include <span>
#include <utility>

#include "image/identity.h"
#include "image/ordered.h"
#include "image/output_file.h"

namespace uffdkit::image {
namespace {

// As many frames as a thread takes at once.
constexpr std::size_t kFramesAtOnce = 16;

// The runs of zero pages of a whole image, by their first byte.
struct ZeroRun {
  std::uint64_t start;
  std::uint64_t end;
};

std::vector<ZeroRun> zero_runs(const Record& record) {
  std::vector<ZeroRun> zeros;
  std::uint64_t at = 0;
  for (const PageRun& run : record.runs) {
    const std::uint64_t end = at + run.pages * kPageBytes;
    if (run.kind == PageKind::zero && !record.is_diff) zeros.push_back({.start = at, .end = end});
    at = end;
  }
  return zeros;
}

// The first byte of `bytes`, which the stream has at `start`, that is not zero although the map says so.
std::optional<std::uint64_t> not_zero(std::span<const std::byte> bytes, std::uint64_t start,
                                      std::span<const ZeroRun> zeros) {
  if (bytes.empty()) return std::nullopt;  // of a long frame, whose bytes have been compared
  const std::uint64_t end = start + bytes.size();
  for (auto run = std::ranges::upper_bound(zeros, start, {}, &ZeroRun::end);
       run != zeros.end() && run->start < end; ++run) {
    const std::uint64_t from = std::max(start, run->start);
    if (!is_all_zero(bytes.subspan(from - start, std::min(end, run->end) - from))) return from;
  }
  return std::nullopt;
}

std::vector<Error> check_frames(ImageFile& file, std::size_t first, std::size_t end,
                                std::span<const ZeroRun> zeros) {
  std::vector<Error> problems;
  std::vector<std::byte> bytes;
  for (std::size_t frame = first; frame < end; ++frame) {
    bytes.resize(file.is_long(frame) ? 0 : file.frame_bytes(frame));
    if (auto decoded = file.decode_frame(frame, bytes, Wait::yes); !decoded) {
      problems.push_back(std::move(decoded).error());
    } else if (const auto at = not_zero(bytes, file.stream_start(frame), zeros)) {
      problems.push_back(
          Error(
              fmt::format("{}: frame {} has other bytes than zero at offset {}, where the page map says that "
                          "there are none",
                          file.name(), frame, *at),
              EBADMSG)
              .with_remedy(
                  "the image was made wrong, and what it serves is not what zstd -d gives: make it again"));
    }
  }
  return problems;
}

void check_file(ImageFile& file, unsigned threads, const Progress& progress, Verified& verified) {
  const std::vector<ZeroRun> zeros = zero_runs(file.record());
  std::size_t at = 0;
  const auto next = [&]() -> Result<std::optional<std::size_t>> {
    if (at >= file.frame_count()) return std::nullopt;
    return std::exchange(at, at + kFramesAtOnce);
  };
  const auto work = [&](std::size_t first) -> Result<std::vector<Error>> {
    return check_frames(file, first, std::min(first + kFramesAtOnce, file.frame_count()), zeros);
  };
  std::size_t done = 0;
  const auto take = [&](std::vector<Error> problems) -> Result<void> {
    for (Error& problem : problems)
      if (verified.problems.size() < kProblemsMax) verified.problems.push_back(std::move(problem));
    done = std::min(done + kFramesAtOnce, file.frame_count());
    if (progress) progress(file.stream_start(done), file.stream_bytes());
    return {};
  };
  // None of the three gives an error: what is wrong is collected.
  (void)in_order<std::size_t, std::vector<Error>>(threads, next, work, take);
  verified.frames += file.frame_count();
}

// Appends a chunk, leaving its zero pages out.
Result<void> append_sparsely(OutputFile& file, const Chunk& chunk) {
  const std::span<const std::byte> memory = std::span(chunk.memory).first(chunk.bytes);
  const auto page_at = [&](std::size_t at) {
    return memory.subspan(at, std::min<std::size_t>(kPageBytes, memory.size() - at));
  };
  for (std::size_t at = 0; at < memory.size();) {
    const bool zero = is_all_zero(page_at(at));
    std::size_t end = at;
    while (end < memory.size() && is_all_zero(page_at(end)) == zero) end += page_at(end).size();
    if (zero) {
      file.skip(end - at);
    } else if (auto written = file.append(memory.subspan(at, end - at)); !written) {
      return written;
    }
    at = end;
  }
  return {};
}

struct HashedChunk {
  std::size_t bytes;
  std::vector<BlockHash> hashes;
};

Result<Identity> identity_of(const OpenImage& image, unsigned threads, const Progress& progress) {
  const std::unique_ptr<MemorySource> source = memory_of(image.store, image.raw_bytes);
  const auto next = [&] { return source->next(); };
  const auto work = [&](Chunk chunk) -> Result<HashedChunk> {
    HashedChunk done{.bytes = chunk.bytes, .hashes = {}};
    if (!chunk.zero)
      if (auto filled = source->fill(chunk); !filled) return Failure(std::move(filled).error());
    for (std::size_t at = 0; at < chunk.bytes; at += kIdentityBlockBytes) {
      const std::size_t bytes = std::min(kIdentityBlockBytes, chunk.bytes - at);
      done.hashes.push_back(chunk.zero ? hash_zero_block(bytes)
                                       : hash_block(std::span(chunk.memory).subspan(at, bytes)));
    }
    return done;
  };
  IdentityHash identity;
  std::uint64_t done = 0;
  const auto take = [&](const HashedChunk& chunk) -> Result<void> {
    for (const BlockHash& hash : chunk.hashes) identity.add(hash);
    done += chunk.bytes;
    if (progress) progress(done, image.raw_bytes);
    return {};
  };
  if (auto all = in_order<Chunk, HashedChunk>(threads, next, work, take); !all)
    return Failure(std::move(all).error());
  return identity.finish(image.raw_bytes);
}

}  // namespace

Verified verify_image(const OpenImage& image, unsigned threads, const Progress& progress) {
  if (threads == 0) threads = usable_cpus();
  Verified verified;
  for (const auto& layer : image.layers) check_file(*layer, threads, progress, verified);
  if (!verified.problems.empty()) return verified;
  Result<Identity> identity = identity_of(image, threads, progress);
  if (!identity) {
    verified.problems.push_back(std::move(identity).error());
    return verified;
  }
  verified.identity = *identity;
  if (!image.is_raw() && image.layers.front()->record().identity != *identity)
    verified.problems.push_back(
        Error(fmt::format("{}: its memory is {}, and it says that it is {}", image.store->name(),
                          to_string(*identity), to_string(image.layers.front()->record().identity)),
              EBADMSG)
            .with_remedy("the image was made wrong: make it again"));
  return verified;
}

Result<std::uint64_t> extract_image(const OpenImage& image, const std::string& path, bool replace,
                                    unsigned threads, const Progress& progress) {
  Result<OutputFile> file = OutputFile::create(path, replace);
  if (!file) return Failure(std::move(file).error());
  const std::unique_ptr<MemorySource> source = memory_of(image.store, image.raw_bytes);
  const auto next = [&] { return source->next(); };
  const auto work = [&](Chunk chunk) -> Result<Chunk> {
    if (!chunk.zero)
      if (auto filled = source->fill(chunk); !filled) return Failure(std::move(filled).error());
    return chunk;
  };
  const auto take = [&](const Chunk& chunk) -> Result<void> {
    if (auto written = chunk.zero ? (file->skip(chunk.bytes), Result<void>()) : append_sparsely(*file, chunk);
        !written)
      return written;
    if (progress) progress(file->size(), image.raw_bytes);
    return {};
  };
  if (auto done = in_order<Chunk, Chunk>(threads != 0 ? threads : usable_cpus(), next, work, take); !done)
    return Failure(std::move(done).error());
  if (auto named = file->commit(); !named) return Failure(std::move(named).error());
  return file->size();
}

}  // namespace uffdkit::image
