// Pages and what holds them: frames, page table entries, the pool of huge pages, page caches.
#pragma once

#include <uffdkit/sim.h>

#include <map>
#include <memory>
#include <set>
#include <vector>

namespace uffdkit::sim {

inline constexpr std::uint64_t kSmallPage = 4096;
inline constexpr std::uint64_t kHugePage = std::uint64_t{2} << 20;

// Pages of 2 MiB. A mapping of hugetlbfs reserves its pages when it is made, so that its faults cannot fail
// for want of them. Source: Documentation/mm/hugetlbfs_reserv.rst.
class HugePool {
 public:
  explicit HugePool(std::size_t pages) : free_(pages) {}
  bool reserve(std::size_t pages);
  void cancel(std::size_t pages) { reserved_ -= pages; }
  // Takes a page, out of a reservation or else out of what is neither used nor reserved.
  bool take(bool out_of_reservation);
  void give_back() { ++free_; }
  std::size_t spare() const { return free_ - reserved_; }

 private:
  std::size_t free_;
  std::size_t reserved_ = 0;
};
using HugePoolPtr = std::shared_ptr<HugePool>;

// The pages that one mapping or one file may still take. Keyed by offset in the file.
class Reservation {
 public:
  explicit Reservation(HugePoolPtr pool) : pool_(std::move(pool)) {}
  ~Reservation() { pool_->cancel(offsets_.size()); }
  Reservation(const Reservation&) = delete;
  Reservation& operator=(const Reservation&) = delete;

  // Reserves [first, end) where not reserved or filled yet; all or nothing.
  bool extend(std::uint64_t first, std::uint64_t end, const std::set<std::uint64_t>& filled);
  // Whether the page at `offset` was reserved; it is not any more.
  bool use(std::uint64_t offset) { return offsets_.erase(offset) != 0; }

 private:
  HugePoolPtr pool_;
  std::set<std::uint64_t> offsets_;
};

// A page of memory.
struct Frame {
  explicit Frame(std::uint64_t size, HugePoolPtr from = nullptr) : bytes(size), pool(std::move(from)) {}
  ~Frame() {
    if (pool) pool->give_back();
  }
  Frame(const Frame&) = delete;
  Frame& operator=(const Frame&) = delete;

  std::vector<std::byte> bytes;
  // Anonymous pages only: known to be in one page table alone. Cleared by fork(2), set again by a write that
  // finds no other user. MOVE takes exclusive pages only.
  bool exclusive = true;
  unsigned pins = 0;  // by devices, for long
  HugePoolPtr pool;
};
using FramePtr = std::shared_ptr<Frame>;

// One entry of a page table. An entry that does not exist is "none"; one without a page is a marker, which
// remembers that a page is armed (wp) or poisoned while nothing is mapped there.
struct Pte {
  FramePtr frame = nullptr;  // present: this page
  bool zero = false;         // present: the shared page of zeros
  bool anon = false;         // the frame is private to the process, not a page of a page cache
  bool writable = false;     // the hardware lets writes through
  bool wp = false;           // the uffd-wp bit, or a marker of it
  bool poison = false;       // a poison marker

  bool present() const { return frame != nullptr || zero; }
  bool marker() const { return !present(); }
};

class AddressSpace;

// A file's page cache: shmem, hugetlbfs or a regular file.
class PageCache final : public Object {
 public:
  enum class Kind : std::uint8_t { shmem, hugetlb, file };
  using Spaces = std::vector<std::weak_ptr<AddressSpace>>;

  // `spaces`: all address spaces of the machine; outlives this.
  PageCache(Kind kind, ByteCount size, HugePoolPtr pool, const Spaces& spaces);

  Kind kind() const { return kind_; }
  std::uint64_t page() const { return kind_ == Kind::hugetlb ? kHugePage : kSmallPage; }
  std::uint64_t size() const { return size_; }
  // The page at `offset` (a multiple of page()); nullptr for a hole.
  FramePtr find(std::uint64_t offset) const;
  // A new page of zeros there, which must be a hole; nullptr when the pool is empty.
  FramePtr fill(std::uint64_t offset);
  // Makes `frame` the page at `offset`, which must be a hole.
  void insert(std::uint64_t offset, FramePtr frame) { pages_[offset] = std::move(frame); }
  // A page of this file's size that is not in it yet; nullptr when the pool is empty.
  FramePtr allocate(std::uint64_t offset);
  bool reserve(std::uint64_t first, std::uint64_t end);
  HugePoolPtr pool() const { return pool_; }

  std::ptrdiff_t write(std::uint64_t offset, std::span<const std::byte> bytes) override;
  std::ptrdiff_t read(std::uint64_t offset, std::span<std::byte> bytes) const override;
  bool cached(std::uint64_t offset) const override { return find(offset / page() * page()) != nullptr; }
  void punch_hole(std::uint64_t offset, ByteCount length) override;
  void truncate(ByteCount size) override;

 private:
  Kind kind_;
  std::uint64_t size_;
  HugePoolPtr pool_;
  Reservation reservation_;
  const Spaces& spaces_;
  std::map<std::uint64_t, FramePtr> pages_;
};
using PageCachePtr = std::shared_ptr<PageCache>;

// ---- memory of the calling program ----------------------------------------------------------------------

// copy_from_user() and copy_to_user() for the simulated manager's real memory: false where it cannot be read
// or written, instead of a signal.
bool copy_from_host(void* to, std::uint64_t from, std::size_t bytes);
bool copy_to_host(std::uint64_t to, const void* from, std::size_t bytes);

}  // namespace uffdkit::sim
