#include "engine/session_state.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <optional>
#include <utility>

#include "base/check.h"
#include "base/publish.h"
#include "base/step.h"

namespace uffdkit {
namespace {

// ---- the bytes of the file: docs/session-state.md ---------------------------------------------------------

constexpr std::array<char, 8> kMagic = {'U', 'F', 'F', 'D', 'S', 'E', 'S', 'S'};
constexpr std::uint32_t kVersion = 4;
constexpr std::size_t kImageBytesMax = 255;
constexpr std::uint32_t kPageShiftMax = 21;

struct FileRegion {
  std::uint64_t length;
  std::uint64_t offset;
  std::uint64_t table;  // where its page states lie in this file
  std::uint16_t page_shift;
  std::uint16_t sharing;
  std::uint32_t live;  // written last when it is made, first when it is dropped
};

struct FileSegment {
  std::uint64_t start;
  std::uint64_t length;
  std::uint64_t first;
  std::uint32_t region;
  std::uint16_t page_shift;
  std::uint16_t left_behind;
};

struct FileHeader {
  std::array<char, 8> magic;
  std::uint32_t version;
  std::uint32_t region_count;  // records in use, live or not
  std::uint64_t tables_end;    // where the next table goes
  std::uint64_t progress;      // bit 0: which layout list counts; above: messages of the inbox applied
  std::array<std::uint32_t, 2> segment_count;
  std::uint32_t image_bytes;
  std::array<char, 256> image;
  std::uint32_t padding;
  std::array<std::uint64_t, 26> reserved;  // zero
};

// In the header's page, with the first region records: an idle session is to take little memory.
constexpr std::uint64_t kInboxAt = sizeof(FileHeader);
constexpr std::uint64_t kRegionsAt = kInboxAt + kInboxMessages * sizeof(abi::Msg);
constexpr std::uint64_t kLayoutsAt = 65'536;
constexpr std::uint64_t kLayoutBytes = std::uint64_t{kSegmentsMax} * sizeof(FileSegment);
constexpr std::uint64_t kTablesAt = kLayoutsAt + 2 * kLayoutBytes;

static_assert(sizeof(FileRegion) == 32 && sizeof(FileSegment) == 32 && sizeof(FileHeader) == 512);
static_assert(sizeof(abi::Msg) == 32 && kRegionsAt + sizeof(FileRegion) <= 4096);
static_assert(kRegionsAt + kSessionRegionsMax * sizeof(FileRegion) <= kLayoutsAt);
static_assert(kTablesAt % 4096 == 0);

FileHeader& header(const StateMapping& head) {
  return *reinterpret_cast<FileHeader*>(head.data());
}

FileRegion* region_records(const StateMapping& head) {
  return reinterpret_cast<FileRegion*>(head.data() + kRegionsAt);
}

FileSegment* layout_list(const StateMapping& head, std::uint32_t which) {
  return reinterpret_cast<FileSegment*>(head.data() + kLayoutsAt + which * kLayoutBytes);
}

abi::Msg* inbox_slots(const StateMapping& head) {
  return reinterpret_cast<abi::Msg*>(head.data() + kInboxAt);
}

std::uint64_t table_file_bytes(ByteCount region_length) {
  return kPage4K.round_down(page_table_bytes(kPage4K.pages(region_length)).value + 4095);
}

Error damaged(const std::string& what) {
  return Error("session state file: " + what, EBADMSG)
      .with_remedy("attach again from the start, with the session's image");
}

// Before anything else is done with a client's descriptor: another kind of file may be slow for ever.
Result<void> check_sealed(int file) {
  const int seals = ::fcntl(file, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0)
    return Failure(damaged("it is not one: not a sealed memory file"));
  return {};
}

Result<void> check(const FileHeader& fields) {
  if (fields.magic != kMagic) return Failure(damaged("it is not one"));
  if (fields.version != kVersion)
    return Failure(damaged(fmt::format("it has version {}, not {}", fields.version, kVersion)));
  if (fields.image_bytes > kImageBytesMax) return Failure(damaged("the image's name is too long"));
  if (fields.region_count > kSessionRegionsMax) return Failure(damaged("too many regions"));
  if (fields.progress >> 1 > kInboxMessages) return Failure(damaged("more messages applied than there are"));
  if (fields.tables_end % 4096 != 0) return Failure(damaged("the end of its tables is not aligned"));
  return {};
}

}  // namespace

// ---- mappings ---------------------------------------------------------------------------------------------

Result<StateMapping> StateMapping::map(int fd, std::uint64_t offset, std::uint64_t bytes) {
  void* memory = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (memory == MAP_FAILED)
    return Failure(Error::from_errno(fmt::format("map {} bytes of session state", bytes), errno)
                       .with_remedy("raise vm.max_map_count or the memory limit of this service"));
  // Sparse on purpose: a huge page here would cost 2 MiB for one bit. Refused only where there are none
  // anyway.
  (void)::madvise(memory, bytes, MADV_NOHUGEPAGE);
  StateMapping mapping;
  mapping.data_ = static_cast<std::byte*>(memory);
  mapping.bytes_ = bytes;
  return mapping;
}

StateMapping::StateMapping(StateMapping&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

StateMapping& StateMapping::operator=(StateMapping&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

StateMapping::~StateMapping() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
}

// ---- making and taking up ---------------------------------------------------------------------------------

Result<SessionState> SessionState::create(const std::string& image) {
  if (image.size() > kImageBytesMax)
    return Failure(
        Error(fmt::format("the image's name has {} bytes, more than {}", image.size(), kImageBytesMax)));
  UniqueFd file(::memfd_create("uffdkit-session", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file) return Failure(Error::from_errno("create the session state file", errno));
  // Only the owner may reopen it for writing: a client gets it for reading.
  if (::fchmod(file.get(), 0600) < 0 || ::ftruncate(file.get(), kTablesAt) < 0 ||
      ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK) < 0)
    return Failure(Error::from_errno("prepare the session state file", errno));
  Result<StateMapping> head = StateMapping::map(file.get(), 0, kTablesAt);
  if (!head) return Failure(head.error());

  FileHeader& fields = header(*head);
  step();
  fields.tables_end = kTablesAt;
  fields.image_bytes = static_cast<std::uint32_t>(image.size());
  std::memcpy(fields.image.data(), image.data(), image.size());
  fields.magic = kMagic;
  publish(fields.version, kVersion);
  SessionState state(std::move(file), std::move(*head), image);
  state.tables_end_ = kTablesAt;
  return state;
}

Result<SessionState> SessionState::open(UniqueFd file) {
  return open_or_leave(file);
}

Result<SessionState> SessionState::open_or_leave(UniqueFd& file) {
  if (auto sealed = check_sealed(file.get()); !sealed) return Failure(std::move(sealed).error());
  struct stat status;
  if (::fstat(file.get(), &status) < 0)
    return Failure(Error::from_errno("stat the session state file", errno));
  if (static_cast<std::uint64_t>(status.st_size) < kTablesAt) return Failure(damaged("too short"));
  if ((::fcntl(file.get(), F_GETFL) & O_ACCMODE) != O_RDWR) {
    UniqueFd writable(::open(fmt::format("/proc/self/fd/{}", file.get()).c_str(), O_RDWR | O_CLOEXEC));
    if (!writable) return Failure(Error::from_errno("reopen the session state file for writing", errno));
    file = std::move(writable);
  }
  Result<StateMapping> head = StateMapping::map(file.get(), 0, kTablesAt);
  if (!head) return Failure(head.error());

  // A copy, so that what was checked cannot change afterwards.
  const FileHeader fields = header(*head);
  if (auto sane = check(fields); !sane) return Failure(std::move(sane).error());
  SessionState state(std::move(file), std::move(*head), std::string(fields.image.data(), fields.image_bytes));
  const auto file_bytes = static_cast<std::uint64_t>(status.st_size);
  // A writer may have been cut off after it had extended the file and before it said so.
  state.tables_end_ = std::max(fields.tables_end, kPage4K.round_down(file_bytes + 4095));
  state.active_layout_ = fields.progress & 1;
  state.unapplied_ = fields.progress >> 1;
  Result<void> loaded = state.load_regions(fields.region_count, file_bytes);
  if (loaded) loaded = state.load_layout(fields.segment_count[state.active_layout_]);
  if (loaded) return state;
  file = std::move(state.file_);
  return Failure(std::move(loaded).error());
}

Result<SessionState> SessionState::clone() const {
  Result<SessionState> copy = create(image_);
  if (!copy) return copy;
  struct stat status;
  if (::fstat(file_.get(), &status) < 0)
    return Failure(Error::from_errno("stat the session state file", errno));
  if (::ftruncate(copy->fd(), status.st_size) < 0)
    return Failure(Error::from_errno("extend the session state file", errno));
  // Only what is there: most of it is holes.
  std::array<std::byte, 65'536> buffer;
  for (off_t from = 0; from < status.st_size;) {
    const off_t data = ::lseek(fd(), from, SEEK_DATA);
    if (data < 0) break;
    const off_t end = ::lseek(fd(), data, SEEK_HOLE);
    for (from = data; from < end;) {
      const std::size_t part = std::min(buffer.size(), static_cast<std::size_t>(end - from));
      const ssize_t bytes = ::pread(fd(), buffer.data(), part, from);
      if (bytes <= 0 || ::pwrite(copy->fd(), buffer.data(), static_cast<std::size_t>(bytes), from) != bytes)
        return Failure(Error::from_errno("copy the session state file", errno));
      from += bytes;
    }
  }
  copy = open(std::move(copy->file_));
  if (copy) (void)copy->empty_inbox();
  // Another holder of the file may have written to it meanwhile.
  if (copy && copy->regions_ != regions_)
    return Failure(damaged("its regions are not the session's any more"));
  return copy;
}

Result<void> SessionState::load_regions(std::uint32_t count, std::uint64_t file_bytes) {
  for (RegionId id = 0; id < count; ++id) {
    const FileRegion record = region_records(head_)[id];
    const bool sane = record.page_shift >= 12 && record.page_shift <= kPageShiftMax && record.length != 0 &&
                      record.sharing <= static_cast<std::uint16_t>(SharingMode::resolve) &&
                      record.length % (1ull << record.page_shift) == 0 && record.offset % 4096 == 0 &&
                      record.length <= kPage4K.bytes(kPageTableGranulesMax).value &&
                      record.offset <= UINT64_MAX - record.length && record.table >= kTablesAt &&
                      record.table % 4096 == 0 && record.table <= file_bytes &&
                      table_file_bytes(ByteCount(record.length)) <= file_bytes - record.table;
    if (record.live > 1 || (record.live != 0 && !sane))
      return Failure(damaged(fmt::format("region {} is out of bounds", id)));
    regions_.emplace_back();
    table_at_.push_back(0);
    table_memory_.emplace_back();
    tables_.emplace_back();
    if (record.live == 0) continue;
    regions_[id] = {.live = true,
                    .length = ByteCount(record.length),
                    .offset = StoreOffset(record.offset),
                    .page_size = PageSize::from_shift(record.page_shift),
                    .sharing = static_cast<SharingMode>(record.sharing)};
    if (auto mapped = map_table(id, record.table); !mapped) return mapped;
    if (auto taken = take_up_table(id); !taken) return taken;
  }
  return {};
}

Result<void> SessionState::load_layout(std::uint32_t count) {
  if (count > kSegmentsMax) return Failure(damaged("too many segments"));
  Address free_from{0};
  for (std::uint32_t i = 0; i < count; ++i) {
    const FileSegment segment = layout_list(head_, active_layout_)[i];
    const bool zero = segment.region == kZeroRegion;
    const std::uint64_t page_mask = segment.page_shift >= 12 && segment.page_shift <= kPageShiftMax
                                        ? (1ull << segment.page_shift) - 1
                                        : 0;
    bool sane = page_mask != 0 && segment.length != 0 && (segment.length & page_mask) == 0 &&
                (segment.start & page_mask) == 0 && segment.start >= free_from.value &&
                segment.start < kStateAddressEnd.value &&
                segment.length <= kStateAddressEnd.value - segment.start;
    sane = sane && segment.left_behind <= (zero ? 0 : 1);
    if (sane && !zero) {
      sane = segment.region < regions_.size() && regions_[segment.region].live &&
             regions_[segment.region].page_size.shift() == segment.page_shift;
      const std::uint64_t granules = sane ? regions_[segment.region].length.value / 4096 : 0;
      sane = sane && segment.first <= granules && segment.length / 4096 <= granules - segment.first &&
             (segment.first * 4096 & page_mask) == 0;
    }
    if (!sane) return Failure(damaged(fmt::format("segment {} is out of bounds", i)));
    const AddressRange memory{Address(segment.start), ByteCount(segment.length)};
    free_from = memory.end();
    layout_.add({.memory = memory,
                 .region = segment.region,
                 .page_size = PageSize::from_shift(segment.page_shift),
                 .first = PageIndex(segment.first),
                 .left_behind = segment.left_behind != 0});
  }
  return {};
}

// Looks only at what has been written: reading a hole through the mapping would fill it.
Result<void> SessionState::take_up_table(RegionId region) {
  const std::uint64_t at = table_at_[region];
  const std::span<std::byte> memory(table_memory_[region].data(), table_memory_[region].size());
  std::vector<std::span<std::byte>> written;
  std::uint64_t position = 0;
  while (position < memory.size()) {
    const off_t data = ::lseek(file_.get(), static_cast<off_t>(at + position), SEEK_DATA);
    if (data < 0) break;  // nothing but holes from here on
    const off_t hole = ::lseek(file_.get(), data, SEEK_HOLE);
    const std::uint64_t from = static_cast<std::uint64_t>(data) - at;
    if (hole < 0 || from >= memory.size()) break;
    position = std::min<std::uint64_t>(static_cast<std::uint64_t>(hole) - at, memory.size());
    written.push_back(memory.subspan(from, position - from));
  }
  std::optional<PageTable> table =
      PageTable::take_up(memory, kPage4K.pages(regions_[region].length), written);
  if (!table) return Failure(damaged(fmt::format("the page states of region {} are out of bounds", region)));
  tables_[region] = std::move(*table);
  return {};
}

// ---- changes ----------------------------------------------------------------------------------------------

Result<void> SessionState::map_table(RegionId region, std::uint64_t at) {
  Result<StateMapping> memory = StateMapping::map(file_.get(), at, table_file_bytes(regions_[region].length));
  if (!memory) return Failure(std::move(memory).error());
  table_at_[region] = at;
  table_memory_[region] = std::move(*memory);
  return {};
}

Result<RegionId> SessionState::add_region(AddressRange memory, StoreOffset offset, PageSize page_size,
                                          SharingMode sharing) {
  const auto unused =
      std::find_if(regions_.begin(), regions_.end(), [](const RegionRecord& r) { return !r.live; });
  const auto id = static_cast<RegionId>(unused - regions_.begin());
  if (id == kSessionRegionsMax)
    return Failure(Error(fmt::format("a session has at most {} regions", kSessionRegionsMax), ENOSPC));
  if (kPage4K.pages(memory.length) > kPageTableGranulesMax)
    return Failure(Error(fmt::format("a region has at most {} pages", kPageTableGranulesMax.value), E2BIG));
  // It may cut a segment in two.
  if (layout_.segments().size() + 2 > kSegmentsMax)
    return Failure(
        Error(fmt::format("the client's memory is in {} pieces", layout_.segments().size()), ENOSPC));

  // Each table starts on a page of its own and is never reused: what was there is freed by punching a hole.
  FileHeader& fields = header(head_);
  const std::uint64_t table = tables_end_;
  const std::uint64_t table_bytes = table_file_bytes(memory.length);
  if (::ftruncate(file_.get(), static_cast<off_t>(table + table_bytes)) < 0)
    return Failure(Error::from_errno("extend the session state file", errno));
  step();
  tables_end_ = table + table_bytes;
  fields.tables_end = tables_end_;
  step();

  FileRegion& record = region_records(head_)[id];
  record = {.length = memory.length.value,
            .offset = offset.value,
            .table = table,
            .page_shift = static_cast<std::uint16_t>(page_size.shift()),
            .sharing = static_cast<std::uint16_t>(sharing),
            .live = 0};
  if (unused == regions_.end()) {
    regions_.emplace_back();
    table_at_.push_back(0);
    table_memory_.emplace_back();
    tables_.emplace_back();
  }
  regions_[id] = {
      .live = true, .length = memory.length, .offset = offset, .page_size = page_size, .sharing = sharing};
  if (auto mapped = map_table(id, table); !mapped) {
    regions_[id] = RegionRecord();
    return Failure(std::move(mapped).error());
  }
  tables_[id] = PageTable({table_memory_[id].data(), table_memory_[id].size()}, kPage4K.pages(memory.length));
  step();
  publish(record.live, std::uint32_t{1});
  step();
  publish(fields.region_count, static_cast<std::uint32_t>(regions_.size()));

  layout_.add({.memory = memory, .region = id, .page_size = page_size, .first = PageIndex(0)});
  if (auto published = publish_layout(); !published) return Failure(std::move(published).error());
  drop_regions_without_segments();
  return id;
}

Result<void> SessionState::erase(AddressRange memory) {
  layout_.erase(memory);
  Result<void> published = publish_layout();
  drop_regions_without_segments();
  return published;
}

Result<void> SessionState::move(AddressRange from, Address to) {
  layout_.move(from, to, [&](RegionId region) {
    return regions_[region].page_size == kPage4K && regions_[region].sharing == SharingMode::none;
  });
  Result<void> published = publish_layout();
  drop_regions_without_segments();
  return published;
}

Result<void> SessionState::map_again(Address from, Address to) {
  const Segment* known = layout_.find(from);
  if (known == nullptr || known->region == kZeroRegion ||
      regions_[known->region].sharing != SharingMode::none)
    return {};
  Segment again = *known;
  again.first = known->granule_at(from);
  again.left_behind = false;
  again.memory = {to, std::min(known->memory.end() - from, kStateAddressEnd - to)};
  // Only a file can be mapped twice.
  layout_.settle(from, /*is_file=*/true);
  layout_.add_where_free(again);
  return publish_layout();
}

Result<void> SessionState::grow(const Segment& segment, Address end) {
  Segment behind = segment;
  behind.first = segment.granules().end();
  behind.left_behind = false;
  const ByteCount rest = regions_[segment.region].length - kPage4K.bytes(PageCount(behind.first.value));
  behind.memory = {segment.memory.end(), std::min(rest, end - segment.memory.end())};
  layout_.add_where_free(behind);
  return publish_layout();
}

Result<void> SessionState::settle(Address left_behind, bool is_file) {
  layout_.settle(left_behind, is_file);
  Result<void> published = publish_layout();
  drop_regions_without_segments();
  return published;
}

Result<void> SessionState::publish_layout() {
  const auto segments = layout_.segments();
  if (segments.size() > kSegmentsMax)
    return Failure(
        Error(fmt::format("the client has cut its memory into more than {} pieces", kSegmentsMax)));
  FileHeader& fields = header(head_);
  const std::uint32_t spare = 1 - active_layout_;
  FileSegment* list = layout_list(head_, spare);
  for (const Segment& segment : segments)
    *list++ = {.start = segment.memory.start.value,
               .length = segment.memory.length.value,
               .first = segment.first.value,
               .region = segment.region,
               .page_shift = static_cast<std::uint16_t>(segment.page_size.shift()),
               .left_behind = segment.left_behind};
  step();
  fields.segment_count[spare] = static_cast<std::uint32_t>(segments.size());
  step();
  active_layout_ = spare;
  publish_progress();
  step();
  return {};
}

void SessionState::publish_progress() {
  publish(header(head_).progress, std::uint64_t{unapplied_} << 1 | active_layout_);
}

// ---- messages ---------------------------------------------------------------------------------------------

[[gnu::hot]] std::span<abi::Msg> SessionState::empty_inbox() {
  abi::Msg* slots = inbox_slots(head_);
  // What another has written may have empty slots between.
  std::size_t filled = inbox_is_own_ ? 0 : kInboxMessages;
  inbox_is_own_ = true;
  while (filled < kInboxMessages && slots[filled].event != 0) ++filled;
  // From the last on: cut off here, the messages still end at the first empty slot. The events that are left
  // count as applied still.
  while (filled > 0) {
    publish(slots[--filled].event, std::uint8_t{0});
    step();
  }
  if (unapplied_ != 0) {
    unapplied_ = 0;
    publish_progress();
  }
  return {slots, kInboxMessages};
}

Result<std::string> SessionState::image_of(int file) {
  if (auto sealed = check_sealed(file); !sealed) return Failure(std::move(sealed).error());
  FileHeader fields;
  if (::pread(file, &fields, sizeof fields, 0) != sizeof fields) return Failure(damaged("it is not one"));
  if (auto sane = check(fields); !sane) return Failure(std::move(sane).error());
  return std::string(fields.image.data(), fields.image_bytes);
}

std::vector<int> SessionState::forks_in_inbox(int file) {
  std::uint64_t progress = 0;
  std::array<abi::Msg, kInboxMessages> messages;
  std::vector<int> forks;
  if (::pread(file, &progress, sizeof progress, offsetof(FileHeader, progress)) != sizeof progress ||
      ::pread(file, messages.data(), sizeof messages, kInboxAt) != sizeof messages)
    return forks;
  for (std::size_t i = progress >> 1; i < messages.size() && messages[i].event != 0; ++i)
    if (messages[i].event == abi::kEventFork) forks.push_back(static_cast<int>(messages[i].arg.fork.ufd));
  return forks;
}

std::span<const abi::Msg> SessionState::inbox() const {
  return {inbox_slots(head_), kInboxMessages};
}

void SessionState::drop_regions_without_segments() {
  std::vector<bool> used(regions_.size());
  for (const Segment& segment : layout_.segments())
    if (segment.region != kZeroRegion) used[segment.region] = true;
  for (RegionId id = 0; id < regions_.size(); ++id) {
    if (used[id] || !regions_[id].live) continue;
    publish(region_records(head_)[id].live, std::uint32_t{0});
    step();
    // Frees memory early; if it fails, the session's end frees it.
    (void)::fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
                      static_cast<off_t>(table_at_[id]), static_cast<off_t>(table_memory_[id].size()));
    regions_[id] = RegionRecord();
    tables_[id] = PageTable();
    table_memory_[id] = StateMapping();
  }
}

}  // namespace uffdkit
