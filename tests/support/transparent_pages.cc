#include "support/transparent_pages.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <uffdkit/abi.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>
#include <system_error>

#include "base/address_space.h"
#include "support/mapping.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kSmallest = 8 << 10;
constexpr std::size_t kLargest = 1 << 20;
constexpr std::size_t kHugePage = 2 << 20;

std::string setting(TransparentPages::Of memory, std::size_t bytes) {
  return "/sys/kernel/mm/transparent_hugepage/hugepages-" + std::to_string(bytes >> 10) + "kB/" +
         (memory == TransparentPages::Of::shmem ? "shmem_enabled" : "enabled");
}

// "always inherit [madvise] never": the word in brackets.
std::string chosen(const std::string& path) {
  std::string line;
  std::getline(std::ifstream(path), line);
  const std::size_t begin = line.find('[');
  const std::size_t end = line.find(']');
  return begin == std::string::npos || end == std::string::npos ? ""
                                                                : line.substr(begin + 1, end - begin - 1);
}

}  // namespace

std::vector<std::size_t> TransparentPages::sizes(Of memory) {
  std::vector<std::size_t> found;
  for (std::size_t bytes = kSmallest; bytes <= kLargest; bytes *= 2)
    if (::access(setting(memory, bytes).c_str(), F_OK) == 0) found.push_back(bytes);
  return found;
}

TransparentPages::TransparentPages(Of memory, std::size_t bytes) : path_(setting(memory, bytes)) {
  // The lock is on the kernel's own file, so that no lock file stays behind.
  lock_.reset(::open(path_.c_str(), O_RDONLY | O_CLOEXEC));
  if (!lock_ || ::flock(lock_.get(), LOCK_EX) != 0) {
    lacking_ = "needs transparent huge pages between 4 KiB and 2 MiB (Linux 6.8)";
    return;
  }
  const std::string before = chosen(path_);
  const std::string wanted = memory == Of::shmem ? "advise" : "madvise";
  if (before == wanted || before == "always") return;
  before_ = before;
  std::ofstream(path_) << wanted;
  if (chosen(path_) != wanted)
    lacking_ =
        "needs transparent huge pages of " + std::to_string(bytes >> 10) + " KiB, or root to allow them";
}

TransparentPages::~TransparentPages() {
  if (!before_.empty() && chosen(path_) != before_) std::ofstream(path_) << before_;
}

std::string lacking_for_huge_file_pages() {
  if (::access("/sys/kernel/mm/transparent_hugepage/shmem_enabled", F_OK) != 0)
    return "needs transparent huge pages of memory files";
  const Mapping memory = Mapping::anonymous(4096);
  const Result<Pagemap> pagemap = Pagemap::open(0);
  std::array<ScannedRange, 1> found;
  if (!pagemap ||
      !pagemap->scan({.range = memory.range(), .mask = abi::kPageHuge, .report = abi::kPageHuge}, found))
    return "needs PAGEMAP_SCAN (Linux 6.7)";
  return "";
}

bool is_one_huge_page(int file, std::size_t offset) {
  void* const room = take_addresses(kHugePage, kHugePage);
  if (room == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  const Mapping mapping =
      Mapping::map(room, kHugePage, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, static_cast<off_t>(offset));
  (void)mapping.read(kHugePage / 2 / 4096);
  const AddressRange range = mapping.range();
  std::array<ScannedRange, 1> found;
  const Result<ScanResult> result = Pagemap::open(0).value().scan(
      {.range = range, .mask = abi::kPageHuge, .report = abi::kPageHuge}, found);
  return result.value().ranges == 1 && found[0].range == range;
}

}  // namespace uffdkit::test
