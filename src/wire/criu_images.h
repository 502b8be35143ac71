// The files of a CRIU checkpoint that say where the memory of its tasks is: read, checked, never written.
//
// Of criu 4.2 and of older versions, which lacked a few fields. A file is a container of protocol buffers
// records; of each only the fields that matter here are looked at, the others are skipped. Reading is total:
// whatever the bytes are, the answer is a value or an error that names the file, the place and what is wrong,
// and it takes memory in proportion to what the file holds, never to what it claims. Threads: none; the
// values are plain. docs/criu.md says how these files are used, docs/decisions/0007-criu-images.md why no
// library reads them.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace uffdkit::criu {

// The longest record that is read. The longest that criu writes are those of mm-PID.img: about 60 bytes for
// each of at most vm.max_map_count mappings.
inline constexpr std::size_t kRecordBytesMax = 64u << 20;
// The end of user addresses on machines with 5-level page tables, the widest there are.
inline constexpr Address kAddressEnd{std::uint64_t{1} << 56};

// ---- protocol buffers -------------------------------------------------------------------------------------

// One field of a message. https://protobuf.dev/programming-guides/encoding
struct ProtoField {
  std::uint32_t number;
  bool is_bytes;                     // a length-delimited field: `bytes` counts; else `value`
  std::uint64_t value;               // a varint, or a fixed 32 or 64 bit number
  std::span<const std::byte> bytes;  // in the message
  std::size_t at;                    // where in the message the field starts
};

// Takes a message apart, field by field. Groups, which no image has, are an error.
class ProtoReader {
 public:
  // `message` outlives the reader and the fields.
  explicit ProtoReader(std::span<const std::byte> message) : message_(message) {}

  // The next field; nothing at the end. After an error the reader is of no use.
  Result<std::optional<ProtoField>> next();

 private:
  Result<std::uint64_t> varint();
  Result<std::span<const std::byte>> take(std::uint64_t count);

  std::span<const std::byte> message_;
  std::size_t position_ = 0;
};

// ---- containers -------------------------------------------------------------------------------------------

// What kind of image a file is: its magic number.
enum class ImageKind : std::uint32_t {
  inventory = 0x58313116,
  pstree = 0x50273030,
  pagemap = 0x56084025,
  mm = 0x57492820,
};

// One record. Its bytes stay until the next is read.
struct Record {
  std::span<const std::byte> bytes;
  std::uint64_t at;  // where in the file they start
};

// The records of an image file, one after another.
class ImageFile {
 public:
  // `name` is for messages. Errors: not a regular file; another magic number than that of `kind`.
  static Result<ImageFile> open(UniqueFd fd, std::string name, ImageKind kind);

  // The next record; nothing at the end of the file. Errors: the file ends within a record; a record longer
  // than kRecordBytesMax; the disk.
  Result<std::optional<Record>> next();

  // "NAME at byte N: WHAT".
  Error error_at(std::uint64_t at, const std::string& what) const;

 private:
  ImageFile(UniqueFd fd, std::string name, std::uint64_t bytes)
      : fd_(std::move(fd)), name_(std::move(name)), file_bytes_(bytes) {}
  Result<std::uint32_t> number();
  // The next `count` bytes, which lie within the file.
  Result<std::span<const std::byte>> take(std::size_t count);

  UniqueFd fd_;
  std::string name_;
  std::uint64_t file_bytes_;
  std::uint64_t position_ = 0;     // of what is taken next
  std::vector<std::byte> buffer_;  // what has been read
  std::size_t buffer_at_ = 0;      // of what is taken next, in the buffer
};

// ---- what the files say -----------------------------------------------------------------------------------

// A mapping of a task's.
struct Vma {
  AddressRange memory;
  std::uint32_t flags;   // MAP_..., mmap(2)
  std::uint32_t status;  // bits of criu's own

  // Whether a lazy restore registers it: private anonymous memory that is neither locked nor huge.
  bool can_be_lazy() const;
};

// A run of pages of a task's that have a common fate.
struct PagemapRun {
  AddressRange memory;
  StoreOffset offset;  // in the pages file, if `present`
  bool in_parent;      // the bytes are in the checkpoint before this one
  bool lazy;           // left to whoever serves the page faults
  bool present;        // the bytes are in the pages file
};

struct Pagemap {
  std::uint32_t pages_id = 0;    // of pages-ID.img
  std::vector<PagemapRun> runs;  // by address, none overlapping; neighbours of a kind are one
};

// inventory.img: whether this is a checkpoint that can be read. Errors: one of an unknown format.
Result<void> check_inventory(ImageFile& file);
// pstree.img: the tasks' process numbers, in their own namespace; threads are not tasks.
Result<std::vector<std::int32_t>> read_pstree(ImageFile& file);
// pagemap-PID.img. Errors, besides those of records: no head; addresses or lengths that are no pages,
// overlap, or are out of order.
Result<Pagemap> read_pagemap(ImageFile& file);
// mm-PID.img: the mappings by address. Errors likewise.
Result<std::vector<Vma>> read_vmas(ImageFile& file);

// ---- directories ------------------------------------------------------------------------------------------

// The directory of one checkpoint. Several can be open, and be read by several at a time.
class ImageDirectory {
 public:
  static Result<ImageDirectory> open(const std::string& path);

  const std::string& path() const { return path_; }
  // Checks the inventory, then reads the process tree.
  Result<std::vector<std::int32_t>> tasks() const;
  Result<Pagemap> pagemap(std::int32_t pid) const;
  Result<std::vector<Vma>> vmas(std::int32_t pid) const;
  // The pages of `pages_id`, and what to call them.
  std::string pages_name(std::uint32_t pages_id) const;
  Result<UniqueFd> open_pages(std::uint32_t pages_id) const;
  // The checkpoint before this one, on which it builds (the link `parent`); nothing if there is none.
  Result<std::optional<ImageDirectory>> parent() const;

 private:
  ImageDirectory(UniqueFd fd, std::string path) : fd_(std::move(fd)), path_(std::move(path)) {}
  Result<ImageFile> image(const std::string& name, ImageKind kind) const;

  UniqueFd fd_;
  std::string path_;
};

}  // namespace uffdkit::criu
