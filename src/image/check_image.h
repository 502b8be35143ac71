// Going through all of an image: to see whether it is sound, and to write its memory out.
#pragma once

#include <uffdkit/error.h>

#include <cstdint>
#include <string>
#include <vector>

#include "image/open_image.h"
#include "image/write_image.h"

namespace uffdkit::image {

struct Verified {
  std::vector<Error> problems;  // at most kProblemsMax; none: the image is sound
  std::uint64_t frames = 0;     // that were looked at
  Identity identity{};          // of the memory, as far as it could be read
};
inline constexpr std::size_t kProblemsMax = 20;

// Decompresses every frame of every file that `image` is made of, and compares its checksum, what the page
// map says of it, and at last the identity of the whole memory. Of a raw file it computes the identity.
// Several frames can be wrong; the identity is compared only if none is. `image` was opened with a cache that
// nobody else uses.
Verified verify_image(const OpenImage& image, unsigned threads, const Progress& progress);

// Writes the memory of `image` to `path` as a raw file, with holes for zeros. The file appears when it is
// complete.
Result<std::uint64_t> extract_image(const OpenImage& image, const std::string& path, bool replace,
                                    unsigned threads, const Progress& progress);

}  // namespace uffdkit::image
