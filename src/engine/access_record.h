// Which pages of an image a session's client has wanted, in the order of first use.
//
// Memory for all that may be noted is mapped at the start, and taken as it is needed: an eighth of a byte for
// each page of the image, and 4 bytes for each that is wanted. Threads: wanted() by the session's owner;
// pages() when the session has ended.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace uffdkit {

class AccessRecord {
 public:
  // Pages that are noted; later ones are left out. 64 GiB, which is what a working set can have.
  static constexpr std::uint64_t kPagesMax = 1u << 24;
  // A page's number takes 32 bits.
  static constexpr std::uint64_t kImagePagesMax = std::uint64_t{1} << 32;

  // Errors: the image has more than kImagePagesMax pages; no memory.
  static Result<std::shared_ptr<AccessRecord>> create(PageCount image_pages);
  ~AccessRecord();
  AccessRecord(const AccessRecord&) = delete;
  AccessRecord& operator=(const AccessRecord&) = delete;

  // This page of the image is wanted, now or not for the first time.
  void wanted(PageIndex image_page);
  std::span<const std::uint32_t> pages() const { return {list_, count_}; }

 private:
  AccessRecord(void* memory, std::size_t bytes, std::uint64_t image_pages);

  void* const memory_;
  const std::size_t bytes_;
  const std::uint64_t image_pages_;
  std::uint64_t* const known_;  // a bit for each page
  std::uint32_t* const list_;
  std::size_t count_ = 0;
};

}  // namespace uffdkit
