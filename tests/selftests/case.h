// The cases of the kernel's own tests of userfaultfd (tools/testing/selftests/mm/uffd-unit-tests.c), each on
// every memory type it is for and with descriptors made by both ways: what they share.
//
// KERNEL_CASE(move, kAnonymous) { ... } is one case: a body that is given a Case, and the memory types. It
// becomes the tests move.anon_syscall and move.anon_device. A body runs as a test does: it may use gtest's
// macros, and skips by throwing Lacking.
#pragma once

#include <gtest/gtest.h>
#include <uffdkit/uffd.h>

#include <cstddef>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <vector>

#include "support/huge_pages.h"
#include "support/mapping.h"
#include "support/serving.h"

namespace uffdkit::selftests {

// In the order and with the names of the kernel's tests.
enum class MemoryType { anon, shmem, shmem_private, hugetlb, hugetlb_private };
using MemoryTypes = std::initializer_list<MemoryType>;

inline constexpr MemoryTypes kAnonymous = {MemoryType::anon};
inline constexpr MemoryTypes kShmem = {MemoryType::shmem};
inline constexpr MemoryTypes kSharedFiles = {MemoryType::shmem, MemoryType::hugetlb};
inline constexpr MemoryTypes kAllTypes = {MemoryType::anon, MemoryType::shmem, MemoryType::shmem_private,
                                          MemoryType::hugetlb, MemoryType::hugetlb_private};

constexpr bool is_huge(MemoryType type) {
  return type == MemoryType::hugetlb || type == MemoryType::hugetlb_private;
}
constexpr bool is_shared(MemoryType type) {
  return type == MemoryType::shmem || type == MemoryType::hugetlb;
}

// What this machine lacks to run a case: "needs ...".
class Lacking : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// The running kernel with one way of creating a userfaultfd taken away, so that the other is used.
class OneWay final : public SystemCalls {
 public:
  explicit OneWay(CreateWay way) : way_(way) {}

  CreateWay way() const { return way_; }
  // The out field of the last COPY, ZEROPAGE, MOVE, CONTINUE or POISON: an Outcome does not keep it.
  std::int64_t last_out_field() const { return last_out_field_; }

  int userfaultfd(int flags) override;
  int open(const char* path, int flags) override;
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override;
  int poll_readable(int fd, int timeout_ms) override;
  int get_flags(int fd) override;
  int duplicate(int fd) override;
  int close(int fd) override;

 private:
  CreateWay way_;
  std::int64_t last_out_field_ = 0;
};

// Memory of one type. It is mapped twice if it is shared: what is written through `alias` gives no faults.
class Area {
 public:
  Area(MemoryType type, std::size_t pages);

  MemoryType type() const { return type_; }
  std::size_t pages() const { return pages_; }
  ByteCount page_bytes() const { return ByteCount(page_bytes_); }
  AddressRange range() const { return mapping_.range(); }
  AddressRange page(std::size_t index) const {
    return {range().start + ByteCount(index * page_bytes_), page_bytes()};
  }
  std::byte* data(std::size_t page = 0) const { return mapping_.data() + page * page_bytes_; }
  // The same page of the file. Only of shared memory.
  std::byte* alias(std::size_t page = 0) const { return alias_->data() + page * page_bytes_; }
  // The page in which this address is.
  std::size_t page_of(Address address) const { return (address - range().start).value / page_bytes_; }

 private:
  MemoryType type_;
  std::size_t pages_;
  std::size_t page_bytes_;
  UniqueFd file_;
  test::Mapping mapping_;
  std::optional<test::Mapping> alias_;
};

// What one run of a case has: the memory type, and the kernel with one way to create.
class Case {
 public:
  Case(MemoryType type, CreateWay way);

  MemoryType type() const { return type_; }
  // How many pages an area of this case has: few where they are huge.
  std::size_t pages() const { return is_huge(type_) ? 2 : 32; }
  Area area() const { return {type_, pages()}; }
  // A descriptor with these features, made by this case's way. Throws Lacking.
  Uffd uffd(std::uint64_t features = 0);
  const OneWay& system() const { return system_; }

 private:
  MemoryType type_;
  OneWay system_;
  std::optional<test::HugePages> huge_pages_;
};

// A page's worth of bytes that differs from page to page.
std::vector<std::byte> contents(std::size_t page, ByteCount bytes);
// Whether the page has them.
bool has_contents(const std::byte* memory, std::size_t page, ByteCount bytes);
bool is_zero(const std::byte* memory, ByteCount bytes);

// The first byte at `memory`, or nothing if the access gives SIGBUS.
std::optional<std::byte> read_or_sigbus(const std::byte* memory);
// Whether the byte was written; false if the access gives SIGBUS.
bool write_or_sigbus(std::byte* memory, std::byte value);

// Whether userfaultfd's write protection is set for the page that has this address: /proc/PID/pagemap,
// bit 57.
bool is_armed(Address address);
// Whether it is mapped as a huge page: PAGEMAP_SCAN.
bool is_mapped_huge(Address address);

// Hands the messages of `uffd` to `handle` until `work` has ended and none is left.
template <class Handle>
void serve(const Uffd& uffd, const test::Background& work, const Handle& handle) {
  constexpr int kLookAgainMs = 2;
  for (bool last = false; !last;) {
    last = work.finished();
    if (!uffd.wait_readable(last ? 0 : kLookAgainMs).value()) continue;
    abi::Msg raw;
    while (uffd.read({&raw, 1}).messages == 1) handle(decode(raw));
    last = false;
  }
}

using Body = void (*)(Case&);
// Registers the tests of a case; returns true.
bool register_case(const char* name, MemoryTypes types, Body body, const char* file, int line);

#define KERNEL_CASE(name, types)                                                                  \
  static void name(Case& test);                                                                   \
  static const bool name##_is_registered = register_case(#name, types, name, __FILE__, __LINE__); \
  static void name(Case& test)

}  // namespace uffdkit::selftests
