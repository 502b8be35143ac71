// The images that clients may have, by name, each opened once and shared by all of its sessions.
// Threads: open() and open_path() from any, and they may block for as long as a file system does; the others
// before that.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/faulty_store.h>
#include <uffdkit/unique_fd.h>

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/shared_image.h"
#include "engine/store_lane.h"
#include "image/open_image.h"
#include "manager/image_working_set.h"

namespace uffdkit {

class ImageCatalog : public std::enable_shared_from_this<ImageCatalog> {
 public:
  // Whether working sets are looked for beside images.
  enum class WorkingSets : bool { no, yes };
  // `faults` are injected into every file of an image that is opened. Decompressed frames of all images are
  // kept in `cache_bytes`. `readers` read what waits for a disk; nullptr: threads do.
  explicit ImageCatalog(ReadRetries retries = {}, std::vector<StoreFault> faults = {},
                        ByteCount cache_bytes = image::kCacheBytesDefault,
                        WorkingSets working_sets = WorkingSets::no, Threads threads = {},
                        std::shared_ptr<BatchReaders> readers = nullptr);

  // `name` stands for the file at `path`. Errors: the name is empty or taken; the file cannot be opened now.
  Result<void> add(const std::string& name, const std::string& path);
  // Every regular file below `directory` can be had by its path there, written in the one way that has no
  // "." or ".." and no "//"; symbolic links are not followed. Errors: no such directory.
  Result<void> add_directory(const std::string& directory);

  // The image of this name, as native clients know it: one that was added, or a file below a directory.
  // Errors: ENOENT if there is none; otherwise why it cannot be opened.
  Result<std::shared_ptr<StoreLane>> open(const std::string& name);
  // The file at `path`.
  Result<std::shared_ptr<StoreLane>> open_path(const std::string& path);
  // The image of so many bytes that another process had opened by this descriptor, which becomes the lane's.
  // What cannot be opened any more, or has become shorter, has a lane too: what is not there fails to be
  // read, until it is there again. Errors: no thread can be started; then the descriptor stays the caller's.
  struct TakenUp {
    std::shared_ptr<StoreLane> lane;
    std::optional<Error> damage;
  };
  Result<TakenUp> take_up(UniqueFd& file, const std::string& name, ByteCount size);
  // Likewise its memory, by the files of it.
  Result<std::shared_ptr<SharedImage>> take_up_memory(const std::shared_ptr<StoreLane>& image, UniqueFd& file,
                                                      UniqueFd& filled);
  // The memory of that image, one for all who share it.
  Result<std::shared_ptr<SharedImage>> share_memory(const std::shared_ptr<StoreLane>& image);
  // What there is of it at this moment.
  std::vector<std::shared_ptr<SharedImage>> shared_memory() const;
  // The working set of an image that is open; nullptr where none is looked for, or could be.
  std::shared_ptr<ImageWorkingSet> working_set(const std::shared_ptr<StoreLane>& image);
  // Of decompressed frames.
  const image::FrameCache& cache() const { return opener_.cache(); }

 private:
  struct Directory {
    std::string path;
    UniqueFd fd;
  };
  // The lane of an open file, shared with whoever has the same file open.
  Result<std::shared_ptr<StoreLane>> share(UniqueFd file, const std::string& name);
  Result<image::OpenImage> open_image(int file, const std::string& name);
  // Of one that cannot be opened now as it was.
  Result<std::shared_ptr<StoreLane>> recovering_lane(UniqueFd& file, const std::string& name, ByteCount size,
                                                     std::shared_ptr<Store> rest);
  // The lane of an image that was opened by this file, which becomes the lane's, unless there is an error.
  Result<std::shared_ptr<StoreLane>> make_lane(UniqueFd& file, image::OpenImage image,
                                               const std::string& name);

  const ReadRetries retries_;
  const WorkingSets working_sets_;
  const Threads threads_;
  const std::shared_ptr<BatchReaders> readers_;
  image::ImageOpener opener_;
  std::map<std::string, std::string> paths_;
  std::vector<Directory> directories_;
  // By device, inode and time of change: a file that was replaced is another image.
  std::mutex open_mutex_;  // never held while something may block
  std::map<std::string, std::weak_ptr<StoreLane>> open_;
  std::map<std::weak_ptr<StoreLane>, std::shared_ptr<ImageWorkingSet>, std::owner_less<>> sets_;
  std::vector<std::weak_ptr<SharedImage>> shared_;
};

}  // namespace uffdkit
