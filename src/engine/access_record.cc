#include "engine/access_record.h"

#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>

namespace uffdkit {
namespace {

std::size_t bitmap_bytes(std::uint64_t pages) {
  return (pages + 63) / 64 * sizeof(std::uint64_t);
}

}  // namespace

Result<std::shared_ptr<AccessRecord>> AccessRecord::create(PageCount image_pages) {
  if (image_pages.value > kImagePagesMax)
    return Failure(
        Error(fmt::format("an image of {} pages is too large to be recorded", image_pages.value), EFBIG));
  const std::size_t bytes =
      bitmap_bytes(image_pages.value) + std::min(image_pages.value, kPagesMax) * sizeof(std::uint32_t);
  void* memory =
      ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return Failure(Error::from_errno("map memory for a recording", errno));
  return std::shared_ptr<AccessRecord>(new AccessRecord(memory, bytes, image_pages.value));
}

AccessRecord::AccessRecord(void* memory, std::size_t bytes, std::uint64_t image_pages)
    : memory_(memory),
      bytes_(bytes),
      image_pages_(image_pages),
      known_(static_cast<std::uint64_t*>(memory)),
      list_(reinterpret_cast<std::uint32_t*>(static_cast<std::byte*>(memory) + bitmap_bytes(image_pages))) {}

AccessRecord::~AccessRecord() {
  ::munmap(memory_, bytes_);
}

void AccessRecord::wanted(PageIndex image_page) {
  const std::uint64_t page = image_page.value;
  if (page >= image_pages_ || count_ == kPagesMax) return;
  std::uint64_t& word = known_[page / 64];
  const std::uint64_t bit = std::uint64_t{1} << page % 64;
  if ((word & bit) != 0) return;
  word |= bit;
  list_[count_++] = static_cast<std::uint32_t>(page);
}

}  // namespace uffdkit
