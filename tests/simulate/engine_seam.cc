#include "simulate/engine_seam.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <utility>

#include "simulate/cut_copy.h"

namespace uffdkit::simulate {
namespace {

std::size_t fill_number(unsigned long request) {
  return request == abi::kIoctlCopy ? offsetof(abi::CopyArgs, done) : offsetof(abi::FillArgs, done);
}

}  // namespace

Extent SeededStore::extent_at(StoreOffset from) const noexcept {
  // Holes are known by pairs of pages only, so that zero pages are also found by reading.
  const std::uint64_t page = from.value / kPage;
  return {.zero = page % 6 == 2, .end = StoreOffset((page + 1) * kPage)};
}

Result<ReadStatus> SeededStore::read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept {
  if (wait == Wait::no && !prompt_ && story_.one_in(2)) return ReadStatus::would_block;
  const std::uint64_t first = from.value / kPage;
  if (wait == Wait::yes && fails_ && story_.one_in(20)) {
    for (std::uint64_t i = 0; i < to.size() / kPage; ++i) failed_.insert(first + i);
    return Failure(Error("the seed says so", EIO));
  }
  for (std::size_t at = 0; at < to.size(); at += 512)
    std::memset(to.data() + at, image_byte(first + at / kPage, at % kPage), 512);
  return ReadStatus::done;
}

ClonedImage::ClonedImage(Story& story, sim::Kernel& kernel)
    : story_(story),
      store_(std::make_shared<SeededStore>(story, true)),
      image_(SharedImage::create(StoreLane::create(store_).value()).value()),
      file_(image_->open_for_client().value()),
      object_(kernel.make_shmem(store_->size())) {}

void ClonedImage::show() {
  if (image_->filled_pages() == shown_pages_) return;
  shown_pages_ = image_->filled_pages();
  std::array<std::byte, kPage> page;
  for (std::uint64_t index = 0; index < SeededStore::kPages; ++index) {
    if (!image_->has(PageIndex(index)) || object_->cached(index * kPage)) continue;
    if (::pread(file_.get(), page.data(), kPage, static_cast<off_t>(index * kPage)) != kPage)
      story_.fail("the shared image cannot be read");
    object_->write(index * kPage, page);
  }
}

int ManagerCalls::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  meanwhile_.between_calls();
  meanwhile_.before_ioctl();
  if (bug_ == Bug::no_wake_after_present && request == abi::kIoctlWake && was_present_) return 0;
  int result = request == abi::kIoctlCopy ? cut_copy(calls_, story_, fd, argument)
                                          : calls_.ioctl(fd, request, argument);
  was_present_ = result == -EEXIST;
  if (result == -EAGAIN && (request == abi::kIoctlCopy || request == abi::kIoctlZeropage)) {
    std::int64_t done = 0;
    std::memcpy(&done, reinterpret_cast<void*>(argument + fill_number(request)), sizeof done);
    if (bug_ == Bug::short_copy_taken_for_whole && done > 0) result = 0;
    if (bug_ == Bug::refused_fault_forgotten && done < 0) result = 0;
  }
  meanwhile_.between_calls();
  return result;
}

int ManagerCalls::close(int fd) {
  if (bug_ == Bug::leaked_descriptor && story_.one_in(4)) return 0;
  return calls_.close(fd);
}

std::ptrdiff_t ManagerCalls::read(int fd, void* buffer, std::size_t bytes) {
  meanwhile_.between_calls();
  if (bug_ != Bug::fault_before_older_remove) {
    const std::ptrdiff_t got = calls_.read(fd, buffer, bytes);
    meanwhile_.between_calls();
    return got;
  }
  // Removes are handed over by the read after the next.
  auto* messages = static_cast<abi::Msg*>(buffer);
  const std::vector<abi::Msg> late = std::exchange(held_[fd], {});
  held_.erase(fd);
  if (!late.empty()) {
    std::ranges::copy(late, messages);
    return static_cast<std::ptrdiff_t>(late.size() * sizeof(abi::Msg));
  }
  const std::ptrdiff_t got = calls_.read(fd, buffer, bytes);
  if (got <= 0 || bytes < sizeof(abi::Msg) || got % static_cast<std::ptrdiff_t>(sizeof(abi::Msg)) != 0)
    return got;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(got) / sizeof(abi::Msg); ++i) {
    if (messages[i].event == abi::kEventRemove)
      held_[fd].push_back(messages[i]);
    else
      messages[kept++] = messages[i];
  }
  return kept == 0 ? -EAGAIN : static_cast<std::ptrdiff_t>(kept * sizeof(abi::Msg));
}

}  // namespace uffdkit::simulate
