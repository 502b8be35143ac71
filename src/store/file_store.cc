// A raw file as a store. Data that is in the page cache is read without blocking; what is not is left to a
// thread that may block.
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <uffdkit/signal_safe_store.h>
#include <uffdkit/store.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <optional>
#include <stop_token>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "base/signals_blocked.h"
#include "store/access_time.h"
#include "store/read_ahead.h"

namespace uffdkit {
namespace {

// The holes of a file, as it had them when it was opened. What is not known to be a hole counts as data, and
// is read and found to be zero: so it is no matter that a file may have more holes than anybody wants to
// keep, or wait for.
class HoleMap {
 public:
  static constexpr std::size_t kHolesMax = 1u << 20;  // 16 MiB of map

  // Goes on from where it has come to, until it has so many holes. False: there is no more to find. `fd` may
  // be shared with whoever gave the descriptor, its position too.
  bool find(int fd, std::uint64_t file_bytes, std::uint64_t store_bytes, std::size_t holes_max,
            const std::stop_token& stop = {}) {
    const off_t before = ::lseek(fd, 0, SEEK_CUR);
    const bool more = go_on(fd, file_bytes, store_bytes, holes_max, stop);
    (void)::lseek(fd, before, SEEK_SET);
    return more;
  }

  Extent at(std::uint64_t from, std::uint64_t store_bytes) const {
    const auto next =
        std::upper_bound(holes_.begin(), holes_.end(), from,
                         [](std::uint64_t position, const Hole& hole) { return position < hole.end; });
    if (next == holes_.end()) return {.zero = false, .end = StoreOffset(store_bytes)};
    if (next->start <= from) return {.zero = true, .end = StoreOffset(next->end)};
    return {.zero = false, .end = StoreOffset(next->start)};
  }

 private:
  struct Hole {
    std::uint64_t start;
    std::uint64_t end;
  };

  bool go_on(int fd, std::uint64_t file_bytes, std::uint64_t store_bytes, std::size_t holes_max,
             const std::stop_token& stop) {
    while (position_ < file_bytes && !stop.stop_requested()) {
      if (holes_.size() >= holes_max) return true;
      const off_t data = ::lseek(fd, static_cast<off_t>(position_), SEEK_DATA);
      // ENXIO: no data from here on. Any other error: the file system cannot tell, so all is data.
      if (data < 0 && errno != ENXIO) return false;
      const std::uint64_t hole_end = data < 0 ? store_bytes : static_cast<std::uint64_t>(data);
      add(position_, hole_end);
      if (data < 0) return false;
      const off_t hole = ::lseek(fd, data, SEEK_HOLE);
      if (hole < 0) return false;
      position_ = static_cast<std::uint64_t>(hole);
    }
    return false;
  }

  // Keeps the whole pages of a hole.
  void add(std::uint64_t start, std::uint64_t end) {
    start = kPage4K.round_down(start + 4095);
    end = kPage4K.round_down(end);
    if (start < end) holes_.push_back({start, end});
  }

  std::vector<Hole> holes_;
  std::uint64_t position_ = 0;
};

// The first holes of a file at once, and the others by a thread, for whose sake nobody waits: a manager that
// takes over opens images of gigabytes, with clients that are stopped meanwhile.
class HoleFinder {
 public:
  static constexpr std::size_t kHolesAtOnce = 1024;  // about a millisecond

  HoleFinder(int fd, std::uint64_t file_bytes, std::uint64_t store_bytes) : store_bytes_(store_bytes) {
    if (!first_.find(fd, file_bytes, store_bytes, kHolesAtOnce)) return;
    // With a position of its own.
    UniqueFd own(::open(fmt::format("/proc/self/fd/{}", fd).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!own) return;
    const SignalsBlocked blocked;
    try {
      finder_ = std::jthread([this, file_bytes, file = std::move(own)](const std::stop_token& stop) {
        all_ = first_;
        (void)all_.find(file.get(), file_bytes, store_bytes_, HoleMap::kHolesMax, stop);
        found_.store(&all_, std::memory_order_release);
      });
    } catch (const std::system_error&) {
      // Without a thread the rest counts as data.
    }
  }

  Extent at(std::uint64_t from) const {
    return found_.load(std::memory_order_acquire)->at(from, store_bytes_);
  }

 private:
  const std::uint64_t store_bytes_;
  HoleMap first_;
  HoleMap all_;  // the thread's, until it is found_
  std::atomic<const HoleMap*> found_{&first_};
  std::jthread finder_;  // last: it uses the others
};

class FileStore final : public Store, public SignalSafeStore, public ReadAhead {
 public:
  FileStore(UniqueFd fd, std::string name, std::uint64_t file_bytes)
      : fd_(std::move(fd)),
        name_(std::move(name)),
        file_bytes_(file_bytes),
        store_bytes_(kPage4K.round_down(file_bytes + 4095)),
        holes_(fd_.get(), file_bytes_, store_bytes_) {}

