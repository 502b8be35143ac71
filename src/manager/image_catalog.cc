#include "manager/image_catalog.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/openat2.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>
#include <utility>

#include "store/recovering_store.h"

namespace uffdkit {
namespace {

// Whether there is no other way to write this path, so that rules about names are rules about files.
bool is_plain(std::string_view path) {
  while (true) {
    const std::size_t slash = path.find('/');
    const std::string_view part = path.substr(0, slash);
    if (part.empty() || part == "." || part == "..") return false;
    if (slash == std::string_view::npos) return true;
    path.remove_prefix(slash + 1);
  }
}

}  // namespace

ImageCatalog::ImageCatalog(ReadRetries retries, std::vector<StoreFault> faults, ByteCount cache_bytes,
                           WorkingSets working_sets, Threads threads, std::shared_ptr<BatchReaders> readers)
    : retries_(retries),
      working_sets_(working_sets),
      threads_(threads),
      readers_(std::move(readers)),
      opener_(std::make_shared<image::FrameCache>(cache_bytes),
              [faults = std::move(faults)](std::shared_ptr<Store> file) {
                return make_faulty_store(std::move(file), faults);
              }) {}

Result<void> ImageCatalog::add(const std::string& name, const std::string& path) {
  if (name.empty()) return Failure(Error("an image needs a name", EINVAL));
  if (paths_.contains(name))
    return Failure(Error(fmt::format("there are two images named {}", name), EEXIST)
                       .with_remedy("give each --image a name of its own"));
  // Known by its name all the same: whoever goes on with what there is has clients that wait for it.
  paths_[name] = path;
  if (auto opened = open_path(path); !opened) return Failure(std::move(opened).error());
  return {};
}

Result<void> ImageCatalog::add_directory(const std::string& directory) {
  UniqueFd fd(::open(directory.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return Failure(Error::from_open("the image directory " + directory, errno));
  directories_.push_back({.path = directory, .fd = std::move(fd)});
  return {};
}

Result<std::shared_ptr<StoreLane>> ImageCatalog::open(const std::string& name) {
  if (const auto found = paths_.find(name); found != paths_.end()) return open_path(found->second);
  if (!is_plain(name))
    return Failure(
        Error(fmt::format("the name of the image {} has an empty part, or \".\" or \"..\"", name), EINVAL)
            .with_remedy("give its path below the directory, without these"));
  for (const Directory& directory : directories_) {
    open_how how{};
    how.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
    how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
    UniqueFd file(
        static_cast<int>(::syscall(SYS_openat2, directory.fd.get(), name.c_str(), &how, sizeof how)));
    if (file) return share(std::move(file), directory.path + "/" + name);
    if (errno == ELOOP || errno == EXDEV)
      return Failure(Error::from_errno("open the image " + name, errno)
                         .with_remedy("an image lies below its directory, with no symbolic link on the way"));
    if (errno != ENOENT) return Failure(Error::from_open("the image " + name, errno));
  }
  return Failure(
      Error(fmt::format("there is no image named {}", name), ENOENT)
          .with_remedy("name one that the manager was given (--image NAME=FILE, --images DIRECTORY)"));
}

Result<std::shared_ptr<StoreLane>> ImageCatalog::open_path(const std::string& path) {
  UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file) return Failure(Error::from_open("the image " + path, errno));
  return share(std::move(file), path);
}

Result<std::shared_ptr<SharedImage>> ImageCatalog::share_memory(const std::shared_ptr<StoreLane>& image) {
  std::erase_if(shared_, [](const auto& entry) { return entry.expired(); });
  for (const auto& entry : shared_)
    if (auto known = entry.lock(); known && known->lane() == image) return known;
  Result<std::shared_ptr<SharedImage>> memory = SharedImage::create(image);
  if (memory) shared_.push_back(*memory);
  return memory;
}

std::vector<std::shared_ptr<SharedImage>> ImageCatalog::shared_memory() const {
  std::vector<std::shared_ptr<SharedImage>> all;
  for (const auto& entry : shared_)
    if (auto known = entry.lock()) all.push_back(std::move(known));
  return all;
}

Result<std::shared_ptr<StoreLane>> ImageCatalog::share(UniqueFd file, const std::string& name) {
  const Result<std::string> key = image::file_key(file.get(), name);
  if (!key) return Failure(key.error());
  const auto known = [&]() -> std::shared_ptr<StoreLane> {
    const auto found = open_.find(*key);
    return found == open_.end() ? nullptr : found->second.lock();
  };
  {
    const std::lock_guard lock(open_mutex_);
    std::erase_if(open_, [](const auto& entry) { return entry.second.expired(); });
    if (auto lane = known()) return lane;
  }
  Result<image::OpenImage> opened = open_image(file.get(), name);
  if (!opened) return Failure(std::move(opened).error());
  Result<std::shared_ptr<StoreLane>> lane = make_lane(file, std::move(*opened), name);
  if (!lane) return lane;
  const std::lock_guard lock(open_mutex_);
  // Somebody else may have opened it meanwhile, by another name.
  if (auto others = known()) return others;
  open_[*key] = *lane;
  return lane;
}

Result<image::OpenImage> ImageCatalog::open_image(int file, const std::string& name) {
  // The image's own file goes to its store.
  UniqueFd copy(::fcntl(file, F_DUPFD_CLOEXEC, 0));
  if (!copy) return Failure(Error::from_errno("open " + name, errno));
  return opener_.open(std::move(copy), name);
}

Result<std::shared_ptr<StoreLane>> ImageCatalog::make_lane(UniqueFd& file, image::OpenImage image,
                                                           const std::string& name) {
  std::shared_ptr<ImageWorkingSet> set;
  if (working_sets_ == WorkingSets::yes) {
    Result<void> stored = opener_.add_stored_set(image, file.get(), name);
    if (auto found = ImageWorkingSet::open(file.get(), image, name, std::move(stored)))
      set = std::move(*found);
  }
  Result<std::shared_ptr<StoreLane>> lane =
      StoreLane::create(std::move(image.store), retries_, {}, threads_, readers_);
  if (lane) (*lane)->keep(std::move(file));
  if (!lane || !set) return lane;
  const std::lock_guard lock(open_mutex_);
  std::erase_if(sets_, [](const auto& entry) { return entry.first.expired(); });
  sets_[*lane] = std::move(set);
  return lane;
}

std::shared_ptr<ImageWorkingSet> ImageCatalog::working_set(const std::shared_ptr<StoreLane>& image) {
  const std::lock_guard lock(open_mutex_);
  const auto found = sets_.find(image);
  return found == sets_.end() ? nullptr : found->second;
}

Result<std::shared_ptr<StoreLane>> ImageCatalog::recovering_lane(UniqueFd& file, const std::string& name,
                                                                 ByteCount size,
                                                                 std::shared_ptr<Store> rest) {
  // The catalog outlives all sessions, but not a read that never comes back.
  const auto reopen = [own = weak_from_this(), fd = file.get(), name]() -> Result<std::shared_ptr<Store>> {
    const std::shared_ptr<ImageCatalog> catalog = own.lock();
    if (!catalog) return Failure(Error("the manager has ended", ESHUTDOWN));
    Result<image::OpenImage> opened = catalog->open_image(fd, name);
    if (!opened) return Failure(std::move(opened).error());
    return std::move(opened->store);
  };
  Result<std::shared_ptr<StoreLane>> lane =
      StoreLane::create(make_recovering_store(name, size, std::move(rest), reopen), retries_, {}, threads_);
  if (lane) (*lane)->keep(std::move(file));
  return lane;
}

Result<ImageCatalog::TakenUp> ImageCatalog::take_up(UniqueFd& file, const std::string& name, ByteCount size) {
  const Result<std::string> key = image::file_key(file.get(), name);
  Result<image::OpenImage> opened = open_image(file.get(), name);
  std::optional<Error> damage;
  if (!opened)
    damage = opened.error();
  else if (opened->store->size() < size)
    damage = Error(fmt::format("{} has {} bytes, but had {} when it was opened first", name,
                               opened->store->size().value, size.value),
                   ESTALE);
  // Never one that is open already: the descriptor stays the one that it was.
  Result<std::shared_ptr<StoreLane>> lane =
      damage ? recovering_lane(file, name, size, opened ? std::move(opened->store) : nullptr)
             : make_lane(file, std::move(*opened), name);
  if (!lane) return Failure(std::move(lane).error());
  // Whoever asks for a damaged image by its name has it opened anew, or hears what is wrong with it.
  if (key && !damage) {
    const std::lock_guard lock(open_mutex_);
    open_[*key] = *lane;
  }
  return TakenUp{.lane = std::move(*lane), .damage = std::move(damage)};
}

Result<std::shared_ptr<SharedImage>> ImageCatalog::take_up_memory(const std::shared_ptr<StoreLane>& image,
                                                                  UniqueFd& file, UniqueFd& filled) {
  Result<std::shared_ptr<SharedImage>> memory = SharedImage::take_up(image, file, filled);
  if (memory) shared_.push_back(*memory);
  return memory;
}

}  // namespace uffdkit
