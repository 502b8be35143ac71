#include "wire/criu_images.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <limits>
#include <utility>

namespace uffdkit::criu {
namespace {

// The first number of every image but the inventory, since version 2 of the format.
constexpr std::uint32_t kCommonMagic = 0x54564319;
constexpr std::uint64_t kImageVersionMax = 2;
constexpr std::size_t kReadBytes = std::size_t{64} * 1024;

// Bits of a page map's entry.
constexpr std::uint64_t kInParent = 1;
constexpr std::uint64_t kLazy = 2;
constexpr std::uint64_t kPresent = 4;

// Bits of mmap(2) and of a mapping's status, as criu writes them.
constexpr std::uint32_t kMapPrivate = 0x2;
constexpr std::uint32_t kMapAnonymous = 0x20;
constexpr std::uint32_t kMapLocked = 0x2000;
constexpr std::uint32_t kMapHugetlb = 0x40000;
constexpr std::uint32_t kStatusVsyscall = 1u << 2;
constexpr std::uint32_t kStatusVdso = 1u << 3;
constexpr std::uint32_t kStatusVvar = 1u << 12;

Failure malformed(std::size_t at, const std::string& what) {
  return Failure(Error(fmt::format("field at byte {}: {}", at, what), EBADMSG));
}

// Calls `take` with each field of a record; what it returns, and what the reader says, becomes an error of
// the file.
template <class Take>
Result<void> for_each_field(const ImageFile& file, const Record& record, Take take) {
  ProtoReader reader(record.bytes);
  for (;;) {
    const Result<std::optional<ProtoField>> next = reader.next();
    if (!next) return Failure(file.error_at(record.at, next.error().message()));
    const std::optional<ProtoField>& field = *next;
    if (!field) return {};
    if (auto taken = take(*field); !taken) return Failure(file.error_at(record.at, taken.error().message()));
  }
}

// The record with which a file begins that must have one.
Result<Record> first_record(ImageFile& file) {
  const Result<std::optional<Record>> next = file.next();
  if (!next) return Failure(next.error());
  const std::optional<Record>& record = *next;
  if (!record) return Failure(file.error_at(0, "there is no record"));
  return *record;
}

// The number in a field that is to hold one, up to `max`.
Result<std::uint64_t> number_of(const ProtoField& field, std::uint64_t max) {
  if (field.is_bytes)
    return malformed(field.at, fmt::format("field {} holds bytes instead of a number", field.number));
  if (field.value > max)
    return malformed(field.at, fmt::format("field {} is {}, more than {}", field.number, field.value, max));
  return field.value;
}

constexpr std::uint64_t kU32Max = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint64_t kU64Max = std::numeric_limits<std::uint64_t>::max();

// Stores the number of `field` in `to`.
template <class Number>
Result<void> take_number(const ProtoField& field, Number& to, std::uint64_t max) {
  const Result<std::uint64_t> number = number_of(field, max);
  if (!number) return Failure(number.error());
  to = static_cast<Number>(*number);
  return {};
}

// The pages that [start, start + bytes) is made of.
Result<AddressRange> pages_at(std::uint64_t start, std::uint64_t bytes) {
  if (!kPage4K.is_aligned(start) || !kPage4K.is_aligned(bytes))
    return Failure(Error(fmt::format("memory at {:#x} of {} bytes is not whole pages", start, bytes)));
  if (start >= kAddressEnd.value || bytes > kAddressEnd.value - start)
    return Failure(Error(fmt::format("memory at {:#x} of {} bytes is beyond all addresses", start, bytes)));
  return AddressRange{Address(start), ByteCount(bytes)};
}

}  // namespace

// ---- protocol buffers -------------------------------------------------------------------------------------

Result<std::uint64_t> ProtoReader::varint() {
  const std::size_t start = position_;
  std::uint64_t value = 0;
  for (unsigned shift = 0; shift < 70; shift += 7) {
    if (position_ == message_.size()) return malformed(start, "the message ends within a number");
    const auto byte = std::to_integer<std::uint64_t>(message_[position_++]);
    // The tenth byte has one bit of the number left.
    if (shift == 63 && byte > 1) return malformed(start, "a number of more than 64 bits");
    value |= (byte & 0x7f) << shift;
    if (byte < 0x80) return value;
  }
  return malformed(start, "a number of more than 64 bits");
}

Result<std::span<const std::byte>> ProtoReader::take(std::uint64_t count) {
  if (count > message_.size() - position_)
    return malformed(position_, fmt::format("{} bytes are announced, but only {} are left", count,
                                            message_.size() - position_));
  const auto bytes = message_.subspan(position_, count);
  position_ += count;
  return bytes;
}

Result<std::optional<ProtoField>> ProtoReader::next() {
  if (position_ == message_.size()) return std::nullopt;
  ProtoField field{.number = 0, .is_bytes = false, .value = 0, .bytes = {}, .at = position_};
  const Result<std::uint64_t> key = varint();
  if (!key) return Failure(key.error());
  const std::uint64_t number = *key >> 3;
  if (number == 0 || number > 0x1fffffff) return malformed(field.at, "not a field's number");
  field.number = static_cast<std::uint32_t>(number);
  switch (*key & 7) {
    case 0: {
      const Result<std::uint64_t> value = varint();
      if (!value) return Failure(value.error());
      field.value = *value;
      return field;
    }
    case 1:
    case 5: {
      const auto bytes = take((*key & 7) == 1 ? 8 : 4);
      if (!bytes) return Failure(bytes.error());
      for (std::size_t i = bytes->size(); i-- > 0;)
        field.value = field.value << 8 | std::to_integer<std::uint64_t>((*bytes)[i]);
      return field;
    }
    case 2: {
      const Result<std::uint64_t> length = varint();
      if (!length) return Failure(length.error());
      const auto bytes = take(*length);
      if (!bytes) return Failure(bytes.error());
      field.is_bytes = true;
      field.bytes = *bytes;
      return field;
    }
    default:
      return malformed(field.at, fmt::format("unknown wire type {}", *key & 7));
  }
}

// ---- containers -------------------------------------------------------------------------------------------

Error ImageFile::error_at(std::uint64_t at, const std::string& what) const {
  return Error(fmt::format("{} at byte {}: {}", name_, at, what), EBADMSG);
}

Result<ImageFile> ImageFile::open(UniqueFd fd, std::string name, ImageKind kind) {
  struct stat status;
  if (::fstat(fd.get(), &status) < 0) return Failure(Error::from_errno("stat " + name, errno));
  if (!S_ISREG(status.st_mode)) return Failure(Error(name + " is not a regular file", EINVAL));
  ImageFile file(std::move(fd), std::move(name), static_cast<std::uint64_t>(status.st_size));
  Result<std::uint32_t> magic = file.number();
  if (magic && *magic == kCommonMagic && kind != ImageKind::inventory) magic = file.number();
  if (!magic) return Failure(magic.error());
  if (*magic != static_cast<std::uint32_t>(kind))
    return Failure(file.error_at(file.position_ - 4, fmt::format("the magic number is {:#x} instead of {:#x}",
                                                                 *magic, static_cast<std::uint32_t>(kind))));
  return file;
}

Result<std::uint32_t> ImageFile::number() {
  const auto bytes = take(4);
  if (!bytes) return Failure(bytes.error());
  std::uint32_t value = 0;
  for (std::size_t i = 4; i-- > 0;) value = value << 8 | std::to_integer<std::uint32_t>((*bytes)[i]);
  return value;
}

Result<std::span<const std::byte>> ImageFile::take(std::size_t count) {
  if (count > file_bytes_ - position_)
    return Failure(
        error_at(position_, fmt::format("the file ends {} bytes early", count - (file_bytes_ - position_))));
  if (buffer_.size() - buffer_at_ < count) {
    buffer_.erase(buffer_.begin(), buffer_.begin() + static_cast<std::ptrdiff_t>(buffer_at_));
    buffer_at_ = 0;
    std::size_t filled = buffer_.size();
    const std::uint64_t left = file_bytes_ - position_;
    buffer_.resize(static_cast<std::size_t>(std::min<std::uint64_t>(left, std::max(count, kReadBytes))));
    while (filled < buffer_.size()) {
      const ssize_t bytes = ::pread(fd_.get(), buffer_.data() + filled, buffer_.size() - filled,
                                    static_cast<off_t>(position_ + filled));
      if (bytes < 0 && errno == EINTR) continue;
      if (bytes < 0) return Failure(Error::from_errno("read " + name_, errno));
      if (bytes == 0) return Failure(error_at(position_ + filled, "the file has been cut short"));
      filled += static_cast<std::size_t>(bytes);
    }
  }
  const std::span<const std::byte> bytes(buffer_.data() + buffer_at_, count);
  buffer_at_ += count;
  position_ += count;
  return bytes;
}

Result<std::optional<Record>> ImageFile::next() {
  if (position_ == file_bytes_) return std::nullopt;
  const std::uint64_t at = position_;
  const Result<std::uint32_t> length = number();
  if (!length) return Failure(length.error());
  if (*length > kRecordBytesMax)
    return Failure(error_at(at, fmt::format("a record of {} bytes, more than {}", *length, kRecordBytesMax)));
  const std::uint64_t start = position_;
  const auto bytes = take(*length);
  if (!bytes) return Failure(bytes.error());
  return Record{.bytes = *bytes, .at = start};
}

// ---- what the files say -----------------------------------------------------------------------------------

bool Vma::can_be_lazy() const {
  constexpr std::uint32_t kWanted = kMapPrivate | kMapAnonymous;
  return (flags & (kWanted | kMapLocked | kMapHugetlb)) == kWanted &&
         (status & (kStatusVdso | kStatusVvar | kStatusVsyscall)) == 0;
}

Result<void> check_inventory(ImageFile& file) {
  const Result<Record> record = first_record(file);
  if (!record) return Failure(record.error());
  std::uint64_t version = 0;
  auto read = for_each_field(file, *record, [&](const ProtoField& field) -> Result<void> {
    if (field.number == 1) return take_number(field, version, kU32Max);
    return {};
  });
  if (!read) return read;
  if (version == 0 || version > kImageVersionMax)
    return Failure(file.error_at(record->at, fmt::format("images of version {} are not known", version)));
  return {};
}

Result<std::vector<std::int32_t>> read_pstree(ImageFile& file) {
  std::vector<std::int32_t> tasks;
  for (;;) {
    const Result<std::optional<Record>> next = file.next();
    if (!next) return Failure(next.error());
    const std::optional<Record>& record = *next;
    if (!record) return tasks;
    std::int32_t pid = 0;
    auto read = for_each_field(file, *record, [&](const ProtoField& field) -> Result<void> {
      if (field.number == 1) return take_number(field, pid, std::numeric_limits<std::int32_t>::max());
      return {};
    });
    if (!read) return Failure(read.error());
    if (pid == 0) return Failure(file.error_at(record->at, "a task without a process number"));
    tasks.push_back(pid);
  }
}

namespace {

Result<PagemapRun> pagemap_run(const ImageFile& file, const Record& record) {
  std::uint64_t address = 0;
  std::uint64_t old_count = 0;
  std::uint64_t old_in_parent = 0;
  std::optional<std::uint64_t> flags;
  std::optional<std::uint64_t> count;
  auto read = for_each_field(file, record, [&](const ProtoField& field) -> Result<void> {
    if (field.number == 1) return take_number(field, address, kU64Max);
    if (field.number == 2) return take_number(field, old_count, kU32Max);
    if (field.number == 3) return take_number(field, old_in_parent, kU64Max);
    if (field.number == 4) return take_number(field, flags.emplace(), kU32Max);
    if (field.number == 5) return take_number(field, count.emplace(), kU64Max);
    return {};
  });
  if (!read) return Failure(read.error());
  // Older images have neither of the two.
  const std::uint64_t pages = count.value_or(old_count);
  const std::uint64_t bits = flags.value_or(old_in_parent != 0 ? kInParent : kPresent);
  if (pages > kPage4K.pages(ByteCount(kAddressEnd.value)).value)
    return Failure(file.error_at(record.at, fmt::format("{} pages are more than there are", pages)));
  const Result<AddressRange> memory = pages_at(address, kPage4K.bytes(PageCount(pages)).value);
  if (!memory) return Failure(file.error_at(record.at, memory.error().message()));
  return PagemapRun{.memory = *memory,
                    .offset = StoreOffset(0),
                    .in_parent = (bits & kInParent) != 0,
                    .lazy = (bits & kLazy) != 0,
                    .present = (bits & kPresent) != 0};
}

bool goes_on(const PagemapRun& run, const PagemapRun& next) {
  return run.memory.end() == next.memory.start && run.in_parent == next.in_parent && run.lazy == next.lazy &&
         run.present == next.present;
}

Result<Vma> vma_of(std::span<const std::byte> bytes) {
  std::uint64_t start = 0;
  std::uint64_t end = 0;
  Vma vma{.memory = {}, .flags = 0, .status = 0};
  ProtoReader reader(bytes);
  for (;;) {
    const Result<std::optional<ProtoField>> next = reader.next();
    if (!next) return Failure(next.error());
    const std::optional<ProtoField>& field = *next;
    if (!field) break;
    Result<void> taken;
    if (field->number == 1) taken = take_number(*field, start, kU64Max);
    if (field->number == 2) taken = take_number(*field, end, kU64Max);
    if (field->number == 6) taken = take_number(*field, vma.flags, kU32Max);
    if (field->number == 7) taken = take_number(*field, vma.status, kU32Max);
    if (!taken) return Failure(taken.error());
  }
  if (end <= start) return Failure(Error(fmt::format("a mapping from {:#x} to {:#x}", start, end)));
  // The vsyscall page lies in the kernel's half; nothing is ever restored there.
  if ((vma.status & kStatusVsyscall) != 0) return vma;
  const Result<AddressRange> memory = pages_at(start, end - start);
  if (!memory) return Failure(memory.error());
  vma.memory = *memory;
  return vma;
}

}  // namespace

Result<Pagemap> read_pagemap(ImageFile& file) {
  Pagemap pagemap;
  const Result<Record> head = first_record(file);
  if (!head) return Failure(head.error());
  auto read = for_each_field(file, *head, [&](const ProtoField& field) -> Result<void> {
    if (field.number == 1) return take_number(field, pagemap.pages_id, kU32Max);
    return {};
  });
  if (!read) return Failure(read.error());

  StoreOffset offset(0);
  for (;;) {
    const Result<std::optional<Record>> next = file.next();
    if (!next) return Failure(next.error());
    const std::optional<Record>& record = *next;
    if (!record) return pagemap;
    Result<PagemapRun> run = pagemap_run(file, *record);
    if (!run) return Failure(run.error());
    if (run->memory.length.value == 0) continue;
    if (!pagemap.runs.empty() && run->memory.start < pagemap.runs.back().memory.end())
      return Failure(file.error_at(
          record->at, fmt::format("the pages at {:#x} overlap the ones before, or are out of order",
                                  run->memory.start.value)));
    run->offset = offset;
    // Cannot overflow: runs do not overlap, so together they have fewer bytes than there are addresses.
    if (run->present) offset = offset + run->memory.length;
    if (!pagemap.runs.empty() && goes_on(pagemap.runs.back(), *run))
      pagemap.runs.back().memory.length = pagemap.runs.back().memory.length + run->memory.length;
    else
      pagemap.runs.push_back(*run);
  }
}

Result<std::vector<Vma>> read_vmas(ImageFile& file) {
  const Result<Record> record = first_record(file);
  if (!record) return Failure(record.error());
  std::vector<Vma> vmas;
  auto read = for_each_field(file, *record, [&](const ProtoField& field) -> Result<void> {
    if (field.number != 14) return {};
    if (!field.is_bytes) return malformed(field.at, "field 14 holds a number instead of a mapping");
    const Result<Vma> vma = vma_of(field.bytes);
    if (!vma) return malformed(field.at, vma.error().message());
    if (vma->memory.length.value == 0) return {};
    if (!vmas.empty() && vma->memory.start < vmas.back().memory.end())
      return malformed(field.at,
                       fmt::format("the mapping at {:#x} overlaps the one before, or is out of order",
                                   vma->memory.start.value));
    vmas.push_back(*vma);
    return {};
  });
  if (!read) return Failure(read.error());
  return vmas;
}

// ---- directories ------------------------------------------------------------------------------------------

Result<ImageDirectory> ImageDirectory::open(const std::string& path) {
  UniqueFd fd(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return Failure(Error::from_errno("open the directory " + path, errno));
  return ImageDirectory(std::move(fd), path);
}

Result<ImageFile> ImageDirectory::image(const std::string& name, ImageKind kind) const {
  const std::string shown = path_ + "/" + name;
  // Non-blocking, so that a FIFO in its place is not waited for.
  UniqueFd fd(::openat(fd_.get(), name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return Failure(Error::from_errno("open " + shown, errno));
  return ImageFile::open(std::move(fd), shown, kind);
}

Result<std::vector<std::int32_t>> ImageDirectory::tasks() const {
  Result<ImageFile> inventory = image("inventory.img", ImageKind::inventory);
  if (!inventory) return Failure(inventory.error());
  if (auto known = check_inventory(*inventory); !known) return Failure(known.error());
  Result<ImageFile> pstree = image("pstree.img", ImageKind::pstree);
  if (!pstree) return Failure(pstree.error());
  return read_pstree(*pstree);
}

Result<Pagemap> ImageDirectory::pagemap(std::int32_t pid) const {
  Result<ImageFile> file = image(fmt::format("pagemap-{}.img", pid), ImageKind::pagemap);
  if (!file) return Failure(file.error());
  return read_pagemap(*file);
}

Result<std::vector<Vma>> ImageDirectory::vmas(std::int32_t pid) const {
  Result<ImageFile> file = image(fmt::format("mm-{}.img", pid), ImageKind::mm);
  if (!file) return Failure(file.error());
  return read_vmas(*file);
}

std::string ImageDirectory::pages_name(std::uint32_t pages_id) const {
  return fmt::format("{}/pages-{}.img", path_, pages_id);
}

Result<UniqueFd> ImageDirectory::open_pages(std::uint32_t pages_id) const {
  const std::string name = fmt::format("pages-{}.img", pages_id);
  UniqueFd fd(::openat(fd_.get(), name.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) return Failure(Error::from_errno("open " + pages_name(pages_id), errno));
  return fd;
}

Result<std::optional<ImageDirectory>> ImageDirectory::parent() const {
  UniqueFd fd(::openat(fd_.get(), "parent", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd && errno == ENOENT) return std::nullopt;
  if (!fd) return Failure(Error::from_errno("open the directory " + path_ + "/parent", errno));
  return ImageDirectory(std::move(fd), path_ + "/parent");
}

}  // namespace uffdkit::criu
