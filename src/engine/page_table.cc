#include "engine/page_table.h"

#include <cstring>

namespace uffdkit {

void PageTable::set(PageRange range, PageState state) {
  PageIndex granule = range.first;
  const PageIndex end = range.end();
  if (granule < end && granule.value % 2 != 0) {
    set(granule, state);
    granule = granule + PageCount(1);
  }
  // Two granules a byte.
  const std::uint64_t cells = (end.value - granule.value) / 2;
  if (granule < end && cells > 0) {
    std::memset(cells_.data() + granule.value / 2, static_cast<int>(state) * 0x11, cells);
    granule = granule + PageCount(cells * 2);
  }
  if (granule < end) set(granule, state);
}

PageIndex PageTable::end_of_run(PageIndex from, PageIndex end, PageState state) const {
  while (from < end && get(from) == state) from = from + PageCount(1);
  return from;
}

PageIndex PageTable::start_of_run(PageIndex from, PageIndex start, PageState state) const {
  while (from > start && get(from - PageCount(1)) == state) from = from - PageCount(1);
  return from;
}

}  // namespace uffdkit
