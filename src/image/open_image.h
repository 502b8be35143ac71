// Opening an image with all that it is made of, as a store of the memory that it shows.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/unique_fd.h>

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "image/frame_cache.h"
#include "image/image_file.h"
#include "image/stored_set.h"

namespace uffdkit::image {

// As many files as an image may be made of, itself included.
inline constexpr std::size_t kLayersMax = 128;

struct OpenImage {
  // The memory. A raw file's own store, or one that is put together from frames of the files below.
  std::shared_ptr<Store> store;
  // The image's file, its parent, the parent's parent and so on. Empty for a raw file.
  std::vector<std::shared_ptr<ImageFile>> layers;

  bool is_raw() const { return layers.empty(); }
  // Bytes of the memory, which need not be whole pages.
  std::uint64_t raw_bytes = 0;
  // `store`, where add_stored_set() has found a file.
  std::shared_ptr<StoredSet> stored_set = nullptr;
};

// Opens raw memory files and images. Files that are open already are shared, so that images with a common
// parent share its frames in the cache. Threads: any; opening may block.
class ImageOpener {
 public:
  // What to put around the store of every file that is opened, below the decoder. Tables are read without it.
  using Wrap = std::function<std::shared_ptr<Store>(std::shared_ptr<Store>)>;
  explicit ImageOpener(std::shared_ptr<FrameCache> cache, Wrap wrap = {});

  // The file at `path`. Parents are looked for beside it, by their names alone; symbolic links are followed
  // in `path` itself only. Errors: a file cannot be opened; it is damaged, or it cannot be told whether it is
  // an image; a parent is missing, has another identity than it should, is a raw file, or there are too many.
  Result<OpenImage> open(const std::string& path);
  // Likewise for an open file of this program's own, which `name` stands for in messages: reading it is not
  // noted as an access from now on.
  Result<OpenImage> open(UniqueFd file, const std::string& name);

  // Has the memory of an image that is open as `file` read from what lies beside it under its name and
  // kStoredSetSuffix, if there is anything. Errors: that cannot be opened, or is not of this image; then
  // `image` is as it was.
  Result<void> add_stored_set(OpenImage& image, int file, const std::string& name);

  const FrameCache& cache() const { return *cache_; }

 private:
  struct FileBytes {
    std::shared_ptr<Store> store;
    std::shared_ptr<Store> wrapped;
    std::uint64_t size;
    std::string key;  // of the file, whatever its name
    Kind kind;
  };
  Result<FileBytes> look_at(const UniqueFd& file, const std::string& name);
  Result<std::shared_ptr<ImageFile>> share(FileBytes bytes);
  // nullptr: it is no compressed image.
  Result<std::shared_ptr<ImageFile>> open_layer(const UniqueFd& file, const std::string& name);
  Result<void> add_parents(int folder, const std::string& path,
                           std::vector<std::shared_ptr<ImageFile>>& layers);

  const std::shared_ptr<FrameCache> cache_;
  const Wrap wrap_;
  std::mutex mutex_;  // never held while something may block
  // By device, inode, size and time of change.
  std::map<std::string, std::weak_ptr<ImageFile>> open_;
};

// Device, inode, size and time of change of an open file: as long as these are the same, so are its bytes.
Result<std::string> file_key(int fd, const std::string& name);

}  // namespace uffdkit::image
