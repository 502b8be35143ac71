#include "support/criu_checkpoint.h"

#include <fstream>
#include <stdexcept>

namespace uffdkit::test {
namespace {

void append_u32(std::string& text, std::uint32_t value) {
  for (int i = 0; i < 4; ++i) text += static_cast<char>(value >> (8 * i) & 0xff);
}

}  // namespace

void ProtoWriter::varint(std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) text_ += static_cast<char>((value & 0x7f) | 0x80);
  text_ += static_cast<char>(value);
}

ProtoWriter& ProtoWriter::number(std::uint32_t field, std::uint64_t value) {
  varint(field << 3);
  varint(value);
  return *this;
}

ProtoWriter& ProtoWriter::bytes(std::uint32_t field, std::string_view value) {
  varint(field << 3 | 2);
  varint(value.size());
  text_ += value;
  return *this;
}

std::string criu_image(std::vector<std::uint32_t> magics, const std::vector<std::string>& records) {
  std::string text;
  for (const std::uint32_t magic : magics) append_u32(text, magic);
  for (const std::string& record : records) {
    append_u32(text, static_cast<std::uint32_t>(record.size()));
    text += record;
  }
  return text;
}

std::string criu_inventory() {
  return criu_image({kCriuInventory}, {ProtoWriter().number(1, 2).number(2, 1).bytes(5, "ignored").text()});
}

std::string criu_pstree(const std::vector<std::int32_t>& pids) {
  std::vector<std::string> records;
  for (const std::int32_t pid : pids) {
    const auto number = static_cast<std::uint64_t>(pid);
    records.push_back(
        ProtoWriter().number(1, number).number(2, 1).number(3, 1).number(4, 1).number(5, number).text());
  }
  return criu_image({kCriuCommonMagic, kCriuPstree}, records);
}

std::string criu_pagemap(std::uint32_t pages_id, const std::vector<CriuEntry>& entries) {
  std::vector<std::string> records = {ProtoWriter().number(1, pages_id).text()};
  for (const CriuEntry& entry : entries)
    records.push_back(ProtoWriter()
                          .number(1, entry.address.value)
                          .number(2, 0)
                          .number(4, entry.flags)
                          .number(5, entry.pages.value)
                          .text());
  return criu_image({kCriuCommonMagic, kCriuPagemap}, records);
}

std::string criu_old_pagemap(std::uint32_t pages_id, const std::vector<CriuEntry>& entries) {
  std::vector<std::string> records = {ProtoWriter().number(1, pages_id).text()};
  for (const CriuEntry& entry : entries) {
    ProtoWriter record;
    record.number(1, entry.address.value).number(2, entry.pages.value);
    if ((entry.flags & kCriuParent) != 0) record.number(3, 1);
    records.push_back(record.text());
  }
  return criu_image({kCriuCommonMagic, kCriuPagemap}, records);
}

std::string criu_mm(const std::vector<CriuVma>& vmas) {
  ProtoWriter mm;
  mm.number(1, 0x400000).bytes(13, "saved auxv");
  for (const CriuVma& vma : vmas)
    mm.bytes(14, ProtoWriter()
                     .number(1, vma.memory.start.value)
                     .number(2, vma.memory.end().value)
                     .number(3, 0)
                     .number(5, 3)
                     .number(6, vma.flags)
                     .number(7, vma.status)
                     .number(8, ~std::uint64_t{0})
                     .text());
  return criu_image({kCriuCommonMagic, kCriuMm}, {mm.text()});
}

void write_file(const std::string& path, std::string_view bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

}  // namespace uffdkit::test
