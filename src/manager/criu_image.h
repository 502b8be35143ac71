// The memory of a checkpoint's tasks, as the engine serves it: regions, and a store that shows them.
//
// A task's lazy pages lie in pieces all over the pages files of a checkpoint and of those that it builds on.
// Here each task gets a store of its own, in which its regions follow one another; what is in a region and
// not lazy is zero there. Threads: none; the stores that are made are for any.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "wire/criu_images.h"

namespace uffdkit {

// The most regions that a task's memory is served as. Each takes a mapping of ours for its page states, in
// each of the task's forks too, of vm.max_map_count (65530) in all.
inline constexpr std::size_t kTaskRegionsMax = 128;

// Memory of a task's that is served from `offset` of its store on.
struct TaskRegion {
  AddressRange memory;
  StoreOffset offset;
};

struct TaskMemory {
  std::vector<TaskRegion> regions;  // by address
  std::shared_ptr<Store> store;     // nullptr if there is no region
  ByteCount lazy;                   // of which the checkpoint has bytes
};

// The lazy parts of `pagemap` that lie in mappings which a lazy restore registers, none across a mapping's
// border.
std::vector<criu::PagemapRun> lazy_runs(std::span<const criu::PagemapRun> pagemap,
                                        std::span<const criu::Vma> vmas);

// The regions that cover `runs`, which are sorted: at first one for what of each mapping is lazy, cut where
// nothing is for long; then, while there are more than `regions_max` (at least 1), those with the smallest
// gap are made one. What lies in between is never asked for, or is zero.
std::vector<AddressRange> plan_task_regions(std::span<const criu::PagemapRun> runs,
                                            std::span<const criu::Vma> vmas, std::size_t regions_max);

// A checkpoint and those that it builds on.
class CriuImage {
 public:
  static Result<CriuImage> open(const std::string& directory);

  // Errors: none of the tasks has this number; an image is missing, malformed or too short; pages that only a
  // page server has.
  Result<TaskMemory> task(std::int32_t pid);

 private:
  // One of the checkpoints.
  struct Level {
    criu::ImageDirectory directory;
    std::map<std::uint32_t, std::shared_ptr<Store>> pages;  // by the files' numbers
  };
  // Where the bytes of some memory are.
  struct Source {
    AddressRange memory;
    std::shared_ptr<Store> pages;
    StoreOffset from;
  };
  // What `pid` has in one of the checkpoints.
  struct TaskLevel {
    criu::Pagemap pagemap;
    std::shared_ptr<Store> pages;  // nullptr: not opened yet
  };

  CriuImage(std::vector<Level> levels, std::vector<std::int32_t> tasks)
      : levels_(std::move(levels)), tasks_(std::move(tasks)) {}
  Result<std::shared_ptr<Store>> pages(std::size_t level, std::uint32_t pages_id);
  // Adds where the bytes of `memory`, as a run of checkpoint `level` has it, are.
  Result<void> find(std::int32_t pid, std::vector<TaskLevel>& task, std::size_t level,
                    const criu::PagemapRun& run, AddressRange memory, std::vector<Source>& sources);

  std::vector<Level> levels_;  // the newest first
  std::vector<std::int32_t> tasks_;
};

}  // namespace uffdkit
