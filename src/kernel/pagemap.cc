#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/uffd.h>

#include <cerrno>
#include <utility>

namespace uffdkit {

static_assert(sizeof(ScannedRange) == sizeof(abi::PageRegion), "see Pagemap::scan");

Result<Pagemap> Pagemap::open(int pid, SystemCalls& system) {
  const std::string path = pid == 0 ? "/proc/self/pagemap" : fmt::format("/proc/{}/pagemap", pid);
  const int fd = system.open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return Failure(Error::from_errno("open " + path, -fd));
  return Pagemap(fd, system);
}

Pagemap::Pagemap(Pagemap&& other) noexcept : fd_(std::exchange(other.fd_, -1)), system_(other.system_) {}

Pagemap& Pagemap::operator=(Pagemap&& other) noexcept {
  if (this == &other) return *this;
  if (fd_ >= 0) system_->close(fd_);
  fd_ = std::exchange(other.fd_, -1);
  system_ = other.system_;
  return *this;
}

Pagemap::~Pagemap() {
  if (fd_ >= 0) system_->close(fd_);
}

Result<ScanResult> Pagemap::scan(const ScanQuery& query, std::span<ScannedRange> found) const {
  abi::ScanArgs args{.size = sizeof(abi::ScanArgs),
                     .flags = (query.protect_matching ? abi::kScanWpMatching : 0) |
                              (query.require_wp_async ? abi::kScanCheckWpAsync : 0),
                     .start = query.range.start.value,
                     .end = query.range.end().value,
                     .walk_end = 0,
                     .vec = reinterpret_cast<std::uintptr_t>(found.data()),
                     .vec_len = found.size(),
                     .max_pages = query.max_pages,
                     .category_inverted = query.inverted,
                     .category_mask = query.mask,
                     .category_anyof_mask = query.any_of,
                     .return_mask = query.report};
  const int result = system_->ioctl(fd_, abi::kIoctlPagemapScan, reinterpret_cast<std::uintptr_t>(&args));
  // Whether a scan of a process that has exited finds nothing or fails depends on the kernel.
  if (result == -ESRCH) return ScanResult{.ranges = 0, .walk_end = query.range.end()};
  if (result < 0)
    return Failure(
        Error::from_errno(fmt::format("scan the pagemap of [{:#x}, {:#x})", args.start, args.end), -result));
  const auto ranges = static_cast<std::size_t>(result);
  // The kernel writes {start, end, categories} where a ScannedRange has {start, length, categories}.
  for (ScannedRange& entry : found.first(ranges))
    entry.range.length = ByteCount(entry.range.length.value - entry.range.start.value);
  return ScanResult{.ranges = ranges, .walk_end = Address(args.walk_end)};
}

}  // namespace uffdkit
