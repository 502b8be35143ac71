#include "kernel/shmem_huge_pages.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "base/address_space.h"

namespace uffdkit {
namespace {

constexpr std::size_t kHugePageBytes = std::size_t{2} << 20;
// Debian's headers are older than the advice.
constexpr int kMadvCollapse = 25;

// The word in brackets: "always [never] advise" is "never". Empty if there is none.
std::string chosen(const std::filesystem::path& setting) {
  std::ifstream file(setting);
  for (std::string word; file >> word;)
    if (word.size() > 2 && word.front() == '[' && word.back() == ']') return word.substr(1, word.size() - 2);
  return {};
}

}  // namespace

bool shmem_huge_pages_on(const std::string& settings) {
  const std::string all = chosen(std::filesystem::path(settings) / "shmem_enabled");
  if (!all.empty() && all != "never" && all != "deny") return true;
  std::error_code ignored;  // no directory: no huge pages
  for (const auto& entry : std::filesystem::directory_iterator(settings, ignored)) {
    if (!entry.path().filename().string().starts_with("hugepages-")) continue;
    const std::string one = chosen(entry.path() / "shmem_enabled");
    if (!one.empty() && one != "never" && one != "inherit") return true;
  }
  return false;
}

bool gather_into_huge_page(int file, std::uint64_t offset) {
  // The kernel gathers what lies at an aligned address.
  void* const pages = take_addresses(kHugePageBytes, kHugePageBytes);
  if (pages == MAP_FAILED) return false;
  bool gathered = false;
  if (::mmap(pages, kHugePageBytes, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, static_cast<off_t>(offset)) !=
      MAP_FAILED) {
    // Somebody who looks at one of the pages at that moment is in the way.
    constexpr int kAttemptsMax = 4;
    for (int attempt = 0; !gathered && attempt < kAttemptsMax; ++attempt) {
      gathered = ::madvise(pages, kHugePageBytes, kMadvCollapse) == 0;
      if (!gathered && errno != EAGAIN && errno != EBUSY) break;
    }
  }
  ::munmap(pages, kHugePageBytes);
  return gathered;
}

}  // namespace uffdkit
