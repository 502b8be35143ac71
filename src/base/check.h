// CHECK(condition): what only a bug can break. It stops the program, in release builds too: going on with
// wrong page states would hand a client wrong bytes.
#pragma once

namespace uffdkit::internal {
[[noreturn]] void check_failed(const char* condition, const char* file, int line);
}

#define CHECK(condition)                                                      \
  do {                                                                        \
    if (!(condition)) [[unlikely]]                                            \
      ::uffdkit::internal::check_failed(#condition, __FILE_NAME__, __LINE__); \
  } while (false)
