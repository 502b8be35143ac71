// The bytes of a compressed image, to values and back: docs/image-format.md.
//
// Pure: no files, no threads. Decoding is total: any bytes give a value or an Error that says what is wrong
// and where, and nothing is allocated that is not paid for by bytes of the input.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/units.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace uffdkit::image {

inline constexpr std::uint32_t kZstdMagic = 0xFD2FB528;
inline constexpr std::uint32_t kSeekTableMagic = 0x184D2A5E;
inline constexpr std::uint32_t kSeekFooterMagic = 0x8F92EAB1;
inline constexpr std::uint32_t kRecordFrameMagic = 0x184D2A5D;
inline constexpr std::size_t kSeekFooterBytes = 9;
inline constexpr std::size_t kSkippableHeaderBytes = 8;
// As many as the seekable format allows.
inline constexpr std::uint64_t kFramesMax = 0x8000000;
// What a frame may hold: the range that was measured (docs/decisions/0010-image-format.md). Powers of two.
inline constexpr std::uint32_t kFrameBytesMin = 16 * 1024;
inline constexpr std::uint32_t kFrameBytesMax = 256 * 1024;
inline constexpr std::uint32_t kFrameBytesDefault = 64 * 1024;
// A frame of zeros may be longer, since it is never decompressed to be served.
inline constexpr std::uint32_t kZeroFrameBytesMax = 1u << 30;
// Memory that an image can show: what an address space can have.
inline constexpr std::uint64_t kMemoryBytesMax = std::uint64_t{1} << 57;
inline constexpr std::size_t kParentNameMax = 255;  // NAME_MAX
inline constexpr std::uint64_t kPageBytes = 4096;
// Of a process whose memory is in the image: as many mappings as one may have, sixteen times over.
inline constexpr std::size_t kRegionsMax = 1u << 20;
inline constexpr std::size_t kRegionNameMax = 4096;  // PATH_MAX

// What a memory holds, as a number: see identity.h.
using Identity = std::array<std::byte, 16>;
std::string to_string(const Identity& identity);

// One frame of the stream.
struct FrameEntry {
  std::uint32_t compressed_bytes;
  std::uint32_t bytes;     // decompressed
  std::uint32_t checksum;  // the low half of XXH64 of the decompressed bytes
};

// Where the pages of a run are.
enum class PageKind : std::uint8_t { stored = 0, zero = 1, parent = 2 };

struct PageRun {
  std::uint64_t pages;
  PageKind kind;
  friend bool operator==(const PageRun&, const PageRun&) = default;
};

// Where a part of the memory lay in a process. Regions fill the memory from its start on without a gap.
struct Region {
  std::uint64_t address;  // a multiple of 4096
  std::uint64_t pages;
  std::uint32_t protection;  // PROT_READ 1, PROT_WRITE 2, PROT_EXEC 4
  std::string name;          // what /proc/PID/maps called it: a path, "[heap]", or nothing
  friend bool operator==(const Region&, const Region&) = default;
};

// What an image says of itself beside its frames.
struct Record {
  std::uint64_t raw_bytes = 0;    // of the memory that the image shows
  std::uint32_t frame_bytes = 0;  // of every frame but the last and those of zeros
  Identity identity{};            // of the memory that the image shows
  bool is_diff = false;
  Identity parent{};        // of a diff
  std::string parent_name;  // likewise: a file in the same folder
  // All pages in order; neighbours differ in kind. In a whole image no run is `parent`.
  std::vector<PageRun> runs;
  // Of an image of a process: where its pages lay. Otherwise empty.
  std::vector<Region> regions;

  std::uint64_t pages() const { return (raw_bytes + kPageBytes - 1) / kPageBytes; }
};

struct Contents {
  Record record;
  std::vector<FrameEntry> frames;
};

// ---- writing --------------------------------------------------------------------------------------------

std::vector<std::byte> encode_seek_table(std::span<const FrameEntry> frames);
// `seek_table` is the encoded one, whose hash the record keeps. `before` bytes come before the record: it is
// padded so that the file's length is no multiple of a page's.
// Errors: the maps do not fit into a skippable frame, which has 4 GiB.
Result<std::vector<std::byte>> encode_record(const Record& record, std::span<const std::byte> seek_table,
                                             std::uint64_t before);
// What a frame's entry has of its bytes.
std::uint32_t checksum_of(std::span<const std::byte> bytes);
std::uint32_t checksum_of_zeros(std::uint32_t bytes);
// A zstd frame of so many zeros: 4 bytes for each 128 KiB.
std::vector<std::byte> encode_zero_frame(std::uint32_t bytes);
// A parent's name: a file in the same folder, by its name alone.
Result<void> check_parent_name(const std::string& name);

// ---- reading --------------------------------------------------------------------------------------------

// Whether a file that begins like this, of this length, is raw memory, an image of ours, or neither. A guest
// writes what it likes to the first bytes of its memory, but cannot change its length: memory is whole pages,
// and images are never. `ambiguous`: an image that was cut short to whole pages, compressed data of another
// program, or memory that looks like it.
enum class Kind : std::uint8_t { raw, compressed, ambiguous };
Kind kind_of(std::span<const std::byte> first_bytes, std::uint64_t file_bytes);

// The length of the seek table's frame, from the last 9 bytes of a file of `file_bytes`.
Result<std::uint64_t> decode_footer(std::span<const std::byte, kSeekFooterBytes> footer,
                                    std::uint64_t file_bytes);
// The length of the record's frame, from the last 8 bytes before the seek table, which begins at `end`.
Result<std::uint64_t> decode_record_length(std::span<const std::byte, 8> tail, std::uint64_t end);
// All of it, from both frames, which lie one behind the other in a file of `file_bytes`. Everything is
// checked that can be without decompressing.
Result<Contents> decode_contents(std::span<const std::byte> record, std::span<const std::byte> seek_table,
                                 std::uint64_t file_bytes);

}  // namespace uffdkit::image
