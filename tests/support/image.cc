#include "support/image.h"

#include <fcntl.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace uffdkit::test {
namespace {

constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kWords = kPageBytes / sizeof(std::uint64_t);

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

off_t offset_of(std::size_t page) {
  return static_cast<off_t>(page * kPageBytes);
}

}  // namespace

Image::Image(std::string path, std::size_t pages, std::uint64_t seed)
    : path_(std::move(path)), pages_(pages), seed_(seed) {
  const UniqueFd file(open(path_.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_CLOEXEC, 0600));
  if (!file || ftruncate(file.get(), offset_of(pages)) != 0) fail(path_);
  std::array<std::byte, kPageBytes> bytes;
  for (std::size_t page = 0; page < pages; ++page) {
    if (is_hole(page)) continue;
    fill(page, bytes);
    if (pwrite(file.get(), bytes.data(), bytes.size(), offset_of(page)) != kPageBytes) fail(path_);
  }
}

std::uint64_t Image::word(std::size_t page, std::size_t index) const {
  // Odd, so never zero; neighbours in any direction differ.
  return ((page + 1) * 0x9e3779b97f4a7c15u + index * 0xc2b2ae3d27d4eb4fu + seed_ * 0x165667b19e3779f9u) | 1u;
}

void Image::fill(std::size_t page, std::span<std::byte, 4096> bytes) const {
  for (std::size_t index = 0; index < kWords; ++index) {
    const std::uint64_t value = is_zero(page) ? 0 : word(page, index);
    std::memcpy(bytes.data() + index * sizeof value, &value, sizeof value);
  }
}

bool Image::holds(std::size_t page, std::span<const std::byte, 4096> bytes) const {
  bool same = true;
  for (std::size_t index = 0; index < kWords; ++index) {
    std::uint64_t value;
    std::memcpy(&value, bytes.data() + index * sizeof value, sizeof value);
    same = same && value == (is_zero(page) ? 0 : word(page, index));
  }
  return same;
}

void Image::make_cold() const {
  const UniqueFd file(open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  // Only what is written back can be dropped.
  if (!file || fdatasync(file.get()) != 0) fail(path_);
  if (const int error = posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED); error != 0) {
    errno = error;
    fail(path_);
  }
}

void Image::cut(std::size_t pages) const {
  if (truncate(path_.c_str(), offset_of(pages)) != 0) fail(path_);
}

}  // namespace uffdkit::test
