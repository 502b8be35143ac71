// Transparent huge pages: of a size between 4 KiB and 2 MiB (Linux 6.8), for one test at a time, and whether
// a file is mapped by one of 2 MiB.
#pragma once

#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <string>
#include <vector>

namespace uffdkit::test {

// While it lives, memory that asks for them by MADV_HUGEPAGE gets them, and no other test that uses this
// class runs, in any process. The machine's setting is put back at the end.
class TransparentPages {
 public:
  enum class Of : bool { anonymous, shmem };

  // Which sizes the kernel has, in bytes.
  static std::vector<std::size_t> sizes(Of memory);

  TransparentPages(Of memory, std::size_t bytes);
  ~TransparentPages();
  TransparentPages(const TransparentPages&) = delete;
  TransparentPages& operator=(const TransparentPages&) = delete;

  // What the machine lacks to have them: "needs ..."; empty where they may be had.
  const std::string& lacking() const { return lacking_; }

 private:
  const std::string path_;
  UniqueFd lock_;
  std::string before_;
  std::string lacking_;
};

// What the machine lacks for a memory file to be mapped by huge pages, and for that to be seen; empty if
// nothing.
std::string lacking_for_huge_file_pages();
// Whether a first access to a new private mapping of 2 MiB of `file`, from `offset` on, maps them all at
// once.
bool is_one_huge_page(int file, std::size_t offset);

}  // namespace uffdkit::test
