#include "kernel/probe.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <utility>

namespace uffdkit {
namespace {

// Memory to try on, or why there is none.
class Sample {
 public:
  explicit Sample(std::string lacking) : lacking_(std::move(lacking)) {}
  Sample(std::size_t bytes, int protection, int map_flags, int fd)
      : data_(mmap(nullptr, bytes, protection, map_flags, fd, 0)), bytes_(bytes) {
    if (data_ == MAP_FAILED) lacking_ = Error::from_errno("mmap", errno).text();
  }
  Sample(Sample&& other) noexcept
      : data_(std::exchange(other.data_, MAP_FAILED)),
        bytes_(other.bytes_),
        lacking_(std::move(other.lacking_)) {}
  Sample& operator=(Sample&&) = delete;
  ~Sample() {
    if (data_ != MAP_FAILED) munmap(data_, bytes_);
  }

  const std::string& lacking() const { return lacking_; }
  AddressRange range() const { return {Address(reinterpret_cast<std::uintptr_t>(data_)), ByteCount(bytes_)}; }

 private:
  void* data_ = MAP_FAILED;
  std::size_t bytes_ = 0;
  std::string lacking_;
};

constexpr int kReadWrite = PROT_READ | PROT_WRITE;

std::size_t page_bytes() {
  return static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
}

// The default size of huge pages; 0 where the kernel has none.
std::size_t huge_page_bytes() {
  std::ifstream meminfo("/proc/meminfo");
  for (std::string key; meminfo >> key; meminfo.ignore(std::numeric_limits<std::streamsize>::max(), '\n')) {
    if (key != "Hugepagesize:") continue;
    std::size_t kibibytes = 0;
    meminfo >> kibibytes;
    return kibibytes * 1024;
  }
  return 0;
}

Sample anonymous() {
  return Sample(page_bytes(), kReadWrite, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

Sample memory_file(std::size_t bytes, unsigned memfd_flags, int map_flags) {
  const UniqueFd file(memfd_create("uffdkit-probe", MFD_CLOEXEC | memfd_flags));
  if (!file || ftruncate(file.get(), static_cast<off_t>(bytes)) != 0)
    return Sample(Error::from_errno("memfd_create", errno).text());
  return Sample(bytes, kReadWrite, map_flags, file.get());
}

Sample shmem(int map_flags) {
  return memory_file(page_bytes(), 0, map_flags);
}

// Without a reservation, so that an empty pool will do.
Sample hugetlb(int map_flags) {
  const std::size_t bytes = huge_page_bytes();
  if (bytes == 0) return Sample("the kernel has no hugetlbfs");
  return memory_file(bytes, MFD_HUGETLB, map_flags | MAP_NORESERVE);
}

// The running program is a file that surely is there.
Sample file_private() {
  constexpr auto kTmpfsMagic = 0x01021994;
  const UniqueFd file(open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  struct statfs fs;
  if (!file || fstatfs(file.get(), &fs) != 0)
    return Sample(Error::from_errno("open /proc/self/exe", errno).text());
  if (fs.f_type == kTmpfsMagic) return Sample("this program lies on tmpfs, which is shmem");
  return Sample(page_bytes(), kReadWrite, MAP_PRIVATE, file.get());
}

Sample secret() {
#ifdef SYS_memfd_secret
  const UniqueFd file(static_cast<int>(syscall(SYS_memfd_secret, O_CLOEXEC)));
  if (!file || ftruncate(file.get(), static_cast<off_t>(page_bytes())) != 0)
    return Sample(Error::from_errno("memfd_secret", errno).text() + " (Linux 5.14, secretmem.enable=1)");
  return Sample(page_bytes(), kReadWrite, MAP_SHARED, file.get());
#else
  return Sample("this program was built without memfd_secret");
#endif
}

RegisterProbe try_register(const Uffd& uffd, AddressRange range, RegisterModes modes, bool asynchronous) {
  const Result<RangeIoctls> ioctls = uffd.register_range(range, modes);
  if (!ioctls)
    return {.modes = modes,
            .asynchronous = asynchronous,
            .os_error = ioctls.error().os_error(),
            .ioctls = RangeIoctls()};
  // Asking for fewer modes than before would change nothing. That this succeeds the next try would show.
  (void)uffd.unregister_range(range);
  return {.modes = modes, .asynchronous = asynchronous, .os_error = 0, .ioctls = *ioctls};
}

MemoryProbe probe_memory(std::string name, const Sample& sample, const Uffd& synchronous,
                         const std::optional<Uffd>& asynchronous) {
  MemoryProbe probe{.name = std::move(name), .lacking = sample.lacking(), .modes = {}};
  if (!probe.lacking.empty()) return probe;
  for (const RegisterModes modes :
       {kMissing, kWriteProtect, kMinor, kMissing | kWriteProtect, kMissing | kMinor})
    probe.modes.push_back(try_register(synchronous, sample.range(), modes, false));
  if (asynchronous)
    probe.modes.push_back(try_register(*asynchronous, sample.range(), kWriteProtect, true));
  else
    probe.modes.push_back(
        {.modes = kWriteProtect, .asynchronous = true, .os_error = ENOTSUP, .ioctls = RangeIoctls()});
  return probe;
}

std::vector<MemoryProbe> probe_memories() {
  const Result<Uffd> synchronous = Uffd::create({.kernel_faults = false});
  if (!synchronous) return {};
  std::optional<Uffd> asynchronous;
  if (Result<Uffd> made = Uffd::create({.kernel_faults = false, .required = Features(abi::kFeatureWpAsync)}))
    asynchronous.emplace(std::move(*made));

  std::vector<MemoryProbe> memories;
  const auto add = [&](const char* name, const Sample& sample) {
    memories.push_back(probe_memory(name, sample, *synchronous, asynchronous));
  };
  add("anonymous", anonymous());
  add("shmem shared", shmem(MAP_SHARED));
  add("shmem private", shmem(MAP_PRIVATE));
  add("hugetlb shared", hugetlb(MAP_SHARED));
  add("hugetlb private", hugetlb(MAP_PRIVATE));
  add("file private", file_private());
  add("memfd_secret", secret());
  return memories;
}

int probe_pagemap_scan() {
  const Result<Pagemap> pagemap = Pagemap::open(0);
  if (!pagemap) return pagemap.error().os_error();
  const Sample sample = anonymous();
  if (!sample.lacking().empty()) return ENOMEM;
  std::array<ScannedRange, 1> found;
  const Result<ScanResult> result =
      pagemap->scan({.range = sample.range(), .mask = abi::kPagePresent, .report = abi::kPagePresent}, found);
  return result ? 0 : result.error().os_error();
}

}  // namespace

KernelProbe probe_kernel() {
  const Result<KernelFeatures> kernel = probe_features();
  const Result<Uffd> with_fork_events =
      Uffd::create({.kernel_faults = false, .required = Features(abi::kFeatureEventFork)});
  return {.ways = try_create_ways(),
          .features = kernel ? kernel->available : Features(),
          .fork_events_permitted = with_fork_events.has_value(),
          .memory = probe_memories(),
          .pagemap_scan_error = probe_pagemap_scan()};
}

}  // namespace uffdkit
