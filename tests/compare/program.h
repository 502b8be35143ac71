// Random programs of operations on memory and userfaultfds, as values that can be printed and shortened.
//
// A program runs on a machine with a target process of three threads and an agent, a manager that shares its
// descriptors, an arena of small pages and one of huge pages. Threads 3 and 4 appear with forked children.
#pragma once

#include <uffdkit/sim.h>

#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace uffdkit::differential {

inline constexpr std::uint64_t kArena = 0x200000000000;        // small pages, all below one page table
inline constexpr std::uint64_t kHugeArena = 0x200040000000;    // huge pages
inline constexpr std::uint64_t kAnchor = kArena + 511 * 4096;  // a page that keeps that page table there
inline constexpr std::uint64_t kHugeAnchor = kHugeArena + 511 * (2ull << 20);  // likewise, a small page
inline constexpr int kAreas = 4;  // places for areas of small pages
inline constexpr int kHugeAreas = 2;
inline constexpr std::uint64_t kAreaPages = 12;  // of each place; holes of 4 pages between them
inline constexpr std::uint64_t kAreaStride = 16;
inline constexpr std::uint64_t kHugeAreaPages = 2;
inline constexpr std::uint64_t kHugeAreaStride = 3;
inline constexpr int kThreads = 3;   // of the target
inline constexpr int kChildren = 2;  // at most, of one thread each
inline constexpr int kSlots = kThreads + kChildren;
inline constexpr int kUffds = 4;  // at most, with those of children

constexpr std::uint64_t area_start(int place) {
  return place < kAreas
             ? kArena + static_cast<std::uint64_t>(place) * kAreaStride * 4096
             : kHugeArena + static_cast<std::uint64_t>(place - kAreas) * kHugeAreaStride * (2u << 20);
}

enum class Verb : std::uint8_t {
  map,
  create,
  reg,
  unregister,
  wake,
  copy,
  zeropage,
  resume,
  poison,
  writeprotect,
  move,
  scan,
  access,
  advise,
  unmap,
  remap,
  protect,
  fork,
  signal,
  read,
  poll,
  file_write,
  punch,
  truncate,
  close,
  kill,
  dump,
};

// One operation; which fields count depends on the verb.
struct Operation {
  Verb verb;
  int uffd = 0;
  int thread = 0;
  int place = 0;
  sim::Memory memory = sim::Memory::anonymous;
  std::uint64_t start = 0;
  std::uint64_t length = 0;
  std::uint64_t mode = 0;   // of ioctls; features of create; Advice
  std::uint64_t other = 0;  // MOVE's source, mremap's target; flags of create
  std::uint64_t new_length = 0;
  std::uint8_t value = 0;  // what is written or copied
  // scan: flags are in mode, the size of the vector in value, max_pages in new_length.
  std::uint64_t mask = 0;
  std::uint64_t inverted = 0;
  std::uint64_t any_of = 0;
  std::uint64_t report = 0;
  bool write = false;
  bool kernel_mode = false;
  bool by_target = false;   // the ioctl is made by the target itself, not by the manager
  bool bad_source = false;  // COPY: only the first page of the source can be read
  bool all = false;         // read: everything, not one message
  bool readable = true;
  bool writable = true;
  bool may_move = false;
  bool dont_unmap = false;
  bool fixed = false;
};
using Program = std::vector<Operation>;

struct Limits {
  std::size_t operations = 30;
  bool huge = false;
};

Program random_program(std::mt19937_64& random, const Limits& limits);

// "copy(uffd 0, [area 0 + 2, 1 page), ...)".
std::string to_string(const Operation& operation);
std::string to_string(const Program& program);

}  // namespace uffdkit::differential
