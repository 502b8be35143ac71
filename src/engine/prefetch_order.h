// Pages of an image that are to be brought before they are asked for, in this order: shared by all sessions
// of the image. A value; not changed once it is shared.
#pragma once

#include <uffdkit/units.h>

#include <cstdint>
#include <utility>
#include <vector>

namespace uffdkit {

class PrefetchOrder {
 public:
  // Every page once.
  explicit PrefetchOrder(std::vector<std::uint32_t> pages) : pages_(std::move(pages)) {
    for (const std::uint32_t page : pages_) {
      if (page / 64 >= members_.size()) members_.resize(page / 64 + 1);
      members_[page / 64] |= std::uint64_t{1} << page % 64;
    }
  }

  const std::vector<std::uint32_t>& pages() const { return pages_; }
  bool has(PageIndex page) const {
    return page.value / 64 < members_.size() && (members_[page.value / 64] >> page.value % 64 & 1) != 0;
  }

 private:
  std::vector<std::uint32_t> pages_;
  std::vector<std::uint64_t> members_;  // a bit for each page
};

}  // namespace uffdkit
