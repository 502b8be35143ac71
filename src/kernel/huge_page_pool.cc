#include "kernel/huge_page_pool.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <array>
#include <charconv>

namespace uffdkit {
namespace {

// One of the numbers that the kernel gives about a pool.
std::optional<std::uint64_t> pool_number(PageSize size, const char* name) {
  const std::string path =
      fmt::format("/sys/kernel/mm/hugepages/hugepages-{}kB/{}", size.bytes().value / 1024, name);
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return std::nullopt;
  std::array<char, 32> text;
  const ssize_t bytes = ::read(file.get(), text.data(), text.size());
  if (bytes <= 0) return std::nullopt;
  std::uint64_t pages = 0;
  const auto [end, failed] = std::from_chars(text.data(), text.data() + bytes, pages);
  if (failed != std::errc()) return std::nullopt;
  return pages;
}

}  // namespace

std::optional<std::uint64_t> spare_huge_pages(PageSize size) {
  const auto unused = pool_number(size, "free_hugepages");
  const auto promised = pool_number(size, "resv_hugepages");
  if (!unused || !promised) return std::nullopt;
  return *unused > *promised ? *unused - *promised : 0;
}

}  // namespace uffdkit
