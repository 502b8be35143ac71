// The working set of an open image: what is brought before it is asked for, and what its sessions add to it.
//
// It lies in the image's own folder, under the image's name and ".ws". Threads: any; open(), add_recording()
// and add_run() may block for as long as a file system does, one at a time.
#pragma once

#include <uffdkit/error.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/prefetch_order.h"
#include "image/open_image.h"
#include "image/working_set.h"

namespace uffdkit {

class ImageWorkingSet {
 public:
  // That of the image which is open as `file`, whether or not anything has been recorded for it. Errors: the
  // file's path cannot be told. One that cannot be used (see problem()) is as good as none.
  // `stored`: why its pages are not read from a file of their own, if there is one.
  static Result<std::shared_ptr<ImageWorkingSet>> open(int file, const image::OpenImage& image,
                                                       const std::string& name, Result<void> stored = {});

  const std::string& path() const { return path_; }
  // The image, whose pages can be stored for themselves (`uffdkit image store-set`) once they are recorded;
  // nothing where that gains nothing, since any page can be read alone.
  std::optional<std::string> can_be_stored_for() const;
  // The pages to bring, in this order; nullptr where nothing was recorded.
  std::shared_ptr<const PrefetchOrder> order() const;
  // Why the file that is there is not used, or the one in which its pages are stored for themselves; each
  // told once.
  std::optional<Error> problem();

  // Writes the file anew, with this recording merged into what it has. It is replaced in one step. `store` is
  // the image's. Errors: the folder cannot be written, or the image cannot be read.
  Result<void> add_recording(Store& store, std::span<const std::uint32_t> pages);
  // Writes down what came of a session, in the file as it is. Not where the file cannot be written, or is not
  // the one that was read here.
  void add_run(const image::WorkingSetRun& run);

 private:
  ImageWorkingSet(const std::string& image_path, const image::OpenImage& image);
  Result<image::Identity> identify(Store& store);
  // The file, if there is one of this image, whose identity is known.
  Result<std::optional<image::WorkingSet>> read(const image::Identity& identity) const;
  void use(const image::WorkingSet& set, Store& store);

  const std::string path_;
  const bool is_raw_;
  std::optional<image::Identity> identity_;  // of a raw image found out when it is needed, under file_mutex_
  const std::uint64_t memory_pages_;
  const std::shared_ptr<image::StoredSet> stored_set_;  // none where its pages lie in the image alone
  std::mutex file_mutex_;                               // held while the file is read and written

  mutable std::mutex mutex_;  // never held while something may block
  std::shared_ptr<const PrefetchOrder> order_;
  std::deque<Error> problems_;
};

}  // namespace uffdkit
