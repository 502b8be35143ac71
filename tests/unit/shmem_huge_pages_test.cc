#include "kernel/shmem_huge_pages.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>

#include "support/temp_dir.h"

namespace uffdkit {
namespace {

struct Settings {
  const char* name;
  std::map<std::string, std::string> files;
  bool on;
};

class ShmemHugePages : public testing::TestWithParam<Settings> {};

TEST_P(ShmemHugePages, AreOnWhereASettingMayGiveThem) {
  const test::TempDir directory;
  for (const auto& [file, text] : GetParam().files) {
    const std::filesystem::path path = std::filesystem::path(directory.path()) / file;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text << "\n";
  }
  EXPECT_EQ(shmem_huge_pages_on(directory.path()), GetParam().on);
}

const char* const kNever = "always within_size advise [never] deny force";
const char* const kSizeNever = "always inherit within_size advise [never]";
const char* const kSizeInherit = "always [inherit] within_size advise never";

INSTANTIATE_TEST_SUITE_P(
    , ShmemHugePages,
    testing::Values(
        Settings{"NoSettings", {}, false}, Settings{"Never", {{"shmem_enabled", kNever}}, false},
        Settings{"Deny", {{"shmem_enabled", "always within_size advise never [deny] force"}}, false},
        Settings{"Always", {{"shmem_enabled", "[always] within_size advise never deny force"}}, true},
        Settings{"WithinSize", {{"shmem_enabled", "always [within_size] advise never deny force"}}, true},
        Settings{"Advise", {{"shmem_enabled", "always within_size [advise] never deny force"}}, true},
        Settings{"Force", {{"shmem_enabled", "always within_size advise never deny [force]"}}, true},
        Settings{"SizesThatInheritNever",
                 {{"shmem_enabled", kNever},
                  {"hugepages-64kB/shmem_enabled", kSizeNever},
                  {"hugepages-2048kB/shmem_enabled", kSizeInherit}},
                 false},
        Settings{"OneSize",
                 {{"shmem_enabled", kNever},
                  {"hugepages-64kB/shmem_enabled", "[always] inherit within_size advise never"},
                  {"hugepages-2048kB/shmem_enabled", kSizeInherit}},
                 true}),
    [](const auto& test) { return test.param.name; });

}  // namespace
}  // namespace uffdkit
