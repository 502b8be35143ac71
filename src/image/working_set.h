// Which pages of an image its clients want, in the order of their first use, and what came of bringing these
// before they were asked for: the file beside the image, to a value and back. docs/working-sets.md says every
// byte.
//
// Pure but for read_working_set(), write_working_set() and identity_of(). Decoding is total: any bytes give a
// value or an Error, and no more is allocated than the largest working set takes. A working set is a hint:
// the bytes of pages never come from it, so that a wrong one costs time and nothing else.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "image/format.h"
#include "image/output_file.h"

namespace uffdkit::image {

// What the file's name ends with, behind the image's own.
inline constexpr const char* kWorkingSetSuffix = ".ws";
// Pages that a working set can have: 64 GiB.
inline constexpr std::uint64_t kWorkingSetPagesMax = 1u << 24;
// A page's number takes 32 bits: 16 TiB.
inline constexpr std::uint64_t kWorkingSetMemoryPagesMax = std::uint64_t{1} << 32;
// As many bytes as such a file may have.
inline constexpr std::uint64_t kWorkingSetFileBytesMax = 512 + 12 * kWorkingSetPagesMax;
// Runs that are remembered.
inline constexpr std::size_t kWorkingSetRunsMax = 8;

// What came of one session that was given the pages of a working set. Whether a page that was brought was
// used, nobody tells; so a few pages, others each time, are left out, and looked for.
struct WorkingSetRun {
  std::uint32_t brought = 0;        // pages, before anybody asked for them
  std::uint32_t late = 0;           // pages of the set that were asked for before they came
  std::uint32_t missed = 0;         // pages that were asked for, and are not in the set
  std::uint32_t left_out = 0;       // pages of the set that were left out for the sake of knowing
  std::uint32_t left_out_used = 0;  // of these, those that were asked for
  friend bool operator==(const WorkingSetRun&, const WorkingSetRun&) = default;

  // How many of the pages that were brought were used, as those that were left out say. 0 without any.
  double hits() const;
  double waste() const { return static_cast<double>(brought) - hits(); }
  // The part of what was asked for that is in the set; 1 if nothing was.
  double coverage() const;
};

struct WorkingSet {
  Identity identity{};               // of the image's memory: see identity_of()
  std::uint64_t memory_pages = 0;    // likewise
  std::uint32_t recordings = 0;      // that were merged
  std::vector<std::uint32_t> pages;  // each once, in the order of first use
  std::vector<WorkingSetRun> runs;   // the last ones, oldest first; at most kWorkingSetRunsMax
};

// Errors: more pages than one can have.
Result<std::vector<std::byte>> encode(const WorkingSet& set);
// Errors: no working set, one of another version, or a damaged one. Runs that are damaged are left out.
Result<WorkingSet> decode_working_set(std::span<const std::byte> file);

// The file at `path`; nothing if there is none. May block. Errors: it cannot be read, is no regular file, or
// as above; they name it.
Result<std::optional<WorkingSet>> read_working_set(const std::string& path);
// Writes it to the file, which gets its name then. May block. Errors: more pages than one can have; the
// file's.
Result<void> write_working_set(const WorkingSet& set, OutputFile file);
// Errors: `set`, which was read from `path`, is not of the image with this identity and so many pages.
Result<void> check_recorded_of(const WorkingSet& set, const Identity& identity, std::uint64_t memory_pages,
                               const std::string& path);

// The runs alone, which lie at a place of their own so that they can be changed where they are.
inline constexpr std::uint64_t kRunsAt = 96;
std::vector<std::byte> encode_runs(std::span<const WorkingSetRun> runs);
// Adds one, and forgets the oldest if there are too many.
void add_run(std::vector<WorkingSetRun>& runs, const WorkingSetRun& run);

// Both in one order: a page's place is the sooner one of those that it had. What does not fit is left out,
// last ones first. The runs are those of `into`. Both are of the same memory.
void merge(WorkingSet& into, const WorkingSet& recording);

// These pages with all that lie in one frame of an image together, at the place of the first: it is
// decompressed once for all of them. As they are where `store`, which shows the memory, has no frames.
std::vector<std::uint32_t> by_frames(const std::vector<std::uint32_t>& pages, const Store& store);

// What tells the memory of a raw file from another's: a hash of its length and of 64 of its pages. Reads
// those, and may block.
Result<Identity> identity_of(Store& raw);

}  // namespace uffdkit::image
