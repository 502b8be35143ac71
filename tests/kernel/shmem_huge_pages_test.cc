#include "kernel/shmem_huge_pages.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <string>

#include "support/mapping.h"
#include "support/transparent_pages.h"

namespace uffdkit {
namespace {

using test::is_one_huge_page;
using test::memory_file;
using test::page_of;

constexpr std::size_t kHugePage = 2u << 20;
constexpr std::size_t kPages = 512;

// The value of all bytes of a page: it differs from its neighbours'.
unsigned char value_of(std::size_t page) {
  return static_cast<unsigned char>(1 + page % 251);
}

// Two huge pages' worth of pages, all there, each written by itself.
class GatherIntoHugePage : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string lacking = test::lacking_for_huge_file_pages(); !lacking.empty())
      GTEST_SKIP() << lacking;
    for (std::size_t page = 0; page < 2 * kPages; ++page)
      ASSERT_EQ(::pwrite(file_.get(), page_of(value_of(page)).data(), 4096, static_cast<off_t>(page * 4096)),
                4096);
  }
  bool holds_what_was_written() const {
    std::array<std::byte, 4096> bytes;
    for (std::size_t page = 0; page < 2 * kPages; ++page)
      if (::pread(file_.get(), bytes.data(), 4096, static_cast<off_t>(page * 4096)) != 4096 ||
          bytes != page_of(value_of(page)))
        return false;
    return true;
  }

  const UniqueFd file_ = memory_file(2 * kHugePage, MFD_ALLOW_SEALING);
};

TEST_F(GatherIntoHugePage, MakesThePagesAskedForOneAndNoOthers) {
  ASSERT_FALSE(is_one_huge_page(file_.get(), 0));
  ASSERT_TRUE(gather_into_huge_page(file_.get(), kHugePage));
  EXPECT_TRUE(is_one_huge_page(file_.get(), kHugePage));
  EXPECT_FALSE(is_one_huge_page(file_.get(), 0));
  EXPECT_TRUE(holds_what_was_written());
}

TEST_F(GatherIntoHugePage, WorksOnAFileThatIsSealedAgainstWriting) {
  ASSERT_EQ(::fcntl(file_.get(), F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SHRINK | F_SEAL_GROW), 0);
  ASSERT_TRUE(gather_into_huge_page(file_.get(), 0));
  EXPECT_TRUE(is_one_huge_page(file_.get(), 0));
  EXPECT_TRUE(holds_what_was_written());
}

TEST_F(GatherIntoHugePage, WhoHasWrittenAPageKeepsIt) {
  const test::Mapping client = test::Mapping::of_file(file_.get(), kHugePage, MAP_PRIVATE);
  client.write(7, std::byte{0xee});
  ASSERT_TRUE(gather_into_huge_page(file_.get(), 0));
  EXPECT_EQ(client.read(7), std::byte{0xee});
  EXPECT_EQ(client.read(8), std::byte{value_of(8)});
}

TEST_F(GatherIntoHugePage, SaysThatItCannotWhereThereIsNoFile) {
  EXPECT_FALSE(gather_into_huge_page(-1, 0));
}

}  // namespace
}  // namespace uffdkit
