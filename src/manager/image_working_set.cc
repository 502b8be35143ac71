#include "manager/image_working_set.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "image/output_file.h"

namespace uffdkit {
namespace {

constexpr const char* kStoredNotUsed = "stored working set not used";

}  // namespace

Result<std::shared_ptr<ImageWorkingSet>> ImageWorkingSet::open(int file, const image::OpenImage& image,
                                                               const std::string& name, Result<void> stored) {
  std::error_code error;
  const std::filesystem::path path =
      std::filesystem::read_symlink(fmt::format("/proc/self/fd/{}", file), error);
  if (error) return Failure(Error::from_errno("find the folder of " + name, error.value()));
  std::shared_ptr<ImageWorkingSet> own(new ImageWorkingSet(path.string(), image));
  if (!stored) own->problems_.push_back(std::move(stored).error().within(kStoredNotUsed));
  // Without a working set nobody needs to know what a raw image holds.
  struct stat there;
  if (::lstat(own->path_.c_str(), &there) != 0) return own;
  Result<std::optional<image::WorkingSet>> set = std::nullopt;
  if (auto known = own->identify(*image.store); !known)
    set = Failure(std::move(known).error());
  else
    set = own->read(*known);
  if (!set) {
    own->problems_.push_back(std::move(set).error().within("working set not used"));
  } else if (const std::optional<image::WorkingSet>& recorded = *set; recorded) {
    own->use(*recorded, *image.store);
  }
  return own;
}

ImageWorkingSet::ImageWorkingSet(const std::string& image_path, const image::OpenImage& image)
    : path_(image_path + image::kWorkingSetSuffix),
      is_raw_(image.is_raw()),
      memory_pages_(image.store->size().value / image::kPageBytes),
      stored_set_(image.stored_set) {
  if (!is_raw_) identity_ = image.layers.front()->record().identity;
}

std::optional<std::string> ImageWorkingSet::can_be_stored_for() const {
  if (is_raw_) return std::nullopt;
  return path_.substr(0, path_.size() - std::strlen(image::kWorkingSetSuffix));
}

Result<image::Identity> ImageWorkingSet::identify(Store& store) {
  if (identity_) return *identity_;
  Result<image::Identity> identity = image::identity_of(store);
  if (identity) identity_ = *identity;
  return identity;
}

std::shared_ptr<const PrefetchOrder> ImageWorkingSet::order() const {
  const std::lock_guard lock(mutex_);
  return order_;
}

std::optional<Error> ImageWorkingSet::problem() {
  if (stored_set_)
    if (std::optional<Error> found = stored_set_->problem())
      return (*std::move(found)).within(kStoredNotUsed);
  const std::lock_guard lock(mutex_);
  if (problems_.empty()) return std::nullopt;
  Error problem = std::move(problems_.front());
  problems_.pop_front();
  return problem;
}

void ImageWorkingSet::use(const image::WorkingSet& set, Store& store) {
  auto order =
      set.pages.empty() ? nullptr : std::make_shared<const PrefetchOrder>(image::by_frames(set.pages, store));
  const std::lock_guard lock(mutex_);
  order_ = std::move(order);
}

Result<std::optional<image::WorkingSet>> ImageWorkingSet::read(const image::Identity& identity) const {
  Result<std::optional<image::WorkingSet>> set = image::read_working_set(path_);
  if (!set) return set;
  const std::optional<image::WorkingSet>& recorded = *set;
  if (!recorded) return set;
  if (auto own = image::check_recorded_of(*recorded, identity, memory_pages_, path_); !own)
    return Failure(std::move(own).error());
  return set;
}

Result<void> ImageWorkingSet::add_recording(Store& store, std::span<const std::uint32_t> pages) {
  const std::lock_guard lock(file_mutex_);
  const Result<image::Identity> identity = identify(store);
  if (!identity) return Failure(identity.error());
  image::WorkingSet recording{.identity = *identity,
                              .memory_pages = memory_pages_,
                              .recordings = 1,
                              .pages = {pages.begin(), pages.end()},
                              .runs = {}};
  // One that is damaged, or another image's, is of no more use.
  std::optional<image::WorkingSet> known = read(*identity).value_or(std::nullopt);
  if (known) image::merge(*known, recording);
  const image::WorkingSet set = known ? *std::move(known) : std::move(recording);
  Result<image::OutputFile> file = image::OutputFile::create(path_, /*replace=*/true);
  if (!file) return Failure(std::move(file).error());
  if (auto written = image::write_working_set(set, *std::move(file)); !written) return written;
  use(set, store);
  return {};
}

void ImageWorkingSet::add_run(const image::WorkingSetRun& run) {
  const std::lock_guard lock(file_mutex_);
  if (!identity_) return;
  std::optional<image::WorkingSet> set = read(*identity_).value_or(std::nullopt);
  if (!set) return;
  UniqueFd file(::open(path_.c_str(), O_WRONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!file) return;
  image::add_run(set->runs, run);
  const std::vector<std::byte> bytes = image::encode_runs(set->runs);
  // Cut off in the middle, the runs are forgotten, and nothing else is.
  (void)::pwrite(file.get(), bytes.data(), bytes.size(), static_cast<off_t>(image::kRunsAt));
}

}  // namespace uffdkit
