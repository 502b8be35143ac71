// Reading /proc/PID/smaps into a MemoryMap.
#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/checked.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <utility>

namespace uffdkit {
namespace {

// Ten times the mappings that the kernel allows unless told otherwise (vm.max_map_count), at 1.5 KiB each.
constexpr std::size_t kTextBytesMax = 1u << 30;

// Everything up to `separator`, which is taken off as well; all of it where there is none.
std::string_view take_until(std::string_view& text, char separator) {
  const std::size_t end = text.find(separator);
  const std::string_view taken = text.substr(0, end);
  text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
  return taken;
}

std::string_view without_spaces_before(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of(' '), text.size()));
}

std::string_view take_word(std::string_view& text) {
  text = without_spaces_before(text);
  return take_until(text, ' ');
}

template <class Number>
std::optional<Number> number(std::string_view digits, int base) {
  Number value{};
  const auto [stopped, failed] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
  if (failed != std::errc() || stopped != digits.data() + digits.size()) return std::nullopt;
  return value;
}

// A number and its unit, in bytes: "4 kB".
std::optional<std::uint64_t> kilobytes(std::string_view text) {
  const auto count = number<std::uint64_t>(take_word(text), 10);
  if (!count || without_spaces_before(text) != "kB" || *count > UINT64_MAX / 1024) return std::nullopt;
  return *count * 1024;
}

// "0:23" of every mount whose files are shmem. A line is
// "25 24 0:23 / /dev/shm rw,relatime - tmpfs tmpfs rw", with any number of words before the dash.
std::vector<std::pair<unsigned, unsigned>> shmem_devices(std::string_view mounts) {
  std::vector<std::pair<unsigned, unsigned>> devices;
  while (!mounts.empty()) {
    std::string_view line = take_until(mounts, '\n');
    const std::size_t dash = line.find(" - ");
    if (dash == std::string_view::npos) continue;
    std::string_view kind = line.substr(dash + 3);
    const std::string_view type = take_word(kind);
    if (type != "tmpfs" && type != "devtmpfs") continue;
    take_word(line);
    take_word(line);
    std::string_view device = take_word(line);
    const auto major = number<unsigned>(take_until(device, ':'), 10);
    const auto minor = number<unsigned>(device, 10);
    if (major && minor) devices.emplace_back(*major, *minor);
  }
  return devices;
}

class SmapsParser {
 public:
  explicit SmapsParser(std::string_view mounts) : shmem_(shmem_devices(mounts)) {}

  Result<std::vector<MappedArea>> parse(std::string_view text) {
    while (!text.empty()) {
      ++line_;
      if (!take_line(take_until(text, '\n')))
        return Failure(Error(fmt::format("smaps, line {}: {}", line_, problem_)));
    }
    if (!area_is_whole()) return Failure(Error(fmt::format("smaps, line {}: {}", line_, problem_)));
    return std::move(areas_);
  }

 private:
  bool fail(const char* problem) {
    problem_ = problem;
    return false;
  }

  bool area_is_whole() {
    if (areas_.empty() || flags_seen_) return true;
    return fail("an area ends without VmFlags");
  }

  bool take_line(std::string_view line) {
    std::string_view rest = line;
    const std::string_view first = take_word(rest);
    if (!first.ends_with(':')) return take_head(line);
    if (areas_.empty()) return fail("a property before the first area");
    if (first == "VmFlags:") return take_flags(rest);
    if (first == "KernelPageSize:") {
      const auto bytes = kilobytes(rest);
      if (!bytes || !PageSize::is_valid(*bytes)) return fail("no page size");
      areas_.back().page_size = PageSize::from_bytes(*bytes);
    } else if (first == "ProtectionKey:") {
      const auto key = number<int>(without_spaces_before(rest), 10);
      if (!key) return fail("no protection key");
      areas_.back().protection_key = *key;
    }
    return true;
  }

  // "7f3201deb000-7f3201ded000 rw-s 00000000 fe:00 5308828      /name with spaces"
  bool take_head(std::string_view line) {
    if (!area_is_whole()) return false;
    std::string_view span = take_word(line);
    const auto start = number<std::uint64_t>(take_until(span, '-'), 16);
    const auto end = number<std::uint64_t>(span, 16);
    if (!start || !end || *start >= *end) return fail("neither an area nor a property of one");
    if (!areas_.empty() && Address(*start) < areas_.back().range.end()) return fail("an area out of order");
    const std::string_view access = take_word(line);
    const std::string_view offset = take_word(line);
    std::string_view device = take_word(line);
    const auto major = number<unsigned>(take_until(device, ':'), 16);
    const auto minor = number<unsigned>(device, 16);
    const auto inode = number<std::uint64_t>(take_word(line), 10);
    if (access.size() != 4 || !number<std::uint64_t>(offset, 16) || !major || !minor || !inode)
      return fail("neither an area nor a property of one");
    device_ = {*major, *minor};
    inode_ = *inode;
    flags_seen_ = false;
    areas_.push_back({.range = {Address(*start), ByteCount(*end - *start)},
                      .name = std::string(without_spaces_before(line)),
                      .registered = {}});
    return true;
  }

