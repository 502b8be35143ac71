#include "image/output_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>

namespace uffdkit::image {
namespace {

Failure name_is_taken(const std::string& path) {
  return Failure(Error(fmt::format("there is a file {} already", path), EEXIST)
                     .with_remedy("choose another name, or replace it by --force"));
}

std::string folder_of(const std::string& path) {
  const std::string folder = std::filesystem::path(path).parent_path().string();
  return folder.empty() ? "." : folder;
}

// Makes a file with a hidden name beside `path`; `name` is what became of it.
UniqueFd open_hidden(const std::string& path, std::string& name) {
  const std::filesystem::path whole(path);
  name = (std::filesystem::path(folder_of(path)) / ("." + whole.filename().string() + ".XXXXXX")).string();
  return UniqueFd(::mkostemp(name.data(), O_CLOEXEC));
}

}  // namespace

Result<OutputFile> OutputFile::create(const std::string& path, bool replace) {
  struct stat there;
  if (::lstat(path.c_str(), &there) == 0) {
    if (!replace) return name_is_taken(path);
    if (!S_ISREG(there.st_mode))
      return Failure(Error(path + " is not a regular file, and is not replaced", EEXIST)
                         .with_remedy("choose another name"));
  }
  OutputFile file(path, replace);
  file.fd_.reset(::open(folder_of(path).c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  // The file system, or the kernel, knows no files without a name.
  if (!file.fd_ && (errno == EOPNOTSUPP || errno == EISDIR || errno == EINVAL))
    file.fd_ = open_hidden(path, file.temporary_);
  if (!file.fd_) {
    const int os_error = errno;
    file.temporary_.clear();
    return Failure(Error::from_errno("make a file in the folder " + folder_of(path), os_error)
                       .with_remedy("see that the folder exists and that this user may write to it"));
  }
  return file;
}

OutputFile::~OutputFile() {
  if (fd_ && !temporary_.empty()) ::unlink(temporary_.c_str());
}

Result<void> OutputFile::append(std::span<const std::byte> bytes) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(fd_.get(), bytes.data(), bytes.size(), static_cast<off_t>(size_));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return failure("write", errno);
    size_ += static_cast<std::uint64_t>(written);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
  }
  return {};
}

Result<void> OutputFile::commit() {
  if (::ftruncate(fd_.get(), static_cast<off_t>(size_)) != 0) return failure("set the length of", errno);
  if (::fdatasync(fd_.get()) != 0) return failure("write", errno);
  if (temporary_.empty()) {
    const std::string self = fmt::format("/proc/self/fd/{}", fd_.get());
    if (::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, path_.c_str(), AT_SYMLINK_FOLLOW) == 0) return {};
    if (errno != EEXIST || !replace_) return errno == EEXIST ? name_is_taken(path_) : failure("name", errno);
    // A link replaces nothing, but a renaming does.
    UniqueFd reserved = open_hidden(path_, temporary_);
    if (!reserved) {
      temporary_.clear();
      return failure("name", errno);
    }
    if (::unlink(temporary_.c_str()) != 0 ||
        ::linkat(AT_FDCWD, self.c_str(), AT_FDCWD, temporary_.c_str(), AT_SYMLINK_FOLLOW) != 0)
      return failure("name", errno);
  }
  const unsigned flags = replace_ ? 0 : RENAME_NOREPLACE;
  if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, path_.c_str(), flags) != 0)
    return errno == EEXIST ? name_is_taken(path_) : failure("name", errno);
  temporary_.clear();
  return {};
}

Failure OutputFile::failure(const std::string& doing, int os_error) const {
  return Failure(Error::from_errno(doing + " " + path_, os_error)
                     .with_remedy("nothing was left behind; see that the file system has room and is sound"));
}

}  // namespace uffdkit::image
