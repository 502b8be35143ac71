#include <elf.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "image/piece_file.h"
#include "image/process_memory.h"

namespace uffdkit::image {
namespace {

Failure refuse(const std::string& path, const std::string& what) {
  return Failure(
      Error(path + " " + what, EBADMSG).with_remedy("give a core file of a 64-bit program, whole"));
}

// Reads all of `to` at `position`; false where the file has no such bytes.
bool read_at(int fd, std::uint64_t position, void* to, std::size_t bytes) {
  return position <= INT64_MAX &&
         ::pread(fd, to, bytes, static_cast<off_t>(position)) == static_cast<ssize_t>(bytes);
}

std::uint32_t protection_of(Elf64_Word flags) {
  return (flags & PF_R ? 1u : 0u) | (flags & PF_W ? 2u : 0u) | (flags & PF_X ? 4u : 0u);
}

}  // namespace

Result<ProcessMemory> memory_of_core(const std::string& path) {
  UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file) return Failure(Error::from_open(path, errno));
  struct stat status;
  if (::fstat(file.get(), &status) < 0) return Failure(Error::from_errno("stat " + path, errno));
  if (!S_ISREG(status.st_mode)) return refuse(path, "is not a regular file");
  const auto file_bytes = static_cast<std::uint64_t>(status.st_size);

  Elf64_Ehdr header;
  if (!read_at(file.get(), 0, &header, sizeof header) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0 ||
      header.e_ident[EI_CLASS] != ELFCLASS64 || header.e_ident[EI_DATA] != ELFDATA2LSB ||
      header.e_type != ET_CORE)
    return refuse(path, "is no core file of a 64-bit little-endian program");
  if (header.e_phentsize != sizeof(Elf64_Phdr)) return refuse(path, "has program headers of an unknown size");
  std::uint64_t count = header.e_phnum;
  if (count == PN_XNUM) {
    // More than fit into the header: the first section has the number.
    Elf64_Shdr section;
    if (!read_at(file.get(), header.e_shoff, &section, sizeof section))
      return refuse(path, "ends before its section header");
    count = section.sh_info;
  }
  if (count > file_bytes / sizeof(Elf64_Phdr))
    return refuse(path, fmt::format("has no room for {} headers", count));
  std::vector<Elf64_Phdr> headers(count);
  if (count != 0 && !read_at(file.get(), header.e_phoff, headers.data(), count * sizeof(Elf64_Phdr)))
    return refuse(path, "ends before its program headers");

  std::vector<FilePiece> pieces;
  ProcessMemory memory;
  for (std::size_t i = 0; i < headers.size(); ++i) {
    const Elf64_Phdr& segment = headers[i];
    if (segment.p_type != PT_LOAD || segment.p_filesz == 0) continue;
    if (segment.p_vaddr % kPageBytes != 0)
      return refuse(path, fmt::format("has segment {} at {:#x}, which is no page", i, segment.p_vaddr));
    if (segment.p_filesz > file_bytes || segment.p_offset > file_bytes - segment.p_filesz)
      return refuse(path, fmt::format("was cut short: segment {} ends at byte {}, and the file has {}", i,
                                      segment.p_offset + segment.p_filesz, file_bytes));
    if (pieces.size() == kRegionsMax)
      return refuse(path, fmt::format("has more than {} segments", kRegionsMax));
    const std::uint64_t pages = (segment.p_filesz + kPageBytes - 1) / kPageBytes;
    pieces.push_back({.position = segment.p_offset, .bytes = pages * kPageBytes, .stored = segment.p_filesz});
    memory.regions.push_back({.address = segment.p_vaddr,
                              .pages = pages,
                              .protection = protection_of(segment.p_flags),
                              .name = {}});
  }
  if (pieces.empty()) return refuse(path, "has no memory in it");
  memory.store = make_piece_store(std::move(file), path, std::move(pieces));
  return memory;
}

}  // namespace uffdkit::image
