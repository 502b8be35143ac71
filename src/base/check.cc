#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace uffdkit::internal {

void check_failed(const char* condition, const char* file, int line) {
  std::fprintf(stderr, "uffdkit: %s:%d: check failed: %s\n", file, line, condition);
  std::abort();
}

}  // namespace uffdkit::internal
