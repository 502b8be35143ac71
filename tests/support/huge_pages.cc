#include "support/huge_pages.h"

#include <fcntl.h>
#include <sys/file.h>

#include <fstream>

namespace uffdkit::test {
namespace {

const std::string kPool = "/sys/kernel/mm/hugepages/hugepages-2048kB/";

std::size_t read_number(const std::string& name) {
  std::size_t number = 0;
  std::ifstream(kPool + name) >> number;
  return number;
}

void set_pool(std::size_t pages) {
  std::ofstream(kPool + "nr_hugepages") << pages;
}

}  // namespace

HugePages::HugePages(std::size_t pages) {
  // The lock is on the kernel's own file, so that no lock file stays behind.
  lock_.reset(open((kPool + "nr_hugepages").c_str(), O_RDONLY | O_CLOEXEC));
  if (!lock_ || flock(lock_.get(), LOCK_EX) != 0) {
    lacking_ = "needs huge pages of 2 MiB";
    return;
  }
  before_ = read_number("nr_hugepages");
  const std::size_t enough = pages + read_number("resv_hugepages");
  if (read_number("free_hugepages") >= enough) return;
  set_pool(before_ + pages);
  if (read_number("free_hugepages") < enough)
    lacking_ = "needs " + std::to_string(pages) + " free huge pages of 2 MiB, or root to add them";
}

HugePages::~HugePages() {
  if (lock_ && read_number("nr_hugepages") != before_) set_pool(before_);
}

}  // namespace uffdkit::test
