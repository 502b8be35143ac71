#include "support/temp_dir.h"

#include <stdlib.h>

#include <stdexcept>

namespace uffdkit::test {

TempDir::TempDir() {
  std::string name = (std::filesystem::temp_directory_path() / "uffdkit-test-XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make a temporary directory " + name);
  path_ = name;
}

TempDir::~TempDir() {
  std::error_code ignored;  // a test that failed may have left the directory unreadable
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace uffdkit::test
