#include "selftests/case.h"

#include <fcntl.h>
#include <linux/memfd.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <string>
#include <utility>

namespace uffdkit::selftests {
namespace {

using test::Mapping;

constexpr std::size_t kHugePagesMax = 8;

const char* name_of(MemoryType type) {
  switch (type) {
    case MemoryType::anon:
      return "anon";
    case MemoryType::shmem:
      return "shmem";
    case MemoryType::shmem_private:
      return "shmem_private";
    case MemoryType::hugetlb:
      return "hugetlb";
    case MemoryType::hugetlb_private:
      return "hugetlb_private";
  }
  std::unreachable();
}

// What memory of this type is of: nothing, or a file in memory.
UniqueFd file_for(MemoryType type, std::size_t bytes) {
  if (type == MemoryType::anon) return {};
  return test::memory_file(bytes, is_huge(type) ? MFD_HUGETLB | MFD_HUGE_2MB : 0u);
}

Mapping map(MemoryType type, int file, std::size_t bytes) {
  if (type == MemoryType::anon) return Mapping::anonymous(bytes);
  return Mapping::of_file(file, bytes, is_shared(type) ? MAP_SHARED : MAP_PRIVATE);
}

// ---- accesses that may give SIGBUS ----------------------------------------------------------------------

thread_local sigjmp_buf after_sigbus;

void leave_the_access(int) {
  siglongjmp(after_sigbus, 1);
}

class SigbusCaught {
 public:
  SigbusCaught() {
    struct sigaction caught{};
    caught.sa_handler = leave_the_access;
    sigaction(SIGBUS, &caught, &before_);
  }
  ~SigbusCaught() { sigaction(SIGBUS, &before_, nullptr); }
  SigbusCaught(const SigbusCaught&) = delete;
  SigbusCaught& operator=(const SigbusCaught&) = delete;

 private:
  struct sigaction before_{};
};

class CaseTest : public testing::Test {
 public:
  CaseTest(MemoryType type, CreateWay way, Body body) : type_(type), way_(way), body_(body) {}

  void TestBody() override {
    try {
      Case test(type_, way_);
      body_(test);
    } catch (const Lacking& lacking) {
      GTEST_SKIP() << lacking.what();
    }
  }

 private:
  MemoryType type_;
  CreateWay way_;
  Body body_;
};

}  // namespace

// ---- the kernel with one way taken away -----------------------------------------------------------------

int OneWay::userfaultfd(int flags) {
  return way_ == CreateWay::system_call ? linux_system_calls().userfaultfd(flags) : -ENOSYS;
}

int OneWay::open(const char* path, int flags) {
  if (way_ != CreateWay::device && strcmp(path, abi::kDevicePath) == 0) return -ENOENT;
  return linux_system_calls().open(path, flags);
}

int OneWay::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  const int result = linux_system_calls().ioctl(fd, request, argument);
  switch (request) {
    case abi::kIoctlCopy:
    case abi::kIoctlMove:
      last_out_field_ = reinterpret_cast<const abi::CopyArgs*>(argument)->done;
      break;
    case abi::kIoctlZeropage:
    case abi::kIoctlContinue:
    case abi::kIoctlPoison:
      last_out_field_ = reinterpret_cast<const abi::FillArgs*>(argument)->done;
      break;
    default:
      break;
  }
  return result;
}

std::ptrdiff_t OneWay::read(int fd, void* buffer, std::size_t bytes) {
  return linux_system_calls().read(fd, buffer, bytes);
}

int OneWay::poll_readable(int fd, int timeout_ms) {
  return linux_system_calls().poll_readable(fd, timeout_ms);
}

int OneWay::get_flags(int fd) {
  return linux_system_calls().get_flags(fd);
}

int OneWay::duplicate(int fd) {
  return linux_system_calls().duplicate(fd);
}

int OneWay::close(int fd) {
  return linux_system_calls().close(fd);
}

// ---- memory ---------------------------------------------------------------------------------------------

Area::Area(MemoryType type, std::size_t pages)
    : type_(type),
      pages_(pages),
      page_bytes_(is_huge(type) ? test::HugePages::kBytes : kPage4K.bytes().value),
      file_(file_for(type, pages * page_bytes_)),
      mapping_(map(type, file_.get(), pages * page_bytes_)) {
  if (is_shared(type)) alias_.emplace(map(type, file_.get(), pages * page_bytes_));
}

std::vector<std::byte> contents(std::size_t page, ByteCount bytes) {
  std::vector<std::byte> made(bytes.value);
  for (std::size_t i = 0; i < made.size(); ++i) made[i] = std::byte(1 + (page * 7 + i) % 251);
  return made;
}

bool has_contents(const std::byte* memory, std::size_t page, ByteCount bytes) {
  return std::ranges::equal(std::span(memory, bytes.value), contents(page, bytes));
}

bool is_zero(const std::byte* memory, ByteCount bytes) {
  return std::ranges::all_of(std::span(memory, bytes.value), [](std::byte b) { return b == std::byte{0}; });
}

std::optional<std::byte> read_or_sigbus(const std::byte* memory) {
  const SigbusCaught caught;
  if (sigsetjmp(after_sigbus, 1) != 0) return std::nullopt;
  return *static_cast<const volatile std::byte*>(memory);
}

bool write_or_sigbus(std::byte* memory, std::byte value) {
  const SigbusCaught caught;
  if (sigsetjmp(after_sigbus, 1) != 0) return false;
  *static_cast<volatile std::byte*>(memory) = value;
  return true;
}

bool is_armed(Address address) {
  constexpr std::uint64_t kUffdWp = std::uint64_t{1} << 57;
  const UniqueFd pagemap(open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC));
  std::uint64_t entry = 0;
  const auto at = static_cast<off_t>((address.value >> kPage4K.shift()) * sizeof entry);
  if (pread(pagemap.get(), &entry, sizeof entry, at) != sizeof entry)
    throw std::runtime_error("/proc/self/pagemap cannot be read");
  return (entry & kUffdWp) != 0;
}

bool is_mapped_huge(Address address) {
  const Result<Pagemap> pagemap = Pagemap::open(0);
  std::array<ScannedRange, 1> found;
  const Result<ScanResult> scan = pagemap->scan(
      {.range = {address, kPage4K.bytes()}, .mask = abi::kPageHuge, .report = abi::kPageHuge}, found);
  if (!scan) throw Lacking("needs PAGEMAP_SCAN: " + scan.error().text());
  return scan->ranges == 1;
}

// ---- cases ----------------------------------------------------------------------------------------------

Case::Case(MemoryType type, CreateWay way) : type_(type), system_(way) {
  if (!is_huge(type)) return;
  huge_pages_.emplace(kHugePagesMax);
  if (!huge_pages_->lacking().empty()) throw Lacking(huge_pages_->lacking());
}

Uffd Case::uffd(std::uint64_t features) {
  Result<Uffd> made = Uffd::create({.required = Features(features)}, system_);
  if (!made) throw Lacking("needs a userfaultfd: " + made.error().text());
  EXPECT_EQ(made->way(), system_.way());
  return std::move(*made);
}

bool register_case(const char* name, MemoryTypes types, Body body, const char* file, int line) {
  for (const MemoryType type : types)
    for (const CreateWay way : {CreateWay::system_call, CreateWay::device}) {
      const std::string test =
          std::string(name_of(type)) + (way == CreateWay::device ? "_device" : "_syscall");
      testing::RegisterTest(name, test.c_str(), nullptr, nullptr, file, line,
                            [=]() -> testing::Test* { return new CaseTest(type, way, body); });
    }
  return true;
}

}  // namespace uffdkit::selftests
