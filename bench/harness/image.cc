#include "harness/image.h"

#include <fcntl.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <vector>

namespace uffdkit::bench {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

void fill(std::byte* bytes, std::uint64_t page) {
  std::array<std::uint64_t, kPageBytes / sizeof(std::uint64_t)> words;
  words.fill(stamp(page));
  std::memcpy(bytes, words.data(), kPageBytes);
}

UniqueFd make(const std::string& path) {
  UniqueFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!file) fail("create " + path);
  return file;
}

}  // namespace

void write_image(const std::string& path, std::uint64_t pages) {
  const UniqueFd file = make(path);
  constexpr std::uint64_t kPagesAtOnce = 256;
  std::vector<std::byte> buffer(kPagesAtOnce * kPageBytes);
  for (std::uint64_t page = 0; page < pages; page += kPagesAtOnce) {
    const std::uint64_t count = std::min(kPagesAtOnce, pages - page);
    for (std::uint64_t i = 0; i < count; ++i) fill(&buffer[i * kPageBytes], page + i);
    if (::write(file.get(), buffer.data(), count * kPageBytes) != static_cast<ssize_t>(count * kPageBytes))
      fail("write " + path);
  }
}

void write_sparse_image(const std::string& path, std::uint64_t bytes, std::span<const std::uint64_t> data) {
  const UniqueFd file = make(path);
  if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) fail("extend " + path);
  std::array<std::byte, kPageBytes> buffer;
  for (const std::uint64_t page : data) {
    fill(buffer.data(), page);
    if (::pwrite(file.get(), buffer.data(), kPageBytes, static_cast<off_t>(page * kPageBytes)) !=
        static_cast<ssize_t>(kPageBytes))
      fail("write " + path);
  }
}

}  // namespace uffdkit::bench