  bool take_flags(std::string_view flags) {
    if (std::exchange(flags_seen_, true)) return fail("VmFlags a second time");
    MappedArea& area = areas_.back();
    bool huge = false;
    for (std::string_view flag; !(flag = take_word(flags)).empty();) {
      if (flag == "rd") area.readable = true;
      if (flag == "wr") area.writable = true;
      if (flag == "ex") area.executable = true;
      if (flag == "sh") area.shared = true;
      if (flag == "lo") area.locked = true;
      if (flag == "pf" || flag == "io" || flag == "mm" || flag == "ss") area.special = true;
      if (flag == "mt") area.tagged = true;
      if (flag == "ht") huge = true;
      if (flag == "um") area.registered = area.registered | kMissing;
      if (flag == "uw") area.registered = area.registered | kWriteProtect;
      if (flag == "ui") area.registered = area.registered | kMinor;
    }
    area.backing = huge ? Backing::huge_pages : backing(area);
    return true;
  }

  Backing backing(const MappedArea& area) const {
    const std::string_view name = area.name;
    if (device_.first == 0 && device_.second == 0 && inode_ == 0) {
      // Brackets are around names that the kernel gives. All others ([vdso] and its like) are its own pages.
      const bool plain = !name.starts_with('[') || name == "[heap]" || name.starts_with("[stack") ||
                         name.starts_with("[anon:");
      return plain ? Backing::anonymous : Backing::other;
    }
    // The kernel makes a private mapping of /dev/zero anonymous memory, but shows its name. Source:
    // drivers/char/mem.c, mmap_zero().
    if (name == "/dev/zero" && !area.shared) return Backing::anonymous;
    // REGISTER takes no other files for missing and minor faults; hugetlbfs was found before.
    if (!(area.registered - kWriteProtect).empty()) return Backing::shmem;
    // Files of the kernel's own tmpfs, which no mount shows.
    if (device_.first == 0 && (name.starts_with("/memfd:") || name.starts_with("/SYSV") ||
                               name == "/dev/zero (deleted)" || name.starts_with("[anon_shmem:")))
      return Backing::shmem;
    return std::ranges::find(shmem_, device_) != shmem_.end() ? Backing::shmem : Backing::other;
  }

  std::vector<std::pair<unsigned, unsigned>> shmem_;
  std::vector<MappedArea> areas_;
  std::size_t line_ = 0;
  const char* problem_ = "";
  // Of the last area.
  std::pair<unsigned, unsigned> device_;
  std::uint64_t inode_ = 0;
  bool flags_seen_ = false;
};

Result<std::string> read_text(const std::string& path, SystemCalls& system) {
  const int fd = system.open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return Failure(Error::from_errno("open " + path, -fd));
  std::string text;
  std::vector<char> part(64u << 10);
  std::ptrdiff_t bytes = 0;
  while ((bytes = system.read(fd, part.data(), part.size())) > 0 && text.size() < kTextBytesMax)
    text.append(part.data(), static_cast<std::size_t>(bytes));
  system.close(fd);
  if (bytes < 0) return Failure(Error::from_errno("read " + path, static_cast<int>(-bytes)));
  if (bytes > 0) return Failure(Error(fmt::format("{} is longer than {} bytes", path, kTextBytesMax)));
  return text;
}

}  // namespace

const MappedArea* MemoryMap::find(Address address) const {
  const auto after =
      std::ranges::upper_bound(areas, address, {}, [](const MappedArea& area) { return area.range.start; });
  if (after == areas.begin()) return nullptr;
  const MappedArea& area = *std::prev(after);
  return area.range.contains(address) ? &area : nullptr;
}

Result<std::vector<MappedArea>> parse_smaps(std::string_view smaps, std::string_view mounts) {
  return SmapsParser(mounts).parse(smaps);
}

Result<MemoryMap> read_memory_map(int pid, SystemCalls& system) {
  const std::string process = pid == 0 ? "/proc/self/" : fmt::format("/proc/{}/", pid);
  Result<std::string> smaps = read_text(process + "smaps", system);
  if (!smaps)
    return Failure(
        std::move(smaps.error())
            .with_remedy("mount /proc, use a kernel with CONFIG_PROC_PAGE_MONITOR, and for another's "
                         "memory have the right to ptrace its process"));
  // Without it only the backing of some files is unknown.
  const Result<std::string> mounts = read_text(process + "mountinfo", system);
  Result<std::vector<MappedArea>> areas = parse_smaps(*smaps, mounts ? *mounts : std::string());
  if (!areas) return Failure(std::move(areas.error()));

  // Likewise: where it cannot be read, nothing that is mapped counts as too low.
  std::uint64_t lowest = 0;
  if (const Result<std::string> text = read_text("/proc/sys/vm/mmap_min_addr", system)) {
    std::string_view line = *text;
    lowest = number<std::uint64_t>(take_until(line, '\n'), 10).value_or(0);
  }
  return MemoryMap{.areas = std::move(*areas), .lowest = Address(lowest)};
}

}  // namespace uffdkit
