#include "image/open_image.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <linux/openat2.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <filesystem>
#include <system_error>
#include <utility>

#include "image/layered_store.h"
#include "store/access_time.h"

namespace uffdkit::image {
namespace {

// The path of an open file, without symbolic links.
Result<std::filesystem::path> path_of(int fd, const std::string& name) {
  std::error_code error;
  std::filesystem::path path = std::filesystem::read_symlink(fmt::format("/proc/self/fd/{}", fd), error);
  if (error) return Failure(Error::from_errno("find the folder of " + name, error.value()));
  return path;
}

// The one that the file lies in.
Result<UniqueFd> open_folder(const std::filesystem::path& file) {
  const std::string path = file.parent_path().string();
  UniqueFd folder(::open(path.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC));
  if (!folder) return Failure(Error::from_open("the folder " + path, errno));
  return folder;
}

UniqueFd open_beside(int folder, const std::string& name) {
  open_how how{};
  how.flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  how.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
  return UniqueFd(static_cast<int>(::syscall(SYS_openat2, folder, name.c_str(), &how, sizeof how)));
}

// Or ours, who are trusted anyway: what lies beside an image stands for its bytes.
bool has_same_owner(int image, int other) {
  struct stat of_image;
  struct stat of_other;
  if (::fstat(image, &of_image) < 0 || ::fstat(other, &of_other) < 0) return false;
  return of_other.st_uid == of_image.st_uid || of_other.st_uid == ::geteuid();
}

// Whether `set` is a diff of `image` in which nothing differs.
bool shows_the_same(const Record& set, const Record& image) {
  return set.is_diff && set.parent == image.identity && set.identity == image.identity &&
         set.raw_bytes == image.raw_bytes;
}

}  // namespace

Result<std::string> file_key(int fd, const std::string& name) {
  struct stat status;
  if (::fstat(fd, &status) < 0) return Failure(Error::from_errno("stat " + name, errno));
  return fmt::format("{}:{}:{}:{}.{}", status.st_dev, status.st_ino, status.st_size, status.st_mtim.tv_sec,
                     status.st_mtim.tv_nsec);
}

ImageOpener::ImageOpener(std::shared_ptr<FrameCache> cache, Wrap wrap)
    : cache_(std::move(cache)), wrap_(std::move(wrap)) {}

Result<OpenImage> ImageOpener::open(const std::string& path) {
  UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file) return Failure(Error::from_open("the image " + path, errno));
  return open(std::move(file), path);
}

Result<OpenImage> ImageOpener::open(UniqueFd file, const std::string& name) {
  Result<FileBytes> bytes = look_at(file, name);
  if (!bytes) return Failure(std::move(bytes).error());
  if (bytes->kind == Kind::raw)
    return OpenImage{.store = std::move(bytes->wrapped), .layers = {}, .raw_bytes = bytes->size};
  if (bytes->kind == Kind::ambiguous)
    return Failure(
        Error(
            fmt::format("{} begins as compressed data does, and has whole pages as memory does: which of the "
                        "two it is cannot be told",
                        name),
            EBADMSG)
            .with_remedy("if it is an image, it was cut short: restore it from a copy; if another program "
                         "compressed it: uffdkit "
                         "image convert --zstd; if it is raw memory: uffdkit image create --raw, and use "
                         "what that makes"));
  Result<std::shared_ptr<ImageFile>> first = share(std::move(*bytes));
  if (!first) return Failure(std::move(first).error());
  std::vector<std::shared_ptr<ImageFile>> layers{std::move(*first)};
  const Record& record = layers.front()->record();
  if (record.is_diff) {
    Result<std::filesystem::path> path = path_of(file.get(), name);
    if (!path) return Failure(std::move(path).error());
    const Result<UniqueFd> folder = open_folder(*path);
    if (!folder) return Failure(folder.error());
    if (auto added = add_parents(folder->get(), path->parent_path().string(), layers); !added)
      return Failure(std::move(added).error());
  }
  Result<std::shared_ptr<Store>> store = make_layered_store(name, layers);
  if (!store) return Failure(std::move(store).error());
  return OpenImage{.store = std::move(*store), .layers = std::move(layers), .raw_bytes = record.raw_bytes};
}

