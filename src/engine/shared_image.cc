#include "engine/shared_image.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <new>
#include <utility>

#include "base/check.h"
#include "base/step.h"
#include "kernel/shmem_huge_pages.h"

namespace uffdkit {
namespace {

constexpr PageCount kOnePage{1};
// A huge page has the bits of eight words.
constexpr std::uint64_t kPagesPerHuge = 512;
// Not constant, so that the program's file does not hold it.
constinit std::array<std::byte, kFetchGranulesMax * 4096> zeros{};

StoreOffset offset_of(PageIndex page) {
  return StoreOffset(page.value * 4096);
}

// A bit for each page; at least one word.
std::uint64_t filled_bytes(ByteCount image) {
  return std::max<std::uint64_t>((image.value / 4096 + 63) / 64, 1) * 8;
}

}  // namespace

SharedImage::SharedImage(std::shared_ptr<StoreLane> lane, UniqueFd file, UniqueFd filled_file,
                         StateMapping filled)
    : lane_(std::move(lane)),
      file_(std::move(file)),
      filled_file_(std::move(filled_file)),
      filled_memory_(std::move(filled)),
      filled_(reinterpret_cast<std::atomic<std::uint64_t>*>(filled_memory_.data())) {
  std::uint64_t count = 0;
  for (std::uint64_t i = 0; i < filled_bytes(size()) / 8; ++i)
    count += static_cast<std::uint64_t>(std::popcount(filled_[i].load(std::memory_order_relaxed)));
  filled_count_.store(count, std::memory_order_relaxed);
}

Result<std::shared_ptr<SharedImage>> SharedImage::create(std::shared_ptr<StoreLane> lane) {
  UniqueFd file(::memfd_create("uffdkit-image", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file) return Failure(Error::from_errno("create an image's memory", errno));
  // Only the owner may reopen it for writing, and nobody may cut it short under the others.
  if (::fchmod(file.get(), 0600) < 0 ||
      ::ftruncate(file.get(), static_cast<off_t>(lane->store()->size().value)) < 0 ||
      ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) < 0)
    return Failure(Error::from_errno("prepare an image's memory", errno));
  UniqueFd filled(::memfd_create("uffdkit-filled", MFD_CLOEXEC));
  if (!filled || ::ftruncate(filled.get(), static_cast<off_t>(filled_bytes(lane->store()->size()))) < 0)
    return Failure(Error::from_errno("create an image's memory", errno));
  return take_up(std::move(lane), file, filled);
}

Result<std::shared_ptr<SharedImage>> SharedImage::take_up(std::shared_ptr<StoreLane> lane, UniqueFd& file,
                                                          UniqueFd& filled) {
  Result<StateMapping> memory = StateMapping::map(filled.get(), 0, filled_bytes(lane->store()->size()));
  if (!memory) return Failure(std::move(memory).error());
  std::shared_ptr<SharedImage> image(
      new SharedImage(std::move(lane), std::move(file), std::move(filled), std::move(*memory)));
  image->note_complete({PageIndex(0), PageCount(image->size().value / 4096)});
  image->gathers_ = !image->complete_.empty();
  if (image->gathers_) image->lane_->when_idle(image);
  return image;
}

SharingMode SharedImage::mode_for(bool removed_reads_zero) {
  const std::lock_guard lock(mutex_);
  huge_pages_ = huge_pages_ || shmem_huge_pages_on();
  if (!huge_pages_ && !removed_reads_zero) return SharingMode::page_cache;
  small_pages_ = true;
  return SharingMode::resolve;
}

void SharedImage::keep_small_pages() {
  const std::lock_guard lock(mutex_);
  small_pages_ = true;
}

Result<UniqueFd> SharedImage::open_for_client() const {
  UniqueFd file(::open(fmt::format("/proc/self/fd/{}", file_.get()).c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return Failure(Error::from_errno("reopen an image's memory", errno));
  return file;
}

PageIndex SharedImage::end_of_run(PageIndex from, PageIndex end) const {
  const bool there = has(from);
  while (from < end && has(from) == there) from = from + kOnePage;
  return from;
}

bool SharedImage::is_hole(PageRange pages) const {
  const Extent extent = lane_->store()->extent_at(offset_of(pages.first));
  return extent.zero && extent.end >= offset_of(pages.end());
}

const SharedImage::Job* SharedImage::job_at(PageIndex page) const {
  const auto found =
      std::find_if(jobs_.begin(), jobs_.end(), [&](const Job& job) { return job.pages.contains(page); });
  return found == jobs_.end() ? nullptr : &*found;
}

std::uint64_t SharedImage::start_job(PageRange pages) {
  jobs_.push_back({.id = ++last_job_, .pages = pages, .waiters = {}});
  return last_job_;
}

SharedImage::Filled SharedImage::fill(PageRange pages, std::span<std::byte> scratch) {
  Store& store = *lane_->store();
  Filled filled{.fill = Fill::done, .read = {}};
  for (PageIndex first = pages.first; first < pages.end();) {
    if (has(first)) {
      first = end_of_run(first, pages.end());
      continue;
    }
    std::uint64_t job = 0;
    PageRange gap{first, kOnePage};
    {
      const std::lock_guard lock(mutex_);
      if (has(first)) continue;
      if (const Job* other = job_at(first)) {
        filled.fill = Fill::under_way;
        first = other->pages.end();
        continue;
      }
      while (gap.end() < pages.end() && !has(gap.end()) && job_at(gap.end()) == nullptr)
        gap.count = gap.count + kOnePage;
      job = start_job(gap);
    }
    first = gap.end();

    std::span<const std::byte> bytes = std::span(zeros).first(kPage4K.bytes(gap.count).value);
    if (!is_hole(gap)) {
      const std::span<std::byte> buffer = scratch.first(bytes.size());
      const Result<ReadStatus> read = store.read(offset_of(gap.first), buffer, Wait::no);
      if (!read || *read != ReadStatus::done) {
        // Not at hand, or not readable: a thread that may wait finds out.
        read_on_lane(job, gap);
        filled.fill = Fill::under_way;
        continue;
      }
      filled.read = filled.read + ByteCount(buffer.size());
      bytes = buffer;
    }
    const int os_error = write(gap, bytes);
    step();
    finish(job, os_error == 0 ? gap : PageRange{gap.first, PageCount(0)}, nullptr);
    if (os_error != 0) return {.fill = Fill::no_memory, .read = filled.read};
  }
  return filled;
}

void SharedImage::fetch(std::unique_ptr<Fetch> fetch, std::weak_ptr<FetchSink> sink) {
  const PageRange pages{PageIndex(fetch->from.value / 4096), fetch->granules};
  struct Started {
    std::uint64_t job;
    PageRange pages;
  };
  std::vector<Started> started;
  bool nothing_to_wait_for = false;
  auto waiter = std::make_shared<Waiter>(Waiter{.fetch = std::move(fetch), .sink = std::move(sink)});
  {
    const std::lock_guard lock(mutex_);
    for (PageIndex page = pages.first; page < pages.end();) {
      if (has(page)) {
        page = end_of_run(page, pages.end());
        continue;
      }
      if (job_at(page) == nullptr) {
        PageRange gap{page, kOnePage};
        while (gap.end() < pages.end() && !has(gap.end()) && job_at(gap.end()) == nullptr)
          gap.count = gap.count + kOnePage;
        started.push_back({.job = start_job(gap), .pages = gap});
      }
      const auto job =
          std::find_if(jobs_.begin(), jobs_.end(), [&](const Job& j) { return j.pages.contains(page); });
      job->waiters.push_back(waiter);
      ++waiter->jobs;
      page = job->pages.end();
    }
    nothing_to_wait_for = waiter->jobs == 0;  // all came meanwhile
  }
  if (nothing_to_wait_for) {
    if (const auto to = waiter->sink.lock()) to->fetched(std::move(waiter->fetch));
    return;
  }
  for (const Started& one : started) read_on_lane(one.job, one.pages);
}

void SharedImage::read_on_lane(std::uint64_t job, PageRange pages) {
  auto read = std::make_unique<Fetch>();
  read->buffer.reset(new (std::nothrow) std::byte[kPage4K.bytes(pages.count).value]);
  if (!read->buffer) return finish(job, {pages.first, PageCount(0)}, nullptr);
  read->id = job;
  read->granules = pages.count;
  read->from = offset_of(pages.first);
  read->store = lane_->store();
  lane_->submit(std::move(read), weak_from_this());
}

void SharedImage::fetched(std::unique_ptr<Fetch> read) {
  const PageRange pages{PageIndex(read->from.value / 4096), read->granules};
  const std::span<std::byte> bytes(read->buffer.get(), read->bytes().value);
  // A hole is known without being read, though its neighbours could not be.
  for (std::size_t i = 0; i < pages.count.value; ++i) {
    if (!read->failed[i] || !is_hole({pages.first + PageCount(i), kOnePage})) continue;
    std::ranges::fill(bytes.subspan(i * 4096, 4096), std::byte{0});
    read->failed.reset(i);
  }
  for (std::size_t i = 0; i < pages.count.value;) {
    std::size_t end = i;
    while (end < pages.count.value && !read->failed[end]) ++end;
    const PageRange run{pages.first + PageCount(i), PageCount(end - i)};
    if (end > i && write(run, bytes.subspan(i * 4096, (end - i) * 4096)) == 0) {
      const std::lock_guard lock(mutex_);
      mark_filled(run);
    }
    i = end + 1;
  }
  finish(read->id, {pages.first, PageCount(0)}, read.get());
}

int SharedImage::write(PageRange pages, std::span<const std::byte> bytes) const {
  StoreOffset at = offset_of(pages.first);
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(file_.get(), bytes.data(), bytes.size(), static_cast<off_t>(at.value));
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return written < 0 ? errno : ENOSPC;
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    at = at + ByteCount(static_cast<std::uint64_t>(written));
  }
  return 0;
}

void SharedImage::finish(std::uint64_t job, PageRange written, const Fetch* outcome) {
  std::vector<std::shared_ptr<Waiter>> complete;
  bool gathers_from_now = false;
  {
    const std::lock_guard lock(mutex_);
    mark_filled(written);
    gathers_from_now = !complete_.empty() && !std::exchange(gathers_, true);
    const auto found = std::find_if(jobs_.begin(), jobs_.end(), [&](const Job& j) { return j.id == job; });
    CHECK(found != jobs_.end());
    // Counted once, whoever else waits.
    if (outcome != nullptr && !found->waiters.empty())
      found->waiters.front()->fetch->retries += outcome->retries;
    for (const std::shared_ptr<Waiter>& waiter : found->waiters) {
      Fetch& fetch = *waiter->fetch;
      for (std::size_t i = 0; outcome != nullptr && i < fetch.granules.value; ++i) {
        const PageIndex page(fetch.from.value / 4096 + i);
        if (!found->pages.contains(page) || !outcome->failed[(page - found->pages.first).value]) continue;
        fetch.failed.set(i);
        if (!fetch.error) fetch.error = outcome->error;
      }
      if (--waiter->jobs == 0) complete.push_back(waiter);
    }
    jobs_.erase(found);
  }
  for (const std::shared_ptr<Waiter>& waiter : complete)
    if (const auto sink = waiter->sink.lock()) sink->fetched(std::move(waiter->fetch));
  if (gathers_from_now) lane_->when_idle(weak_from_this());
}

bool SharedImage::is_complete(std::uint64_t huge) const {
  const PageRange pages{PageIndex(huge * kPagesPerHuge), PageCount(kPagesPerHuge)};
  return pages.end().value <= size().value / 4096 && has(pages.first) &&
         end_of_run(pages.first, pages.end()) == pages.end();
}

void SharedImage::note_complete(PageRange pages) {
  const std::uint64_t end = (pages.end().value + kPagesPerHuge - 1) / kPagesPerHuge;
  for (std::uint64_t huge = pages.first.value / kPagesPerHuge; huge < end; ++huge)
    if (is_complete(huge)) complete_.push_back(huge);
}

void SharedImage::work_a_piece() {
  std::uint64_t huge = 0;
  bool more = false;
  {
    const std::lock_guard lock(mutex_);
    if (small_pages_) complete_.clear();
    gathers_ = more = complete_.size() > 1;
    if (complete_.empty()) return;
    huge = complete_.back();
    complete_.pop_back();
  }
  // A page that look_again() missed meanwhile would become zeros. Where it cannot be gathered, the pages stay
  // as they are.
  if (is_complete(huge))
    (void)gather_into_huge_page(file_.get(), offset_of(PageIndex(huge * kPagesPerHuge)).value);
  if (more) lane_->when_idle(weak_from_this());
}

void SharedImage::mark_filled(PageRange pages) {
  for (PageIndex page = pages.first; page < pages.end(); page = page + kOnePage)
    filled_[page.value / 64].fetch_or(std::uint64_t{1} << (page.value % 64), std::memory_order_release);
  if (pages.count.value > 0) note_complete(pages);
  const std::uint64_t count = filled_count_.load(std::memory_order_relaxed) + pages.count.value;
  filled_count_.store(count, std::memory_order_relaxed);
  // Complete: nobody has to write any more, so nobody may. Refused only where somebody writes all the same.
  if (pages.count.value > 0 && count == size().value / 4096)
    (void)::fcntl(file_.get(), F_ADD_SEALS, F_SEAL_WRITE | F_SEAL_SEAL);
}

void SharedImage::look_again(PageIndex page) {
  const auto at = static_cast<off_t>(offset_of(page).value);
  if (::lseek(file_.get(), at, SEEK_DATA) == at) return;
  const std::lock_guard lock(mutex_);
  if (!has(page)) return;
  filled_[page.value / 64].fetch_and(~(std::uint64_t{1} << (page.value % 64)), std::memory_order_relaxed);
  filled_count_.fetch_sub(1, std::memory_order_relaxed);
}

}  // namespace uffdkit
