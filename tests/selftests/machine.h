// What the cases run on: the running kernel, or the model of it (src/sim). The text of a case is the same for
// both.
//
// A case has one process with userfaultfds of its own, which it also serves, as the kernel's tests do. Its
// body is that process's first thread. On the model everything takes turns that are drawn from a seed: one
// thread of the simulated process, or the body, runs at a time.
#pragma once

#include <uffdkit/uffd.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <vector>

namespace uffdkit::selftests {

// In the order and with the names of the kernel's tests. file_private: of a file of a disk.
enum class MemoryType { anon, shmem, shmem_private, hugetlb, hugetlb_private, file_private };
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

// What a machine lacks to run a case: "needs ...".
class Lacking : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Memory of one type. Shared memory is mapped twice: what is written at the second place gives no faults at
// the first.
struct Area {
  MemoryType type;
  std::size_t pages;
  ByteCount page_bytes;
  Address start;
  Address second = {};

  AddressRange range() const { return {start, ByteCount(pages * page_bytes.value)}; }
  AddressRange page(std::size_t index) const { return {at(index), page_bytes}; }
  Address at(std::size_t page) const { return start + ByteCount(page * page_bytes.value); }
  // The same page at the second place.
  Address alias(std::size_t page) const { return second + ByteCount(page * page_bytes.value); }
  // The page in which this address is.
  std::size_t page_of(Address address) const { return (address - start).value / page_bytes.value; }
};

// page_out: to swap, where there is any; pages of files leave the page table at least.
enum class Advice { dont_need, remove, dont_fork, huge_page, collapse, page_out };

// A thread of the process, seen by what it does. Each call returns when it is done, which may take until
// somebody has served its faults.
class Thread {
 public:
  virtual ~Thread() = default;

  // Loads and stores, in the order of addresses. False: SIGBUS, where the machine has no handler for it.
  virtual bool read(Address from, std::span<std::byte> to) = 0;
  virtual bool write(Address to, std::span<const std::byte> bytes) = 0;
  // An atomic exchange of one byte, if that is `expected`. Whether it was.
  virtual bool exchange(Address at, std::byte expected, std::byte value) = 0;

  // System calls: 0 or -errno.
  virtual int advise(AddressRange range, Advice advice) = 0;
  virtual int remap(AddressRange from, Address to) = 0;  // MREMAP_FIXED | MREMAP_MAYMOVE
  virtual int protect(AddressRange range, bool readable, bool writable) = 0;
  virtual int unmap(AddressRange range) = 0;
  virtual int map_over(AddressRange range) = 0;  // new anonymous memory: MAP_FIXED

  // Pins a page for long and for reading, as a device would. Throws Lacking where nothing can.
  virtual void pin(AddressRange page) = 0;
  virtual void unpin() = 0;

  // Whether userfaultfd's write protection is set for the page, as its process sees it.
  virtual bool is_armed(Address address) = 0;

  // Lets the others run.
  virtual void pause() = 0;

  bool write(Address to, std::byte byte) { return write(to, {&byte, 1}); }
  // Nothing: SIGBUS.
  std::optional<std::byte> read(Address from) {
    std::byte byte;
    return read(from, {&byte, 1}) ? std::optional(byte) : std::nullopt;
  }
};

// Something that a thread of the process does beside the body. If it is left before its end, it is made to
// end.
class Work {
 public:
  virtual ~Work() = default;
  virtual bool finished() const = 0;
  // Waits until it has ended by itself. On the model, throws if nobody can ever make it end.
  virtual void join() = 0;
  // What a child ended with: 99 for an exception, minus the signal that killed it.
  virtual int result() const = 0;
};

class Machine {
 public:
  virtual ~Machine() = default;

  virtual SystemCalls& system() = 0;
  // `pages` of the type's size, from where a page of 2 MiB could be. Without transparent huge pages unless
  // Advice::huge_page or collapse asks for them.
  virtual Area map(MemoryType type, std::size_t pages) = 0;
  // The sizes between a small page's and 2 MiB that transparent huge pages of this type can have.
  virtual std::vector<ByteCount> transparent_sizes(MemoryType type) = 0;
  // One of them, with ones in it. Throws Lacking.
  virtual Area map_transparent(MemoryType type, ByteCount bytes) = 0;
  // A free place for so many bytes, from where a page of 2 MiB could be.
  virtual Address place(ByteCount bytes) = 0;
  // The first thread of the process.
  virtual Thread& here() = 0;

  // Runs `body` on a thread of its own. `uffd` serves `served`.
  virtual std::unique_ptr<Work> start(const Uffd& uffd, AddressRange served,
                                      std::function<void(Thread&)> body) = 0;
  // Runs `body` in a child that a thread of its own forks, and waits for; fork(2) returns only when its event
  // has been read, by who made `uffd` with EVENT_FORK. What `body` changes of this program's own memory is
  // not seen here, or is: it must not matter.
  virtual std::unique_ptr<Work> fork(const Uffd& uffd, AddressRange served,
                                     std::function<int(Thread&)> body) = 0;

  // Every SIGBUS of this process, not of its children, is handled so: then the access is tried again. nullptr
  // ends it.
  virtual void on_sigbus(std::function<void(Address)> handler) = 0;

  // What a mistake of the model itself is; empty if there is none, or it is the kernel.
  virtual std::string mistakes() = 0;
};

std::unique_ptr<Machine> make_kernel();
std::unique_ptr<Machine> make_model(std::uint64_t seed);

}  // namespace uffdkit::selftests