  ByteCount size() const noexcept override { return ByteCount(store_bytes_); }
  std::string name() const override { return name_; }
  Extent extent_at(StoreOffset from) const noexcept override { return holes_.at(from.value); }

  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override {
    const std::span<std::byte> stored = zero_beyond_the_end(from, to);
    return wait == Wait::no ? read_cached(from, stored) : read_all(from, stored);
  }
  void will_need(StoreOffset from, ByteCount bytes) noexcept override {
    (void)::posix_fadvise(fd_.get(), static_cast<off_t>(from.value), static_cast<off_t>(bytes.value),
                          POSIX_FADV_WILLNEED);
  }
  std::uint64_t unit_at(StoreOffset from) const noexcept override {
    return from.value / kPage4K.bytes().value;
  }
  bool is_only_copied() const noexcept override { return true; }
  std::optional<FilePart> part_of(StoreOffset from, ByteCount bytes) const noexcept override {
    if (from.value + bytes.value > file_bytes_) return std::nullopt;
    return FilePart{.file = fd_.get(), .offset = from.value};
  }
  int read_in_handler(StoreOffset from, std::span<std::byte> to) noexcept override {
    const std::span<std::byte> stored = zero_beyond_the_end(from, to);
    const Progress progress = read_as_far_as_possible(from, stored);
    return progress.os_error == 0 && progress.bytes < stored.size() ? EIO : progress.os_error;
  }

 private:
  struct Progress {
    std::size_t bytes;
    int os_error;  // 0: all was read, or the file ends there
  };

  // The part of `to` that the file has bytes for; the rest is zeroed.
  std::span<std::byte> zero_beyond_the_end(StoreOffset from, std::span<std::byte> to) const noexcept {
    const std::uint64_t in_file = file_bytes_ > from.value ? file_bytes_ - from.value : 0;
    const std::size_t wanted = std::min<std::uint64_t>(to.size(), in_file);
    if (wanted < to.size()) std::memset(to.data() + wanted, 0, to.size() - wanted);
    return to.first(wanted);
  }

  Result<ReadStatus> read_cached(StoreOffset from, std::span<std::byte> to) noexcept {
    if (to.empty()) return ReadStatus::done;
    if (!reads_without_waiting_.load(std::memory_order_relaxed)) return ReadStatus::would_block;
    const iovec vector{.iov_base = to.data(), .iov_len = to.size()};
    // Not by the C library's function: that is a cancellation point, and this is the path of each fault. On
    // 64-bit machines the kernel takes the position whole, and nothing from the next argument.
    const long bytes = ::syscall(SYS_preadv2, fd_.get(), &vector, 1, from.value, 0, RWF_NOWAIT);
    if (bytes == static_cast<ssize_t>(to.size())) return ReadStatus::done;
    if (bytes < 0 && (errno == EOPNOTSUPP || errno == ENOSYS || errno == EINVAL))
      reads_without_waiting_.store(false, std::memory_order_relaxed);
    // Part of it is not cached, or something is wrong: whoever may wait will find out which.
    return ReadStatus::would_block;
  }

  Result<ReadStatus> read_all(StoreOffset from, std::span<std::byte> to) noexcept {
    const Progress progress = read_as_far_as_possible(from, to);
    const std::uint64_t position = from.value + progress.bytes;
    if (progress.os_error != 0)
      return Failure(
          Error::from_errno(fmt::format("read {} at offset {}", name_, position), progress.os_error));
    if (progress.bytes < to.size())
      return Failure(
          Error(fmt::format("read {} at offset {}: the file ends here, but had {} bytes when it was opened",
                            name_, position, file_bytes_),
                EIO));
    return ReadStatus::done;
  }

  Progress read_as_far_as_possible(StoreOffset from, std::span<std::byte> to) const noexcept {
    std::size_t done = 0;
    while (done < to.size()) {
      const ssize_t bytes =
          ::pread(fd_.get(), to.data() + done, to.size() - done, static_cast<off_t>(from.value + done));
      if (bytes < 0 && errno == EINTR) continue;
      if (bytes <= 0) return {.bytes = done, .os_error = bytes < 0 ? errno : 0};
      done += static_cast<std::size_t>(bytes);
    }
    return {.bytes = done, .os_error = 0};
  }

  const UniqueFd fd_;
  const std::string name_;
  const std::uint64_t file_bytes_;
  const std::uint64_t store_bytes_;
  const HoleFinder holes_;
  // Cleared for good where the file system refuses RWF_NOWAIT.
  std::atomic<bool> reads_without_waiting_{true};
};

Result<std::shared_ptr<Store>> make_file_store(UniqueFd fd, const std::string& name) {
  if ((::fcntl(fd.get(), F_GETFL) & O_ACCMODE) == O_WRONLY)
    return Failure(Error(name + " is open for writing only", EBADF).with_remedy("open it for reading"));
  struct stat status;
  if (::fstat(fd.get(), &status) < 0) return Failure(Error::from_errno("stat " + name, errno));
  if (!S_ISREG(status.st_mode))
    return Failure(Error(name + " is not a regular file", EINVAL)
                       .with_remedy("give the file that holds the memory image"));
  if (status.st_size == 0)
    return Failure(
        Error(name + " is empty", EINVAL).with_remedy("give the file that holds the memory image"));
  return std::make_shared<FileStore>(std::move(fd), name, static_cast<std::uint64_t>(status.st_size));
}

}  // namespace

Result<std::shared_ptr<Store>> open_file_store(const std::string& path) {
  // Non-blocking, so that opening a FIFO by mistake does not wait for its other end; no effect on regular
  // files.
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return Failure(Error::from_open(path, errno));
  leave_access_time(fd.get());
  return make_file_store(std::move(fd), path);
}

Result<std::shared_ptr<Store>> open_file_store(int fd, const std::string& name) {
  UniqueFd own(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!own) return Failure(Error::from_errno("duplicate the descriptor of " + name, errno));
  return make_file_store(std::move(own), name);
}

}  // namespace uffdkit
