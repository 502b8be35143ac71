#include "snapshot.h"

#include <fcntl.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>

namespace tinyvmm {
namespace {

namespace fs = std::filesystem;

constexpr char kMagic[8] = {'T', 'I', 'N', 'Y', 'V', 'M', 'M', '\n'};
constexpr std::uint32_t kVersion = 1;
constexpr std::uint64_t kRunBytesMax = 1 << 20;  // of one read or write

struct StateFile {
  char magic[8];
  std::uint32_t version;
  std::uint32_t file_bytes;
  std::uint64_t memory_bytes;
  std::uint32_t node_pages;
  std::uint32_t seed;
  kvm_regs registers;
  kvm_sregs segments;
  std::uint64_t zero;
  std::uint64_t hash;
};
static_assert(sizeof(StateFile) == 504 && offsetof(StateFile, hash) == 496);

std::uint64_t hash_of(const StateFile& state) {
  std::uint64_t hash = 0xcbf29ce484222325;
  for (std::byte byte : std::as_bytes(std::span(&state, 1)).first(offsetof(StateFile, hash))) {
    hash = (hash ^ std::to_integer<std::uint64_t>(byte)) * 0x100000001b3;
  }
  return hash;
}

std::unexpected<std::string> file_failure(const char* what, const fs::path& path) {
  return failure("cannot {} {}: {}", what, path.string(), reason(errno));
}

Result<void> write_all(const Fd& file, const fs::path& path, std::span<const std::byte> bytes,
                       std::uint64_t offset) {
  while (!bytes.empty()) {
    const ssize_t written = pwrite(file.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return file_failure("write", path);
    bytes = bytes.subspan(static_cast<std::size_t>(written));
    offset += static_cast<std::uint64_t>(written);
  }
  return {};
}

// Reads until `bytes` is full or the file ends; gives the count.
Result<std::size_t> read_all(const Fd& file, const fs::path& path, std::span<std::byte> bytes,
                             std::uint64_t offset) {
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got =
        pread(file.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return file_failure("read", path);
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return done;
}

bool is_zero(std::span<const std::byte> bytes) {
  return bytes.front() == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

// Writes the pages that hold something, as many in one write as lie side by side.
Result<std::uint64_t> write_region(const Fd& file, const fs::path& path, const MemoryRegion& region) {
  const auto page_is_zero = [&](std::uint64_t at) { return is_zero({region.host + at, kPageBytes}); };
  std::uint64_t written = 0;
  for (std::uint64_t start = 0; start < region.size;) {
    if (page_is_zero(start)) {
      start += kPageBytes;
      continue;
    }
    std::uint64_t end = start + kPageBytes;
    while (end < region.size && end - start < kRunBytesMax && !page_is_zero(end)) end += kPageBytes;
    Result<void> run = write_all(file, path, {region.host + start, end - start}, region.offset + start);
    if (!run) return std::unexpected(run.error());
    written += end - start;
    start = end;
  }
  return written;
}

Result<std::uint64_t> write_memory(const fs::path& path, const GuestMemory& memory) {
  const Fd file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!file) return file_failure("create", path);
  if (ftruncate(file.get(), static_cast<off_t>(memory.size())) != 0) return file_failure("size", path);
  std::uint64_t written = 0;
  for (const MemoryRegion& region : memory.regions()) {
    Result<std::uint64_t> bytes = write_region(file, path, region);
    if (!bytes) return bytes;
    written += *bytes;
  }
  return written;
}

Result<void> write_state(const fs::path& path, const SavedMachine& machine) {
  StateFile state{};
  std::copy(std::begin(kMagic), std::end(kMagic), state.magic);
  state.version = kVersion;
  state.file_bytes = sizeof state;
  state.memory_bytes = machine.layout.memory_bytes();
  state.node_pages = machine.layout.node_pages();
  state.seed = machine.layout.seed();
  state.registers = machine.cpu.registers;
  state.segments = machine.cpu.segments;
  state.hash = hash_of(state);
  const Fd file(open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
  if (!file) return file_failure("create", path);
  return write_all(file, path, std::as_bytes(std::span(&state, 1)), 0);
}

}  // namespace

Result<std::uint64_t> save_snapshot(const fs::path& directory, const SavedMachine& machine,
                                    const GuestMemory& memory) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) return failure("cannot make the directory {}: {}", directory.string(), error.message());
  fs::remove(directory / kStateFile, error);
  if (error)
    return failure("cannot remove the old {}: {}", (directory / kStateFile).string(), error.message());

  Result<std::uint64_t> written = write_memory(directory / kMemoryFile, memory);
  if (!written) return written;
  if (Result<void> state = write_state(directory / kStateFile, machine); !state)
    return std::unexpected(state.error());
  return written;
}

Result<SavedMachine> load_state(const fs::path& directory) {
  const fs::path path = directory / kStateFile;
  const Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) {
    const int error = errno;
    return failure("cannot open {}: {}{}", path.string(), reason(error),
                   error == ENOENT
                       ? fmt::format("\n  make a snapshot first:  tinyvmm snapshot --memory 256M --out {}",
                                     directory.string())
                       : "");
  }
  StateFile state{};
  Result<std::size_t> got = read_all(file, path, std::as_writable_bytes(std::span(&state, 1)), 0);
  if (!got) return std::unexpected(got.error());
  if (*got >= sizeof state.magic && std::memcmp(state.magic, kMagic, sizeof kMagic) != 0) {
    return failure("{} is not a state file of tinyvmm", path.string());
  }
  if (*got < sizeof state) {
    return failure("{} is cut short: it has {} bytes instead of {}", path.string(), *got, sizeof state);
  }
  if (state.version != kVersion || state.file_bytes != sizeof state) {
    return failure("{} has version {} and {} bytes; this program reads version {} of {} bytes", path.string(),
                   state.version, state.file_bytes, kVersion, sizeof state);
  }
  if (state.hash != hash_of(state))
    return failure("{} is damaged: its hash is not that of its bytes", path.string());

  Result<GuestLayout> layout = GuestLayout::from_state(state.memory_bytes, state.node_pages, state.seed);
  if (!layout) return failure("{}: {}", path.string(), layout.error());
  if (state.registers.rip != cpu_after_fill(*layout).registers.rip) {
    return failure("{} was made by a version of tinyvmm with another guest: make the snapshot anew",
                   path.string());
  }
  return SavedMachine{.layout = *layout, .cpu = {.registers = state.registers, .segments = state.segments}};
}

Result<void> check_memory_file(const fs::path& directory, const GuestLayout& layout) {
  const fs::path path = directory / kMemoryFile;
  struct stat about{};
  if (stat(path.c_str(), &about) != 0) return file_failure("open", path);
  if (about.st_size != static_cast<off_t>(layout.memory_bytes())) {
    return failure(
        "{} has {} bytes, but the guest's memory has {}: the file was cut short or is another snapshot's",
        path.string(), about.st_size, layout.memory_bytes());
  }
  return {};
}

Result<void> read_memory_file(const fs::path& directory, const GuestMemory& memory) {
  const fs::path path = directory / kMemoryFile;
  const Fd file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) return file_failure("open", path);
  for (const MemoryRegion& region : memory.regions()) {
    for (std::uint64_t at = 0; at < region.size; at += kRunBytesMax) {
      const std::uint64_t bytes = std::min(kRunBytesMax, region.size - at);
      Result<std::size_t> got = read_all(file, path, {region.host + at, bytes}, region.offset + at);
      if (!got) return std::unexpected(got.error());
      if (*got < bytes) return failure("{} ended while it was read", path.string());
    }
  }
  return {};
}

}  // namespace tinyvmm
