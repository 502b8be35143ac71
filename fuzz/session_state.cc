// A session's state file, as a client may have forged it. The input is the file, with holes left out: runs of
// an offset (4 bytes), a length (1 byte) and so many bytes, on top of a file that is right. It is written
// before the file is taken up, and again afterwards.
#include "engine/session_state.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "base/check.h"
#include "input.h"

namespace {

void write_runs(int file, const std::uint8_t* data, std::size_t size) {
  struct stat status;
  CHECK(::fstat(file, &status) == 0);
  while (size > 5) {
    std::uint32_t at = 0;
    std::memcpy(&at, data, sizeof at);
    const std::size_t bytes = std::min<std::size_t>(data[4], size - 5);
    CHECK(::pwrite(file, data + 5, bytes, at % status.st_size) == static_cast<ssize_t>(bytes));
    data += 5 + bytes;
    size -= 5 + bytes;
  }
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  auto made = SessionState::create("image");
  CHECK(made);
  const AddressRange memory{Address(std::uint64_t{1} << 32), ByteCount(1200 * 4096)};
  CHECK(made->add_region(memory, StoreOffset(0), kPage4K, SharingMode::none));
  made->table(0).set(PageIndex(600), PageState::removed);
  write_runs(made->fd(), data, size);
  auto opened = SessionState::open(UniqueFd(::dup(made->fd())));
  if (!opened) return 0;
  write_runs(opened->fd(), data, size);
  for (const Segment& segment : opened->layout().segments()) {
    if (segment.region == kZeroRegion) continue;
    CHECK(opened->regions()[segment.region].live);
    PageTable& table = opened->table(segment.region);
    const PageRange all = segment.granules();
    for (PageIndex at = all.first; at < all.end(); at = at + PageCount(1)) (void)table.get(at);
    (void)table.start_of_run(all.end(), all.first, table.get(PageIndex(all.end().value - 1)));
    for (PageIndex at = all.first; at < all.end(); at = at + PageCount(100))
      table.set(at, PageState::installed);
    table.change(all, [](PageState state) {
      return state == PageState::installed ? PageState::removed : PageState::installed;
    });
  }
  (void)opened->erase({memory.start, ByteCount(4096)});
  (void)opened->move(memory, Address(std::uint64_t{1} << 33));
  return 0;
}
