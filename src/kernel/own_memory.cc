#include "kernel/own_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <uffdkit/unique_fd.h>

#include <cerrno>
#include <cstdint>

namespace uffdkit {
namespace {

// Between where programs and where libraries lie, on every 64-bit machine: at a random place there, a client
// has nothing. One that has all the same has it registered and unregistered.
constexpr std::uint64_t kUnusedStart = std::uint64_t{0x11} << 40;
constexpr std::uint64_t kUnusedPagesBits = 33;  // 32 TiB of them
constexpr std::size_t kPageBytes = 4096;

bool answers_as_own_to_move(const Uffd& uffd) {
  // Nothing lies at 1 MiB, and nothing is so long: no page can move.
  constexpr Address kStart(1u << 20);
  constexpr AddressRange kMost{kStart + ByteCount(kPageBytes), ByteCount(std::uint64_t{1} << 46)};
  const Stop stop = uffd.move(kStart, kMost, Wake::no).stop;
  return stop != Stop::invalid && stop != Stop::changing && stop != Stop::gone && stop != Stop::other;
}

bool answers_as_own_to_register(const Uffd& uffd) {
  // Anonymous memory, but of a file that is not open for writing: it can never be written, and so not filled.
  const UniqueFd zero(::open("/dev/zero", O_RDONLY | O_CLOEXEC));
  if (!zero) return false;
  std::uint64_t random = 0;
  if (::getrandom(&random, sizeof random, GRND_NONBLOCK) != sizeof random)
    random = reinterpret_cast<std::uintptr_t>(&random) >> 4;
  const std::uint64_t page = random & ((std::uint64_t{1} << kUnusedPagesBits) - 1);
  void* hint = reinterpret_cast<void*>(kUnusedStart + page * kPageBytes);
  void* ours = ::mmap(hint, kPageBytes, PROT_READ, MAP_SHARED, zero.get(), 0);
  if (ours == MAP_FAILED) return false;
  const AddressRange range{Address(reinterpret_cast<std::uintptr_t>(ours)), ByteCount(kPageBytes)};
  const Result<RangeIoctls> registered = uffd.register_range(range, kMissing);
  if (registered) (void)uffd.unregister_range(range);
  ::munmap(ours, kPageBytes);
  return !registered && registered.error().os_error() == EPERM;
}

}  // namespace

OwnMemoryWay own_memory_way(SystemCalls& system) {
  const Result<KernelFeatures> kernel = probe_features(system);
  const bool can_move = kernel && kernel->available.has(Features(abi::kFeatureMove));
  return can_move ? OwnMemoryWay::move : OwnMemoryWay::register_page;
}

bool is_of_own_memory(const Uffd& uffd, OwnMemoryWay way) {
  return way == OwnMemoryWay::move ? answers_as_own_to_move(uffd) : answers_as_own_to_register(uffd);
}

}  // namespace uffdkit
