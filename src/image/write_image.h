// Making an image: compressing memory on all CPUs, in order.
#pragma once

#include <uffdkit/error.h>

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "image/format.h"
#include "image/memory_source.h"

namespace uffdkit::image {

// zstd's levels that are worth it here: those below zero are faster still.
inline constexpr int kLevelMin = -7;
inline constexpr int kLevelMax = 19;
inline constexpr int kLevelDefault = -1;

// Told now and then on the calling thread: bytes done, and of how many; 0 if that is not known.
using Progress = std::function<void(std::uint64_t done, std::uint64_t all)>;

// What an image is a diff of.
struct Parent {
  std::string name;  // of its file, which lies in the same folder
  Identity identity;
};

struct WriteOptions {
  std::uint32_t frame_bytes = kFrameBytesDefault;  // a power of two, kFrameBytesMin to kFrameBytesMax
  int level = kLevelDefault;                       // kLevelMin to kLevelMax
  unsigned threads = 0;                            // 0: one for each CPU
  bool replace = false;                            // a file that is there
  Progress progress = {};
};

struct Written {
  Record record;
  std::uint64_t file_bytes = 0;
};

// Writes the memory of `source` to `path`: a diff of `parent`, if there is one, else a whole image. `regions`
// say where in a process it lay, or are empty. The file appears when it is complete, and never in part.
// Errors: those of the source and of writing; there is no memory.
Result<Written> write_image(MemorySource& source, const std::string& path,
                            const std::optional<Parent>& parent, std::vector<Region> regions,
                            const WriteOptions& options);

}  // namespace uffdkit::image
