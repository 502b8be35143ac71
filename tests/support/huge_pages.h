// A few free huge pages for one test at a time.
#pragma once

#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <string>

namespace uffdkit::test {

// While it lives, the pool of 2 MiB pages has the free pages that were asked for, and no other test that uses
// this class runs, in any process. What was added to the pool is taken out again at the end.
class HugePages {
 public:
  static constexpr std::size_t kBytes = 2u << 20;

  explicit HugePages(std::size_t pages);
  ~HugePages();
  HugePages(const HugePages&) = delete;
  HugePages& operator=(const HugePages&) = delete;

  // What the machine lacks to have them: "needs ..."; empty where they are there.
  const std::string& lacking() const { return lacking_; }

 private:
  UniqueFd lock_;
  std::size_t before_ = 0;  // the pool's size as it was found
  std::string lacking_;
};

}  // namespace uffdkit::test
