// What a client's thread gets of a page that cannot be had.
#pragma once

#include <cstddef>

namespace uffdkit::test {

// Whether reading this byte raises SIGBUS. One thread of the process at a time.
bool raises_sigbus(const std::byte* byte);

}  // namespace uffdkit::test
