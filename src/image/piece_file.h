// A store that is put together from parts of a file which lie anywhere in it, such as /proc/PID/mem.
#pragma once

#include <uffdkit/store.h>
#include <uffdkit/unique_fd.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

namespace uffdkit::image {

struct FilePiece {
  std::uint64_t position;  // in the file
  std::uint64_t bytes;     // in the store, whole pages, at least one
  std::uint64_t stored;    // of these, how many the file has; the rest is zero
};

// The pieces, one behind the other. `name` is for messages. Reads may block whatever they are asked.
std::shared_ptr<Store> make_piece_store(UniqueFd file, std::string name, std::vector<FilePiece> pieces);

}  // namespace uffdkit::image
