// What a simulated client's memory must contain, page by page: the image, or zero once it was given back, or
// what the client wrote. Where two of the client's own threads race, there is more than one answer.
#pragma once

#include <uffdkit/sim.h>
#include <uffdkit/units.h>

#include <bitset>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace uffdkit::simulate {

inline constexpr std::uint64_t kPage = 4096;

// The byte of the image at `offset` of a page. Every third page is zero, as in real images; the others tell
// from their neighbours, and one part of a page from the next.
constexpr std::uint8_t image_byte(std::uint64_t page, std::uint64_t offset) {
  return page % 3 == 2 ? 0 : static_cast<std::uint8_t>(1 + (page * 31 + offset / 512) % 255);
}

struct ExpectedPage {
  std::optional<std::uint64_t> image;  // the page of the image that it may show; nothing: it is zero
  bool may_be_zero = false;            // although it may show the image
  bool writable = true;
  int leaving = 0;  // calls of madvise(2) that are under way there
  struct Written {
    std::bitset<256> values;  // what may be there
    bool while_leaving;
  };
  std::map<std::uint64_t, Written> written = {};  // by offset

  std::bitset<256> possible(std::uint64_t offset) const;
  void write(std::uint64_t offset, std::uint8_t value);
  // It was given back; `surely`: nothing of before can be left, but what was written meanwhile.
  void leave(bool surely);
};

class ExpectedMemory {
 public:
  // The page at `address`; nullptr: not mapped, or not known any more.
  ExpectedPage* find(Address address);
  void add(AddressRange range, std::optional<std::uint64_t> first_image_page);
  void forget(AddressRange range);
  void move(AddressRange from, Address to, ByteCount new_length, bool stays_mapped);
  void begin_leaving(AddressRange range);
  void end_leaving(AddressRange range, bool surely);
  void protect(AddressRange range, bool writable);
  // Everything may have become zero, where it was not brought.
  void release();
  // What a child of fork(2) has.
  ExpectedMemory child() const;
  // Of an access that has come through: notes what was written, and compares what was read.
  struct Looked {
    bool compared = false;
    std::string wrong = {};  // empty if nothing is
  };
  Looked look_at(const sim::Access& access, const sim::Completion& ended);

  const std::map<std::uint64_t, ExpectedPage>& pages() const { return pages_; }

 private:
  template <class Do>
  void for_each(AddressRange range, Do&& act) {
    for (auto it = pages_.lower_bound(range.start.value); it != pages_.end() && it->first < range.end().value;
         ++it)
      act(it->second);
  }

  std::map<std::uint64_t, ExpectedPage> pages_;  // by address
};

}  // namespace uffdkit::simulate
