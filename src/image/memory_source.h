// What images are made of: memory, chunk by chunk.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "image/format.h"

namespace uffdkit::image {

// A multiple of every frame size, and of an identity's blocks.
inline constexpr std::size_t kChunkBytes = 1u << 20;
inline constexpr std::size_t kChunkPages = kChunkBytes / kPageBytes;

struct Chunk {
  std::uint64_t offset;  // in the memory, a multiple of kChunkBytes
  std::size_t bytes;     // up to kChunkBytes; less only at the memory's end
  bool zero = false;     // all of it is; then `memory` may be empty
  // The bytes, up to whole pages, the rest of the last one zero.
  std::vector<std::byte> memory = {};
  // Of a source of diffs: whether each page is left to the parent. `memory` has the parent's bytes then.
  std::vector<bool> parents = {};
};

// `bytes` is not empty.
bool is_all_zero(std::span<const std::byte> bytes);

class MemorySource {
 public:
  virtual ~MemorySource() = default;
  // Of all the memory; 0 if that shows only at its end. For the progress that is told.
  virtual std::uint64_t raw_bytes() const = 0;
  // The next chunk, its memory filled or left to fill(); nothing at the end. One thread at a time.
  virtual Result<std::optional<Chunk>> next() = 0;
  // Fills a chunk that next() gave. Several threads at once.
  virtual Result<void> fill(Chunk& chunk) = 0;
};

// All of `store`, of which `raw_bytes` count.
std::unique_ptr<MemorySource> memory_of(std::shared_ptr<Store> store, std::uint64_t raw_bytes);

// The same, to be made a diff of `parent`: pages that both have alike are left to it, but for those of
// `kept`, which has a bit for each page, or for fewer.
std::unique_ptr<MemorySource> difference(std::shared_ptr<Store> parent, std::shared_ptr<Store> store,
                                         std::uint64_t raw_bytes, std::vector<bool> kept = {});

// The same, to be made a diff again: pages that `runs` say are the parent's are left to it.
std::unique_ptr<MemorySource> memory_with_runs(std::shared_ptr<Store> store, std::uint64_t raw_bytes,
                                               std::vector<PageRun> runs);

// Of a sparse file that has only the pages which differ from `parent`, the memory of an image of
// `parent_bytes`: holes are left to that. A page that is data in part is data. Errors: the file cannot be
// opened, has another length, or lies on a file system that cannot tell what is a hole.
Result<std::unique_ptr<MemorySource>> sparse_difference(std::shared_ptr<Store> parent,
                                                        std::uint64_t parent_bytes, const std::string& path);

// What zstd makes of the file at `path`, read from its start to its end. Errors: it cannot be opened. Later:
// what zstd says is wrong with it.
Result<std::unique_ptr<MemorySource>> memory_from_zstd(const std::string& path);

}  // namespace uffdkit::image
