#include "support/mapping.h"

#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <system_error>
#include <utility>

namespace uffdkit::test {
namespace {

[[noreturn]] void fail(const char* call) {
  throw std::system_error(errno, std::generic_category(), call);
}

}  // namespace

Mapping Mapping::map(void* where, std::size_t bytes, int protection, int map_flags, int fd,
                     std::ptrdiff_t offset) {
  void* memory = mmap(where, bytes, protection, map_flags, fd, offset);
  if (memory == MAP_FAILED) fail("mmap");
  return Mapping(static_cast<std::byte*>(memory), bytes);
}

Mapping Mapping::anonymous(std::size_t bytes) {
  Mapping mapping = map(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  // A kernel without transparent huge pages refuses this, and needs it not.
  madvise(mapping.data_, bytes, MADV_NOHUGEPAGE);
  return mapping;
}

Mapping Mapping::of_file(int fd, std::size_t bytes, int map_flags) {
  return map(nullptr, bytes, PROT_READ | PROT_WRITE, map_flags, fd);
}

Mapping::Mapping(Mapping&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}

Mapping::~Mapping() {
  if (data_ != nullptr) munmap(data_, size_);
}

AddressRange Mapping::pages(std::size_t first, std::size_t count) const {
  return {Address(reinterpret_cast<std::uintptr_t>(data_) + first * 4096), ByteCount(count * 4096)};
}

std::byte Mapping::read(std::size_t page) const {
  return std::atomic_ref(data_[page * 4096]).load(std::memory_order_relaxed);
}

void Mapping::write(std::size_t page, std::byte value) const {
  std::atomic_ref(data_[page * 4096]).store(value, std::memory_order_relaxed);
}

UniqueFd memory_file(std::size_t bytes, unsigned memfd_flags) {
  UniqueFd file(memfd_create("uffdkit-test", MFD_CLOEXEC | memfd_flags));
  if (!file || ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) fail("memfd_create");
  return file;
}

std::array<std::byte, 4096> page_of(unsigned char value) {
  std::array<std::byte, 4096> page;
  page.fill(std::byte{value});
  return page;
}

}  // namespace uffdkit::test
