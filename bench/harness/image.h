// A memory image whose every page says which one it is, so that clients can check what they were given.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace uffdkit::bench {

inline constexpr std::uint64_t kPageBytes = 4096;

// The first eight bytes of a page of the image; its first byte is never zero.
constexpr std::uint64_t stamp(std::uint64_t page) {
  return (page * 2 + 1) * 0x9e3779b97f4a7c15;
}

// Writes an image of `pages` pages, all data, which stay in the page cache. Throws where it cannot.
void write_image(const std::string& path, std::uint64_t pages);
// Writes a sparse image of `bytes` bytes, in which only `data` are pages of data.
void write_sparse_image(const std::string& path, std::uint64_t bytes, std::span<const std::uint64_t> data);
// The same with the bytes of this machine's program files in the place of memory, each page's first word
// aside: they compress as well as memory does, which is code, pointers, text and zeros too.
void write_program_image(const std::string& path, std::uint64_t pages);

// Takes the file out of the page cache, as far as the kernel lets it.
void drop_from_page_cache(const std::string& path);

// Runs a program, found as a shell finds it, to its end, and forgets what it prints; seconds that it took.
// Throws if it fails.
double run_command(const std::vector<std::string>& arguments);
// Has `uffdkit image create` make the image `to` of the raw file `from`; seconds that it took.
double create_image(const std::string& uffdkit, const std::string& from, const std::string& to,
                    const std::vector<std::string>& options);
// Has `uffdkit image store-set` store the pages of the image's working set for themselves; the file that it
// makes.
std::string store_working_set(const std::string& uffdkit, const std::string& image);

}  // namespace uffdkit::bench
