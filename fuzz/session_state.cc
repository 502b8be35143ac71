// A session's state file, as a client may have forged it. The input is the file, with holes left out: runs of
// an offset (4 bytes), a length (1 byte) and so many bytes, on top of a file that is right.
#include "engine/session_state.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "base/check.h"
#include "input.h"

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  auto made = SessionState::create("image");
  CHECK(made);
  const AddressRange memory{Address(std::uint64_t{1} << 32), ByteCount(64 * 4096)};
  CHECK(made->add_region(memory, StoreOffset(0), kPage4K, SharingMode::none));
  struct stat status;
  CHECK(::fstat(made->fd(), &status) == 0);
  while (size > 5) {
    std::uint32_t at = 0;
    std::memcpy(&at, data, sizeof at);
    const std::size_t bytes = std::min<std::size_t>(data[4], size - 5);
    CHECK(::pwrite(made->fd(), data + 5, bytes, at % status.st_size) == static_cast<ssize_t>(bytes));
    data += 5 + bytes;
    size -= 5 + bytes;
  }
  auto opened = SessionState::open(UniqueFd(::dup(made->fd())));
  if (!opened) return 0;
  for (const Segment& segment : opened->layout().segments()) {
    if (segment.region == kZeroRegion) continue;
    CHECK(opened->regions()[segment.region].live);
    (void)opened->table(segment.region).get(segment.granules().first);
  }
  (void)opened->erase({memory.start, ByteCount(4096)});
  (void)opened->move(memory, Address(std::uint64_t{1} << 33));
  return 0;
}
