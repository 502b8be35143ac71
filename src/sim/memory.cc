#include "sim/memory.h"

#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "sim/address_space.h"

namespace uffdkit::sim {

bool HugePool::reserve(std::size_t pages) {
  if (free_ - reserved_ < pages) return false;
  reserved_ += pages;
  return true;
}

bool HugePool::take(bool out_of_reservation) {
  if (out_of_reservation)
    --reserved_;
  else if (free_ <= reserved_)
    return false;
  --free_;
  return true;
}

bool Reservation::extend(std::uint64_t first, std::uint64_t end, const std::set<std::uint64_t>& filled) {
  std::vector<std::uint64_t> added;
  for (std::uint64_t offset = first; offset < end; offset += kHugePage)
    if (!filled.contains(offset) && !offsets_.contains(offset)) added.push_back(offset);
  if (!pool_->reserve(added.size())) return false;
  offsets_.insert(added.begin(), added.end());
  return true;
}

PageCache::PageCache(Kind kind, ByteCount size, HugePoolPtr pool, const Spaces& spaces)
    : kind_(kind), size_(size.value), pool_(pool), reservation_(std::move(pool)), spaces_(spaces) {}

FramePtr PageCache::find(std::uint64_t offset) const {
  const auto entry = pages_.find(offset);
  return entry == pages_.end() ? nullptr : entry->second;
}

FramePtr PageCache::allocate(std::uint64_t offset) {
  if (kind_ != Kind::hugetlb) return std::make_shared<Frame>(kSmallPage);
  if (!pool_->take(reservation_.use(offset))) return nullptr;
  return std::make_shared<Frame>(kHugePage, pool_);
}

FramePtr PageCache::fill(std::uint64_t offset) {
  FramePtr frame = allocate(offset);
  if (frame) insert(offset, frame);
  return frame;
}

bool PageCache::reserve(std::uint64_t first, std::uint64_t end) {
  std::set<std::uint64_t> filled;
  for (const auto& [offset, frame] : pages_) filled.insert(offset);
  return reservation_.extend(first, end, filled);
}

std::ptrdiff_t PageCache::write(std::uint64_t offset, std::span<const std::byte> bytes) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const std::uint64_t at = offset + done;
    const std::uint64_t start = at / page() * page();
    FramePtr frame = find(start);
    if (!frame) frame = fill(start);
    if (!frame) break;
    const std::size_t part = std::min<std::size_t>(bytes.size() - done, start + page() - at);
    std::copy_n(bytes.begin() + static_cast<std::ptrdiff_t>(done), part,
                frame->bytes.begin() + static_cast<std::ptrdiff_t>(at - start));
    done += part;
    size_ = std::max(size_, at + part);
  }
  return done == 0 && !bytes.empty() ? -ENOSPC : static_cast<std::ptrdiff_t>(done);
}

std::ptrdiff_t PageCache::read(std::uint64_t offset, std::span<std::byte> bytes) const {
  std::size_t done = 0;
  while (done < bytes.size() && offset + done < size_) {
    const std::uint64_t at = offset + done;
    const std::uint64_t start = at / page() * page();
    const std::size_t part = std::min({bytes.size() - done, start + page() - at, size_ - at});
    const auto to = bytes.subspan(done, part);
    if (const FramePtr frame = find(start))
      std::copy_n(frame->bytes.begin() + static_cast<std::ptrdiff_t>(at - start), part, to.begin());
    else
      std::ranges::fill(to, std::byte{});
    done += part;
  }
  return static_cast<std::ptrdiff_t>(done);
}

// Every page table loses its entries for the range, then the page cache its pages. Private copies stay: a
// hole in the file is none in them. Armed pages leave a marker. Source: fallocate(2).
void PageCache::punch_hole(std::uint64_t offset, ByteCount length) {
  const auto copies =
      kind_ == Kind::hugetlb ? AddressSpace::PrivateCopies::drop : AddressSpace::PrivateCopies::keep;
  for (const auto& weak : spaces_)
    if (const auto space = weak.lock()) space->unmap_file_range(*this, offset, offset + length.value, copies);
  pages_.erase(pages_.lower_bound(offset), pages_.lower_bound(offset + length.value));
}

// Beyond the new end private copies go too. Source: truncate(2), mmap(2) ("SIGBUS").
void PageCache::truncate(ByteCount size) {
  const std::uint64_t first = (size.value + page() - 1) / page() * page();
  if (size.value < size_) {
    for (const auto& weak : spaces_)
      if (const auto space = weak.lock())
        space->unmap_file_range(*this, first, UINT64_MAX, AddressSpace::PrivateCopies::drop);
    pages_.erase(pages_.lower_bound(first), pages_.end());
    // What is left of the last page reads as zero when the file grows again.
    const std::uint64_t last = size.value / page() * page();
    if (const FramePtr frame = find(last); frame && size.value != last)
      std::fill(frame->bytes.begin() + static_cast<std::ptrdiff_t>(size.value - last), frame->bytes.end(),
                std::byte{});
  }
  size_ = size.value;
}

bool copy_from_host(void* to, std::uint64_t from, std::size_t bytes) {
  const iovec local{.iov_base = to, .iov_len = bytes};
  const iovec remote{.iov_base = reinterpret_cast<void*>(from), .iov_len = bytes};
  return process_vm_readv(getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(bytes);
}

bool copy_to_host(std::uint64_t to, const void* from, std::size_t bytes) {
  const iovec local{.iov_base = const_cast<void*>(from), .iov_len = bytes};
  const iovec remote{.iov_base = reinterpret_cast<void*>(to), .iov_len = bytes};
  return process_vm_writev(getpid(), &local, 1, &remote, 1, 0) == static_cast<ssize_t>(bytes);
}

}  // namespace uffdkit::sim
