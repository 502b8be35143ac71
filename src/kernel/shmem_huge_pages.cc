#include "kernel/shmem_huge_pages.h"

#include <filesystem>
#include <fstream>
#include <system_error>

namespace uffdkit {
namespace {

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

}  // namespace uffdkit
