#include "support/paths.h"

namespace uffdkit::test {

std::string build_directory() {
  return UFFDKIT_BINARY_DIR;
}

std::string built(std::string_view name) {
  return build_directory() + "/" + std::string(name);
}

std::string in_source(std::string_view path) {
  return std::string(UFFDKIT_SOURCE_DIR "/").append(path);
}

}  // namespace uffdkit::test
