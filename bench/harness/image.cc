#include "harness/image.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <vector>

#include "image/stored_set.h"
#include "support/arguments.h"
#include "support/child.h"

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

// Program files that have so many bytes together, as far as there are so many.
std::vector<std::string> program_files(std::uint64_t bytes) {
  constexpr std::uintmax_t kLeast = 64 * 1024;
  std::vector<std::string> files;
  std::uint64_t found = 0;
  for (const char* folder : {"/usr/lib", "/usr/bin"}) {
    const auto options = std::filesystem::directory_options::skip_permission_denied;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(folder, options)) {
      std::error_code error;
      if (!entry.is_regular_file(error) || entry.is_symlink(error) || entry.file_size(error) < kLeast)
        continue;
      std::array<char, 4> magic{};
      std::ifstream(entry.path(), std::ios::binary).read(magic.data(), magic.size());
      if (std::string_view(magic.data(), magic.size()) != "\177ELF") continue;
      files.push_back(entry.path().string());
      found += entry.file_size(error);
      if (found >= bytes) return files;
    }
  }
  if (files.empty()) throw std::runtime_error("there are no program files in /usr/lib and /usr/bin");
  return files;
}

UniqueFd make(const std::string& path) {
  UniqueFd file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600));
  if (!file) fail("create " + path);
  return file;
}

}  // namespace

double run_command(const std::vector<std::string>& arguments) {
  const std::vector<char*> argv = test::exec_pointers(arguments);
  const auto start = std::chrono::steady_clock::now();
  test::Child command([&](const test::Channel&) {
    const UniqueFd null(::open("/dev/null", O_WRONLY | O_CLOEXEC));
    ::dup2(null.get(), STDOUT_FILENO);
    ::execvp(argv[0], argv.data());
    return 127;
  });
  if (command.wait() != 0) throw std::runtime_error(fmt::format("{} failed", fmt::join(arguments, " ")));
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

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

void write_program_image(const std::string& path, std::uint64_t pages) {
  const std::vector<std::string> programs = program_files(pages * kPageBytes);
  const UniqueFd file = make(path);
  std::array<std::byte, kPageBytes> buffer;
  std::ifstream from;
  for (std::uint64_t page = 0, next = 0; page < pages;) {
    if (!from.is_open()) from.open(programs[next++ % programs.size()], std::ios::binary);
    from.read(reinterpret_cast<char*>(buffer.data()), kPageBytes);
    if (from.gcount() != kPageBytes) {
      from.close();
      from.clear();
      continue;
    }
    const std::uint64_t word = stamp(page);
    std::memcpy(buffer.data(), &word, sizeof word);
    if (::write(file.get(), buffer.data(), kPageBytes) != static_cast<ssize_t>(kPageBytes))
      fail("write " + path);
    ++page;
  }
}

void drop_from_page_cache(const std::string& path) {
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  // Only what is written back can be dropped.
  if (!file || ::fdatasync(file.get()) != 0) fail(path);
  if (const int error = ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED); error != 0) {
    errno = error;
    fail(path);
  }
}

double create_image(const std::string& uffdkit, const std::string& from, const std::string& to,
                    const std::vector<std::string>& options) {
  std::vector<std::string> arguments = {uffdkit, "image", "create", "--json", "--raw", from, to};
  arguments.insert(arguments.end(), options.begin(), options.end());
  return run_command(arguments);
}

std::string store_working_set(const std::string& uffdkit, const std::string& image) {
  run_command({uffdkit, "image", "store-set", image});
  return image + image::kStoredSetSuffix;
}

}  // namespace uffdkit::bench
