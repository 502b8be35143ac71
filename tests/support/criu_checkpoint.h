// Image files of a CRIU checkpoint, made from nothing: for readers, and for the stand-in restorer.
#pragma once

#include <uffdkit/units.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace uffdkit::test {

// Writes a protocol buffers message.
class ProtoWriter {
 public:
  ProtoWriter& number(std::uint32_t field, std::uint64_t value);
  ProtoWriter& bytes(std::uint32_t field, std::string_view value);
  const std::string& text() const { return text_; }

 private:
  void varint(std::uint64_t value);
  std::string text_;
};

inline constexpr std::uint32_t kCriuCommonMagic = 0x54564319;
inline constexpr std::uint32_t kCriuInventory = 0x58313116;
inline constexpr std::uint32_t kCriuPstree = 0x50273030;
inline constexpr std::uint32_t kCriuPagemap = 0x56084025;
inline constexpr std::uint32_t kCriuMm = 0x57492820;

// An image file's bytes: its magic numbers, then the records.
std::string criu_image(std::vector<std::uint32_t> magics, const std::vector<std::string>& records);

// Flags of an entry of a page map.
inline constexpr std::uint32_t kCriuParent = 1;
inline constexpr std::uint32_t kCriuLazy = 2;
inline constexpr std::uint32_t kCriuPresent = 4;

struct CriuEntry {
  Address address;
  PageCount pages;
  std::uint32_t flags;
};
struct CriuVma {
  AddressRange memory;
  std::uint32_t flags = 0x22;    // private, anonymous
  std::uint32_t status = 0x201;  // likewise, as criu says it
};

std::string criu_inventory();
std::string criu_pstree(const std::vector<std::int32_t>& pids);
std::string criu_pagemap(std::uint32_t pages_id, const std::vector<CriuEntry>& entries);
// As versions before 3.0 wrote it, which knew neither lazy pages nor fields 4 and 5.
std::string criu_old_pagemap(std::uint32_t pages_id, const std::vector<CriuEntry>& entries);
std::string criu_mm(const std::vector<CriuVma>& vmas);

void write_file(const std::string& path, std::string_view bytes);

}  // namespace uffdkit::test
