// What the kernel does to UFFDIO_COPY when memory is short: now and then it stops half-way.
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/system_calls.h>
#include <uffdkit/units.h>

#include <cerrno>
#include <cstdint>

#include "simulate/expected.h"
#include "simulate/random.h"

namespace uffdkit::simulate {

// UFFDIO_COPY of small pages, of which the seed may cut off the end. A huge page is copied whole, or not.
inline int cut_copy(SystemCalls& calls, Random& random, int fd, std::uintptr_t argument) {
  auto& args = *reinterpret_cast<abi::CopyArgs*>(argument);
  const std::uint64_t asked = args.len;
  const bool cut = asked > kPage && asked % kPage2M.bytes().value != 0 && random.one_in(8);
  if (cut) args.len = (1 + random.draw(asked / kPage - 1)) * kPage;
  const int result = calls.ioctl(fd, abi::kIoctlCopy, argument);
  args.len = asked;
  return cut && result == 0 ? -EAGAIN : result;
}

}  // namespace uffdkit::simulate
