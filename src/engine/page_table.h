// What is known of each page of a region, in 4 bits for every 4 KiB ("granule"), whatever the region's page
// size.
//
// The table lies in memory that the caller provides, zeroed: an untouched granule is `absent`, so that a
// table in a sparse file costs nothing for the parts of a region that nobody has touched. Granules rather
// than pages, because madvise(2) may remove part of a huge page. Threads: none; the session that owns the
// region is the only one to touch it.
#pragma once

#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <span>

namespace uffdkit {

enum class PageState : std::uint8_t {
  absent = 0,     // comes from the store when it is wanted
  fetching = 1,   // its bytes are being read; exactly one Fetch holds it
  installed = 2,  // was put into the client's memory. A hint: the client may have lost it since
  removed = 3,    // given back by the client: reads as zero for ever after, never from the store again
  zeroed = 4,     // removed, and a zero page was put there since (a hint, like `installed`)
  poisoned = 5,   // could not be read: answers with SIGBUS
};

// The memory that a table for `granules` needs.
constexpr ByteCount page_table_bytes(PageCount granules) {
  return ByteCount((granules.value + 1) / 2);
}

class PageTable {
 public:
  PageTable() = default;
  // `cells` has page_table_bytes(granules) bytes and outlives the table.
  PageTable(std::span<std::byte> cells, PageCount granules) : cells_(cells), granules_(granules) {}

  PageCount granules() const { return granules_; }

  PageState get(PageIndex granule) const {
    const auto cell = std::to_integer<unsigned>(cells_[granule.value / 2]);
    const unsigned nibble = (cell >> shift(granule)) & 0xf;
    // A value that no version of this program writes can only come from a damaged record: fail closed.
    return nibble <= static_cast<unsigned>(PageState::poisoned) ? static_cast<PageState>(nibble)
                                                                : PageState::poisoned;
  }

  void set(PageIndex granule, PageState state) {
    std::byte& cell = cells_[granule.value / 2];
    const auto cleared = std::to_integer<unsigned>(cell) & ~(0xfu << shift(granule));
    cell = static_cast<std::byte>(cleared | static_cast<unsigned>(state) << shift(granule));
  }

  void set(PageRange range, PageState state);

  // Each state in `range` becomes what `change` says of it: PageState(PageState), asked once for each run of
  // granules that are in the same state.
  template <class Change>
  void change(PageRange range, Change change) {
    for (PageIndex at = range.first; at < range.end();) {
      const PageState state = get(at);
      const PageIndex end = end_of_run(at + PageCount(1), range.end(), state);
      if (const PageState changed = change(state); changed != state) set({at, end - at}, changed);
      at = end;
    }
  }

  // The first granule in [from, end) whose state is not `state`; `end` if all are.
  PageIndex end_of_run(PageIndex from, PageIndex end, PageState state) const;
  // The start of the run of `state` that ends before `from`, not below `start`.
  PageIndex start_of_run(PageIndex from, PageIndex start, PageState state) const;

 private:
  static unsigned shift(PageIndex granule) { return granule.value % 2 * 4; }

  std::span<std::byte> cells_;
  PageCount granules_;
};

// A removed page, whether or not a zero page was put there since.
constexpr bool reads_as_zero(PageState state) {
  return state == PageState::removed || state == PageState::zeroed;
}

}  // namespace uffdkit
