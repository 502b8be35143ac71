#include "image/format.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include "base/check.h"
#include "image/numbers.h"
#include "image/varint.h"

namespace uffdkit::image {
namespace {

constexpr std::uint64_t kRecordMagic = 0x31'74'69'6b'64'66'66'75;  // "uffdkit1"
constexpr std::uint32_t kTailMagic = 0x54'44'46'55;                // "UFDT"
constexpr std::size_t kFixedBytes = 88;                            // of the record, before name and runs
constexpr std::size_t kTailBytes = 16;                             // hash, length, magic
// What compressing may add to a frame: ZSTD_COMPRESSBOUND, and room for other headers.
constexpr std::uint64_t kExpansionMax = 1024;
constexpr std::uint32_t kBlockBytes = 128 * 1024;  // of a zstd frame of zeros
constexpr std::uint8_t kChecksumFlag = 0x80;

Failure damaged(const std::string& what) {
  return Failure(
      Error(what, EBADMSG)
          .with_remedy("the image is damaged or was cut short: restore it from a copy, or make it again"));
}

Result<std::vector<PageRun>> decode_runs(std::span<const std::byte> bytes, const Record& record) {
  std::vector<PageRun> runs;
  std::uint64_t pages = 0;
  while (!bytes.empty()) {
    std::uint64_t number = 0;
    if (!take_varint(bytes, number)) return damaged("the page map ends within a number");
    const std::uint64_t count = number >> 2;
    const auto kind = static_cast<PageKind>(number & 3);
    if ((number & 3) > (record.is_diff ? 2u : 1u))
      return damaged(
          fmt::format("run {} of the page map is of the unknown kind {}", runs.size(), number & 3));
    if (count == 0 || count > record.pages() - pages)
      return damaged(fmt::format("run {} of the page map has {} pages, where {} are left of the memory",
                                 runs.size(), count, record.pages() - pages));
    if (!runs.empty() && runs.back().kind == kind)
      return damaged(fmt::format("run {} of the page map continues the one before", runs.size()));
    runs.push_back({.pages = count, .kind = kind});
    pages += count;
  }
  if (pages != record.pages())
    return damaged(fmt::format("the page map has {} pages, and the memory {}", pages, record.pages()));
  return runs;
}

void put_regions(std::vector<std::byte>& to, std::span<const Region> regions) {
  for (const Region& region : regions) {
    put_varint(to, region.address / kPageBytes);
    put_varint(to, region.pages);
    put_varint(to, region.protection);
    put_varint(to, region.name.size());
    const auto name = std::as_bytes(std::span(region.name));
    to.insert(to.end(), name.begin(), name.end());
  }
}

Result<std::vector<Region>> decode_regions(std::span<const std::byte> bytes, const Record& record) {
  std::vector<Region> regions;
  std::uint64_t pages = 0;
  while (!bytes.empty()) {
    std::uint64_t page = 0;
    Region region{};
    std::uint64_t protection = 0;
    std::uint64_t name_bytes = 0;
    if (!take_varint(bytes, page) || !take_varint(bytes, region.pages) || !take_varint(bytes, protection) ||
        !take_varint(bytes, name_bytes) || name_bytes > bytes.size())
      return damaged(fmt::format("region {} of the record is cut short", regions.size()));
    if (regions.size() == kRegionsMax || name_bytes > kRegionNameMax || protection > 7 ||
        page > UINT64_MAX / kPageBytes)
      return damaged(fmt::format("region {} of the record is none that a process can have", regions.size()));
    if (region.pages == 0 || region.pages > record.pages() - pages)
      return damaged(fmt::format("region {} of the record has {} pages, where {} are left of the memory",
                                 regions.size(), region.pages, record.pages() - pages));
    pages += region.pages;
    region.address = page * kPageBytes;
    region.protection = static_cast<std::uint32_t>(protection);
    region.name.assign(reinterpret_cast<const char*>(bytes.data()), name_bytes);
    bytes = bytes.subspan(name_bytes);
    regions.push_back(std::move(region));
  }
  if (!regions.empty() && pages != record.pages())
    return damaged(
        fmt::format("the record's regions have {} pages, and the memory {}", pages, record.pages()));
  return regions;
}

Result<Record> decode_record(std::span<const std::byte> frame, std::span<const std::byte> seek_table) {
  if (frame.size() < kSkippableHeaderBytes + kFixedBytes + kTailBytes)
    return damaged(fmt::format("the record is too short: {} bytes", frame.size()));
  if (get<std::uint32_t>(frame, 0) != kRecordFrameMagic ||
      get<std::uint32_t>(frame, 4) != frame.size() - kSkippableHeaderBytes)
    return damaged("the record does not begin where it should");
  const std::size_t tail = frame.size() - kTailBytes;
  if (get<std::uint32_t>(frame, tail + 8) != frame.size() ||
      get<std::uint32_t>(frame, tail + 12) != kTailMagic)
    return damaged("the record does not end where it should");
  if (get<std::uint64_t>(frame, tail) != XXH64(frame.data(), tail, 0))
    return damaged("the record's checksum is wrong");
  const std::span<const std::byte> body = frame.subspan(kSkippableHeaderBytes, tail - kSkippableHeaderBytes);
  if (get<std::uint64_t>(body, 0) != kRecordMagic)
    return Failure(Error("the image was made by another program, or by a newer uffdkit", ENOTSUP)
                       .with_remedy("make it again by this version: uffdkit image convert --zstd"));
  if (get<std::uint64_t>(body, 8) != XXH64(seek_table.data(), seek_table.size(), 0))
    return damaged("the seek table is not the one that the record was made for");

  Record record;
  record.raw_bytes = get<std::uint64_t>(body, 16);
  record.frame_bytes = get<std::uint32_t>(body, 24);
  const auto kind = get<std::uint32_t>(body, 28);
  const auto name_bytes = get<std::uint32_t>(body, 32);
  const auto region_bytes = get<std::uint32_t>(body, 36);
  const auto map_bytes = get<std::uint64_t>(body, 40);
  std::memcpy(record.identity.data(), body.data() + 48, record.identity.size());
  std::memcpy(record.parent.data(), body.data() + 64, record.parent.size());
  record.is_diff = kind == 1;
  if (kind > 1) return damaged(fmt::format("unknown kind of image {}", kind));
  if (record.raw_bytes == 0 || record.raw_bytes > kMemoryBytesMax)
    return damaged(fmt::format("a memory of {} bytes", record.raw_bytes));
  if (record.frame_bytes < kFrameBytesMin || record.frame_bytes > kFrameBytesMax ||
      !std::has_single_bit(record.frame_bytes))
    return damaged(fmt::format("frames of {} bytes", record.frame_bytes));
  const std::span<const std::byte> rest = body.subspan(kFixedBytes);
  if (name_bytes > kParentNameMax || name_bytes > rest.size() || map_bytes > rest.size() - name_bytes ||
      region_bytes > rest.size() - name_bytes - map_bytes)
    return damaged("the record's parts are longer than the record");
  const std::span<const std::byte> padding = rest.subspan(name_bytes + map_bytes + region_bytes);
  if (padding.size() > 1 || (padding.size() == 1 && padding[0] != std::byte{0}) ||
      get<std::uint64_t>(body, 80) != 0)
    return damaged("the record has bytes that nothing accounts for");
  record.parent_name.assign(reinterpret_cast<const char*>(rest.data()), name_bytes);
  if (record.is_diff) {
    if (auto good = check_parent_name(record.parent_name); !good) return Failure(std::move(good).error());
  } else if (name_bytes != 0 || record.parent != Identity{}) {
    return damaged("a whole image names a parent");
  }
  Result<std::vector<PageRun>> runs = decode_runs(rest.subspan(name_bytes, map_bytes), record);
  if (!runs) return Failure(std::move(runs).error());
  record.runs = std::move(*runs);
  Result<std::vector<Region>> regions =
      decode_regions(rest.subspan(name_bytes + map_bytes, region_bytes), record);
  if (!regions) return Failure(std::move(regions).error());
  record.regions = std::move(*regions);
  return record;
}

Result<std::vector<FrameEntry>> decode_seek_table(std::span<const std::byte> frame) {
  if (frame.size() < kSkippableHeaderBytes + kSeekFooterBytes ||
      get<std::uint32_t>(frame, 0) != kSeekTableMagic ||
      get<std::uint32_t>(frame, 4) != frame.size() - kSkippableHeaderBytes)
    return damaged("the seek table does not begin where it should");
  const std::size_t count = (frame.size() - kSkippableHeaderBytes - kSeekFooterBytes) / sizeof(FrameEntry);
  std::vector<FrameEntry> frames(count);
  if (count != 0)
    std::memcpy(frames.data(), frame.data() + kSkippableHeaderBytes, count * sizeof(FrameEntry));
  return frames;
}

// Whether the frames are what the record says: they end where the record begins, and hold exactly the stream.
Result<void> check_frames(const Record& record, std::span<const FrameEntry> frames,
                          std::uint64_t data_bytes) {
  std::uint64_t stored_pages = 0;
  for (const PageRun& run : record.runs)
    if (run.kind == PageKind::stored) stored_pages += run.pages;
  const std::uint64_t stream_bytes = record.is_diff ? stored_pages * kPageBytes : record.raw_bytes;
  std::uint64_t at = 0;
  std::uint64_t stream = 0;
  auto run = record.runs.begin();
  std::uint64_t run_start = 0;
  for (std::size_t i = 0; i < frames.size(); ++i) {
    const FrameEntry& frame = frames[i];
    if (frame.bytes == 0 || frame.bytes > stream_bytes - stream)
      return damaged(
          fmt::format("frame {} has {} bytes, where {} are left", i, frame.bytes, stream_bytes - stream));
    if (frame.compressed_bytes == 0) return damaged(fmt::format("frame {} takes no bytes", i));
    if (frame.compressed_bytes > data_bytes - at)
      return damaged(fmt::format("frame {} ends behind the data", i));
    if (frame.bytes > record.frame_bytes) {
      if (record.is_diff || frame.bytes > kZeroFrameBytesMax)
        return damaged(fmt::format("frame {} has {} bytes, more than a frame may have", i, frame.bytes));
      while (run != record.runs.end() && run_start + run->pages * kPageBytes <= stream) {
        run_start += run->pages * kPageBytes;
        ++run;
      }
      if (run == record.runs.end() || run->kind != PageKind::zero ||
          stream + frame.bytes > run_start + run->pages * kPageBytes)
        return damaged(fmt::format("frame {} has {} bytes, and is not all zero", i, frame.bytes));
    } else if (frame.compressed_bytes > frame.bytes + frame.bytes / 128 + kExpansionMax) {
      return damaged(
          fmt::format("frame {} has {} bytes for {} of memory", i, frame.compressed_bytes, frame.bytes));
    }
    stream += frame.bytes;
    at += frame.compressed_bytes;
  }
  if (stream != stream_bytes)
    return damaged(fmt::format("the frames have {} bytes, where {} belong", stream, stream_bytes));
  if (at != data_bytes)
    return damaged(fmt::format("the frames end at byte {}, and the record begins at {}", at, data_bytes));
  return {};
}

}  // namespace

std::string to_string(const Identity& identity) {
  std::string text;
  for (const std::byte byte : identity) text += fmt::format("{:02x}", std::to_integer<unsigned>(byte));
  return text;
}

std::vector<std::byte> encode_seek_table(std::span<const FrameEntry> frames) {
  std::vector<std::byte> to;
  to.reserve(frames.size_bytes() + kSkippableHeaderBytes + kSeekFooterBytes);
  put(to, kSeekTableMagic);
  put(to, static_cast<std::uint32_t>(frames.size_bytes() + kSeekFooterBytes));
  const auto bytes = std::as_bytes(frames);
  to.insert(to.end(), bytes.begin(), bytes.end());
  put(to, static_cast<std::uint32_t>(frames.size()));
  put(to, kChecksumFlag);
  put(to, kSeekFooterMagic);
  return to;
}

Result<std::vector<std::byte>> encode_record(const Record& record, std::span<const std::byte> seek_table,
                                             std::uint64_t before) {
  std::vector<std::byte> map;
  for (const PageRun& run : record.runs)
    put_varint(map, run.pages << 2 | static_cast<std::uint64_t>(run.kind));
  std::vector<std::byte> regions;
  put_regions(regions, record.regions);
  std::size_t bytes = kSkippableHeaderBytes + kFixedBytes + record.parent_name.size() + map.size() +
                      regions.size() + kTailBytes;
  const bool pad = (before + bytes + seek_table.size()) % kPageBytes == 0;
  bytes += pad ? 1 : 0;
  if (bytes > UINT32_MAX)
    return Failure(Error("the map of zero and stored pages takes more than 4 GiB", EFBIG)
                       .with_remedy("cut the memory into several images"));

  std::vector<std::byte> to;
  to.reserve(bytes);
  put(to, kRecordFrameMagic);
  put(to, static_cast<std::uint32_t>(bytes - kSkippableHeaderBytes));
  put(to, kRecordMagic);
  put(to, std::uint64_t{XXH64(seek_table.data(), seek_table.size(), 0)});
  put(to, record.raw_bytes);
  put(to, record.frame_bytes);
  put(to, std::uint32_t{record.is_diff ? 1u : 0u});
  put(to, static_cast<std::uint32_t>(record.parent_name.size()));
  put(to, static_cast<std::uint32_t>(regions.size()));
  put(to, std::uint64_t{map.size()});
  to.insert(to.end(), record.identity.begin(), record.identity.end());
  to.insert(to.end(), record.parent.begin(), record.parent.end());
  put(to, std::uint64_t{0});
  const auto name = std::as_bytes(std::span(record.parent_name));
  to.insert(to.end(), name.begin(), name.end());
  to.insert(to.end(), map.begin(), map.end());
  to.insert(to.end(), regions.begin(), regions.end());
  if (pad) to.push_back(std::byte{0});
  put(to, std::uint64_t{XXH64(to.data(), to.size(), 0)});
  put(to, static_cast<std::uint32_t>(bytes));
  put(to, kTailMagic);
  CHECK(to.size() == bytes);
  return to;
}

std::uint32_t checksum_of(std::span<const std::byte> bytes) {
  return static_cast<std::uint32_t>(XXH64(bytes.data(), bytes.size(), 0));
}

std::uint32_t checksum_of_zeros(std::uint32_t bytes) {
  static constinit std::array<std::byte, std::size_t{64} * 1024>
      zeros{};  // not constant: the program's file would hold it
  const auto compute = [](std::uint32_t left) {
    const std::unique_ptr<XXH64_state_t, decltype(&XXH64_freeState)> state(XXH64_createState(),
                                                                           &XXH64_freeState);
    CHECK(state != nullptr);
    XXH64_reset(state.get(), 0);
    for (; left > 0; left -= std::min<std::uint32_t>(left, zeros.size()))
      XXH64_update(state.get(), zeros.data(), std::min<std::size_t>(left, zeros.size()));
    return static_cast<std::uint32_t>(XXH64_digest(state.get()));
  };
  if (bytes != kZeroFrameBytesMax) return compute(bytes);
  static const std::uint32_t of_the_longest = compute(kZeroFrameBytesMax);
  return of_the_longest;
}

std::vector<std::byte> encode_zero_frame(std::uint32_t bytes) {
  CHECK(bytes > 0 && bytes <= kZeroFrameBytesMax);
  std::vector<std::byte> to;
  put(to, kZstdMagic);
  put(to, std::uint8_t{0x80});     // the contents' size has 4 bytes; no checksum, no dictionary
  put(to, std::uint8_t{7u << 3});  // a window of 128 KiB, so that no reader refuses a large frame
  put(to, bytes);
  while (bytes > 0) {
    const std::uint32_t block = std::min(bytes, kBlockBytes);
    bytes -= block;
    const std::uint32_t header = block << 3 | 1u << 1 | (bytes == 0 ? 1u : 0u);  // one byte, repeated
    for (unsigned i = 0; i < 3; ++i) to.push_back(static_cast<std::byte>(header >> (8 * i)));
    to.push_back(std::byte{0});
  }
  return to;
}

Result<void> check_parent_name(const std::string& name) {
  const bool good = !name.empty() && name.size() <= kParentNameMax && name != "." && name != ".." &&
                    name.find('/') == std::string::npos && name.find('\0') == std::string::npos;
  if (good) return {};
  return Failure(Error("the parent's name is not that of a file in the image's own folder", EINVAL)
                     .with_remedy("keep an image and its parents in one folder"));
}

Kind kind_of(std::span<const std::byte> first_bytes, std::uint64_t file_bytes) {
  if (first_bytes.size() < 4) return Kind::raw;
  // A diff that stores nothing begins with its record.
  const auto magic = get<std::uint32_t>(first_bytes, 0);
  if (magic != kZstdMagic && magic != kRecordFrameMagic) return Kind::raw;
  return file_bytes % kPageBytes == 0 ? Kind::ambiguous : Kind::compressed;
}

Result<std::uint64_t> decode_footer(std::span<const std::byte, kSeekFooterBytes> footer,
                                    std::uint64_t file_bytes) {
  if (get<std::uint32_t>(footer, 5) != kSeekFooterMagic)
    return Failure(
        Error("it begins as zstd does, and does not end with a seek table", EBADMSG)
            .with_remedy("if it was cut short, restore it; if another program compressed it: uffdkit image "
                         "convert --zstd"));
  if (get<std::uint8_t>(footer, 4) != kChecksumFlag)
    return damaged("the seek table has no checksums, or unknown flags");
  const std::uint64_t count = get<std::uint32_t>(footer, 0);
  const std::uint64_t bytes = kSkippableHeaderBytes + count * sizeof(FrameEntry) + kSeekFooterBytes;
  if (count > kFramesMax || bytes > file_bytes)
    return damaged(fmt::format("a seek table of {} frames does not fit into the file", count));
  return bytes;
}

Result<std::uint64_t> decode_record_length(std::span<const std::byte, 8> tail, std::uint64_t end) {
  const std::uint64_t bytes = get<std::uint32_t>(tail, 0);
  if (get<std::uint32_t>(tail, 4) != kTailMagic)
    return Failure(Error("there is no uffdkit record before the seek table", EBADMSG)
                       .with_remedy("it was made by another program: uffdkit image convert --zstd"));
  if (bytes < kSkippableHeaderBytes + kFixedBytes + kTailBytes || bytes > end)
    return damaged(fmt::format("a record of {} bytes is too short, or does not fit into the file", bytes));
  return bytes;
}

Result<Contents> decode_contents(std::span<const std::byte> record, std::span<const std::byte> seek_table,
                                 std::uint64_t file_bytes) {
  if (record.size() + seek_table.size() > file_bytes) return damaged("the tables are longer than the file");
  Result<std::vector<FrameEntry>> frames = decode_seek_table(seek_table);
  if (!frames) return Failure(std::move(frames).error());
  Result<Record> decoded = decode_record(record, seek_table);
  if (!decoded) return Failure(std::move(decoded).error());
  if (auto good = check_frames(*decoded, *frames, file_bytes - record.size() - seek_table.size()); !good)
    return Failure(std::move(good).error());
  return Contents{.record = std::move(*decoded), .frames = std::move(*frames)};
}

}  // namespace uffdkit::image
