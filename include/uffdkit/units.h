// Layer: base
// The numbers of paging, one type for each, so that a page number is never taken for a byte count.
// All are values; all operations are constexpr and none checks for overflow unless it says so.
#pragma once

#include <bit>
#include <compare>
#include <cstddef>
#include <cstdint>

namespace uffdkit {

// A number with a meaning. `Tag` makes the types distinct; only the sums that make sense are defined below.
template <class Tag>
struct Quantity {
  std::uint64_t value = 0;

  constexpr Quantity() = default;
  constexpr explicit Quantity(std::uint64_t number) : value(number) {}
  friend constexpr auto operator<=>(Quantity, Quantity) = default;
};

// A virtual address in the process whose memory a userfaultfd serves. Not a pointer of this process.
using Address = Quantity<struct AddressTag>;
// A length in bytes.
using ByteCount = Quantity<struct ByteCountTag>;
// A position in a store, in bytes from its start.
using StoreOffset = Quantity<struct StoreOffsetTag>;
// A page's number, counted from the start of the thing that has pages.
using PageIndex = Quantity<struct PageIndexTag>;
// A number of pages.
using PageCount = Quantity<struct PageCountTag>;

constexpr Address operator+(Address a, ByteCount n) {
  return Address(a.value + n.value);
}
constexpr Address operator-(Address a, ByteCount n) {
  return Address(a.value - n.value);
}
constexpr ByteCount operator-(Address a, Address b) {
  return ByteCount(a.value - b.value);
}
constexpr StoreOffset operator+(StoreOffset o, ByteCount n) {
  return StoreOffset(o.value + n.value);
}
constexpr ByteCount operator-(StoreOffset a, StoreOffset b) {
  return ByteCount(a.value - b.value);
}
constexpr PageIndex operator+(PageIndex p, PageCount n) {
  return PageIndex(p.value + n.value);
}
constexpr PageIndex operator-(PageIndex p, PageCount n) {
  return PageIndex(p.value - n.value);
}
constexpr PageCount operator-(PageIndex a, PageIndex b) {
  return PageCount(a.value - b.value);
}
constexpr ByteCount operator+(ByteCount a, ByteCount b) {
  return ByteCount(a.value + b.value);
}
constexpr ByteCount operator-(ByteCount a, ByteCount b) {
  return ByteCount(a.value - b.value);
}
constexpr PageCount operator+(PageCount a, PageCount b) {
  return PageCount(a.value + b.value);
}
constexpr PageCount operator-(PageCount a, PageCount b) {
  return PageCount(a.value - b.value);
}

// Bytes [start, start + length) of the served process. `end` is exclusive.
struct AddressRange {
  Address start;
  ByteCount length;

  constexpr Address end() const { return start + length; }
  constexpr bool contains(Address a) const { return a >= start && a < end(); }
  constexpr bool overlaps(AddressRange other) const { return start < other.end() && other.start < end(); }
  friend constexpr bool operator==(AddressRange, AddressRange) = default;
};

// Pages [first, first + count).
struct PageRange {
  PageIndex first;
  PageCount count;

  constexpr PageIndex end() const { return first + count; }
  constexpr bool contains(PageIndex p) const { return p >= first && p < end(); }
  friend constexpr bool operator==(PageRange, PageRange) = default;
};

// The size of a region's pages, a power of two; converts between pages and bytes.
class PageSize {
 public:
  static constexpr PageSize from_shift(unsigned shift) { return PageSize(shift); }
  static constexpr bool is_valid(std::uint64_t bytes) { return bytes >= 4096 && std::has_single_bit(bytes); }
  // `bytes` must be valid as is_valid() says.
  static constexpr PageSize from_bytes(std::uint64_t bytes) {
    return PageSize(static_cast<unsigned>(std::countr_zero(bytes)));
  }

  constexpr unsigned shift() const { return shift_; }
  constexpr ByteCount bytes() const { return ByteCount(std::uint64_t{1} << shift_); }
  constexpr ByteCount bytes(PageCount pages) const { return ByteCount(pages.value << shift_); }
  // Whole pages in `n`, rounded down.
  constexpr PageCount pages(ByteCount n) const { return PageCount(n.value >> shift_); }
  constexpr std::uint64_t round_down(std::uint64_t number) const { return number >> shift_ << shift_; }
  constexpr bool is_aligned(std::uint64_t number) const { return round_down(number) == number; }
  friend constexpr bool operator==(PageSize, PageSize) = default;

 private:
  constexpr explicit PageSize(unsigned shift) : shift_(shift) {}
  unsigned shift_;
};

inline constexpr PageSize kPage4K = PageSize::from_shift(12);
inline constexpr PageSize kPage2M = PageSize::from_shift(21);

}  // namespace uffdkit