Result<void> ImageOpener::add_stored_set(OpenImage& image, int file, const std::string& name) {
  if (image.is_raw()) return {};
  const Result<std::filesystem::path> path = path_of(file, name);
  if (!path) return Failure(path.error());
  const std::string set_path = path->string() + kStoredSetSuffix;
  const Result<UniqueFd> folder = open_folder(*path);
  if (!folder) return Failure(folder.error());
  const UniqueFd set_file = open_beside(folder->get(), path->filename().string() + kStoredSetSuffix);
  if (!set_file && errno == ENOENT) return {};
  if (!set_file) return Failure(Error::from_open("the stored working set " + set_path, errno));
  if (!has_same_owner(file, set_file.get()))
    return Failure(Error(set_path + " is another user's than the image", EPERM)
                       .with_remedy("make it as the image's owner: uffdkit image store-set"));
  Result<std::shared_ptr<ImageFile>> set = open_layer(set_file, set_path);
  if (!set) return Failure(std::move(set).error());
  const Record& own = image.layers.front()->record();
  if (*set == nullptr || !shows_the_same((*set)->record(), own))
    return Failure(Error(fmt::format("{} is no working set stored of {}", set_path, name), ESTALE)
                       .with_remedy("make it anew: uffdkit image store-set"));
  std::vector<std::shared_ptr<ImageFile>> layers{std::move(*set)};
  layers.insert(layers.end(), image.layers.begin(), image.layers.end());
  Result<std::shared_ptr<Store>> store = make_layered_store(name, std::move(layers));
  if (!store) return Failure(std::move(store).error());
  image.stored_set = std::make_shared<StoredSet>(std::move(*store), image.store);
  image.store = image.stored_set;
  return {};
}

Result<void> ImageOpener::add_parents(int folder, const std::string& path,
                                      std::vector<std::shared_ptr<ImageFile>>& layers) {
  while (layers.back()->record().is_diff) {
    const Record& child = layers.back()->record();
    const std::string child_name = layers.back()->name();
    if (layers.size() == kLayersMax)
      return Failure(
          Error(fmt::format("{} has more than {} layers", layers.front()->name(), kLayersMax), ELOOP)
              .with_remedy("make a whole image of some of them: uffdkit image apply"));
    const std::string name = path + "/" + child.parent_name;
    const UniqueFd file = open_beside(folder, child.parent_name);
    if (!file)
      return Failure(
          Error::from_errno(fmt::format("open {}, the parent of {}", name, child_name), errno)
              .with_remedy("an image's parents lie in its own folder, under the names that they had "
                           "when it was made, and are no symbolic links"));
    Result<std::shared_ptr<ImageFile>> parent = open_layer(file, name);
    if (!parent) return Failure(std::move(parent).error());
    const bool is_image = *parent != nullptr;
    if (!is_image || (*parent)->record().identity != child.parent)
      return Failure(
          Error(fmt::format("{} is not the parent of {}: it {}, and should be the image {}", name, child_name,
                            is_image ? "is the image " + to_string((*parent)->record().identity)
                                     : std::string("is no compressed image"),
                            to_string(child.parent)),
                ESTALE)
              .with_remedy(
                  "put the image there that it was made from; 'uffdkit image info' shows identities"));
    layers.push_back(std::move(*parent));
  }
  return {};
}

Result<std::shared_ptr<ImageFile>> ImageOpener::open_layer(const UniqueFd& file, const std::string& name) {
  Result<FileBytes> bytes = look_at(file, name);
  if (!bytes) return Failure(std::move(bytes).error());
  if (bytes->kind != Kind::compressed) return nullptr;
  return share(std::move(*bytes));
}

Result<ImageOpener::FileBytes> ImageOpener::look_at(const UniqueFd& file, const std::string& name) {
  leave_access_time(file.get());
  Result<std::shared_ptr<Store>> store = open_file_store(file.get(), name);
  if (!store) return Failure(std::move(store).error());
  Result<std::string> key = file_key(file.get(), name);
  if (!key) return Failure(std::move(key).error());
  struct stat status;
  if (::fstat(file.get(), &status) < 0) return Failure(Error::from_errno("stat " + name, errno));
  const auto size = static_cast<std::uint64_t>(status.st_size);
  std::array<std::byte, 4> first{};
  if (::pread(file.get(), first.data(), first.size(), 0) < 0)
    return Failure(Error::from_errno("read " + name, errno));
  return FileBytes{.store = *store,
                   .wrapped = wrap_ ? wrap_(*store) : *store,
                   .size = size,
                   .key = std::move(*key),
                   .kind = kind_of(first, size)};
}

Result<std::shared_ptr<ImageFile>> ImageOpener::share(FileBytes bytes) {
  const auto known = [&]() -> std::shared_ptr<ImageFile> {
    const auto found = open_.find(bytes.key);
    return found == open_.end() ? nullptr : found->second.lock();
  };
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(open_, [](const auto& entry) { return entry.second.expired(); });
    if (auto file = known()) return file;
  }
  Result<std::shared_ptr<ImageFile>> file =
      ImageFile::open(*bytes.store, bytes.size, std::move(bytes.wrapped), cache_);
  if (!file) return file;
  const std::lock_guard lock(mutex_);
  if (auto others = known()) return others;
  open_[bytes.key] = *file;
  return file;
}

}  // namespace uffdkit::image
