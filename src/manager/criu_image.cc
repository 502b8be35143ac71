#include "manager/criu_image.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "store/piecewise_store.h"

namespace uffdkit {
namespace {

// Checkpoints that build on one another; more are taken for a loop of links.
constexpr std::size_t kLevelsMax = 1000;
// A stretch without lazy pages that ends a region: longer ones would have page states that nobody asks for.
constexpr ByteCount kGapMax{16u << 20};

AddressRange intersection(AddressRange a, AddressRange b) {
  const Address start = std::max(a.start, b.start);
  const Address end = std::min(a.end(), b.end());
  return {start, end > start ? end - start : ByteCount(0)};
}

}  // namespace

std::vector<criu::PagemapRun> lazy_runs(std::span<const criu::PagemapRun> pagemap,
                                        std::span<const criu::Vma> vmas) {
  std::vector<criu::PagemapRun> runs;
  auto vma = vmas.begin();
  for (const criu::PagemapRun& run : pagemap) {
    if (!run.lazy) continue;
    while (vma != vmas.end() && vma->memory.end() <= run.memory.start) ++vma;
    for (auto part = vma; part != vmas.end() && part->memory.start < run.memory.end(); ++part) {
      if (!part->can_be_lazy()) continue;
      criu::PagemapRun cut = run;
      cut.memory = intersection(run.memory, part->memory);
      cut.offset = run.offset + (cut.memory.start - run.memory.start);
      runs.push_back(cut);
    }
  }
  return runs;
}

std::vector<AddressRange> plan_task_regions(std::span<const criu::PagemapRun> runs,
                                            std::span<const criu::Vma> vmas, std::size_t regions_max) {
  std::vector<AddressRange> regions;
  auto vma = vmas.begin();
  for (const criu::PagemapRun& run : runs) {
    bool goes_on = !regions.empty();
    while (vma != vmas.end() && vma->memory.end() <= run.memory.start) {
      goes_on = false;
      ++vma;
    }
    goes_on = goes_on && run.memory.start - regions.back().end() <= kGapMax;
    if (goes_on)
      regions.back().length = run.memory.end() - regions.back().start;
    else
      regions.push_back(run.memory);
  }
  if (regions.size() <= regions_max) return regions;

  // The widest gaps stay.
  std::vector<std::size_t> gaps;  // each before the region of this number
  for (std::size_t i = 1; i < regions.size(); ++i) gaps.push_back(i);
  const auto width = [&](std::size_t i) { return regions[i].start - regions[i - 1].end(); };
  const auto kept = gaps.begin() + static_cast<std::ptrdiff_t>(regions_max - 1);
  std::nth_element(gaps.begin(), kept, gaps.end(),
                   [&](std::size_t a, std::size_t b) { return width(a) > width(b); });
  std::sort(gaps.begin(), kept);
  std::vector<AddressRange> joined = {regions.front()};
  auto next_gap = gaps.begin();
  for (std::size_t i = 1; i < regions.size(); ++i) {
    if (next_gap != kept && *next_gap == i) {
      joined.push_back(regions[i]);
      ++next_gap;
    } else {
      joined.back().length = regions[i].end() - joined.back().start;
    }
  }
  return joined;
}

Result<CriuImage> CriuImage::open(const std::string& directory) {
  Result<criu::ImageDirectory> newest = criu::ImageDirectory::open(directory);
  if (!newest) return Failure(std::move(newest).error());
  Result<std::vector<std::int32_t>> tasks = newest->tasks();
  if (!tasks) return Failure(std::move(tasks).error());
  std::vector<Level> levels;
  levels.push_back({.directory = std::move(*newest), .pages = {}});
  for (;;) {
    Result<std::optional<criu::ImageDirectory>> looked = levels.back().directory.parent();
    if (!looked) return Failure(std::move(looked).error());
    std::optional<criu::ImageDirectory>& parent = *looked;
    if (!parent) break;
    if (levels.size() == kLevelsMax)
      return Failure(
          Error(fmt::format("{} builds on more than {} others, or on itself", directory, kLevelsMax), ELOOP));
    levels.push_back({.directory = *std::move(parent), .pages = {}});
  }
  return CriuImage(std::move(levels), std::move(*tasks));
}

Result<std::shared_ptr<Store>> CriuImage::pages(std::size_t level, std::uint32_t pages_id) {
  std::shared_ptr<Store>& store = levels_[level].pages[pages_id];
  if (store) return store;
  const criu::ImageDirectory& directory = levels_[level].directory;
  const Result<UniqueFd> fd = directory.open_pages(pages_id);
  if (!fd) return Failure(fd.error());
  Result<std::shared_ptr<Store>> opened = open_file_store(fd->get(), directory.pages_name(pages_id));
  if (!opened) return opened;
  store = std::move(*opened);
  return store;
}

Result<void> CriuImage::find(std::int32_t pid, std::vector<TaskLevel>& task, std::size_t level,
                             const criu::PagemapRun& run, AddressRange memory, std::vector<Source>& sources) {
  const criu::ImageDirectory& directory = levels_[level].directory;
  if (!run.in_parent) {
    if (!run.present)
      return Failure(Error(fmt::format("{}: the bytes of task {} at {:#x} are not in these images",
                                       directory.path(), pid, memory.start.value),
                           ENODATA)
                         .with_remedy("a checkpoint of `criu dump --lazy-pages` is served by its page server "
                                      "only, which is not supported"));
    TaskLevel& here = task[level];
    if (!here.pages) {
      Result<std::shared_ptr<Store>> opened = pages(level, here.pagemap.pages_id);
      if (!opened) return Failure(std::move(opened).error());
      here.pages = std::move(*opened);
    }
    const StoreOffset from = run.offset + (memory.start - run.memory.start);
    if ((from + memory.length).value > here.pages->size().value)
      return Failure(Error(fmt::format("{} has {} bytes, but the pages of task {} at {:#x} are at byte {}",
                                       here.pages->name(), here.pages->size().value, pid, memory.start.value,
                                       from.value),
                           EBADMSG)
                         .with_remedy("the file was cut short: take the checkpoint again"));
    sources.push_back({.memory = memory, .pages = here.pages, .from = from});
    return {};
  }

  const std::size_t above = level + 1;
  if (above == levels_.size())
    return Failure(Error(fmt::format("{}: the pages of task {} at {:#x} are in the checkpoint before, but "
                                     "there is no link \"parent\" to it",
                                     directory.path(), pid, memory.start.value),
                         ENOENT));
  if (task.size() == above) {
    Result<criu::Pagemap> pagemap = levels_[above].directory.pagemap(pid);
    if (!pagemap) return Failure(std::move(pagemap).error());
    task.push_back({.pagemap = std::move(*pagemap), .pages = nullptr});
  }
  // By index: finding may add a level, which moves the page maps.
  const auto runs = [&]() -> const std::vector<criu::PagemapRun>& { return task[above].pagemap.runs; };
  const auto first = std::partition_point(
      runs().begin(), runs().end(),
      [&](const criu::PagemapRun& candidate) { return candidate.memory.end() <= memory.start; });
  Address position = memory.start;
  for (auto i = static_cast<std::size_t>(first - runs().begin()); position < memory.end(); ++i) {
    if (i == runs().size() || runs()[i].memory.start > position)
      return Failure(
          Error(fmt::format("{}: task {} has no pages at {:#x}, but the checkpoint after it builds "
                            "on them",
                            levels_[above].directory.path(), pid, position.value),
                EBADMSG));
    const criu::PagemapRun part = runs()[i];
    const AddressRange wanted = intersection(part.memory, {position, memory.end() - position});
    if (auto found = find(pid, task, above, part, wanted, sources); !found) return found;
    position = wanted.end();
  }
  return {};
}

Result<TaskMemory> CriuImage::task(std::int32_t pid) {
  const criu::ImageDirectory& directory = levels_.front().directory;
  if (std::find(tasks_.begin(), tasks_.end(), pid) == tasks_.end())
    return Failure(Error(fmt::format("{} has no task {}", directory.path(), pid), ESRCH)
                       .with_remedy("restore and serve from the same directory"));
  Result<criu::Pagemap> pagemap = directory.pagemap(pid);
  if (!pagemap) return Failure(std::move(pagemap).error());
  const Result<std::vector<criu::Vma>> vmas = directory.vmas(pid);
  if (!vmas) return Failure(vmas.error());

  const std::vector<criu::PagemapRun> runs = lazy_runs(pagemap->runs, *vmas);
  std::vector<TaskLevel> task;
  task.push_back({.pagemap = std::move(*pagemap), .pages = nullptr});
  std::vector<Source> sources;
  for (const criu::PagemapRun& run : runs)
    if (auto found = find(pid, task, 0, run, run.memory, sources); !found) return Failure(found.error());

  TaskMemory memory;
  ByteCount size(0);
  std::vector<StorePiece> pieces;
  auto source = sources.begin();
  for (const AddressRange region : plan_task_regions(runs, *vmas, kTaskRegionsMax)) {
    memory.regions.push_back({.memory = region, .offset = StoreOffset(size.value)});
    for (; source != sources.end() && source->memory.start < region.end(); ++source) {
      const StoreOffset at = StoreOffset(size.value) + (source->memory.start - region.start);
      memory.lazy = memory.lazy + source->memory.length;
      if (!pieces.empty() && pieces.back().source == source->pages &&
          pieces.back().at + pieces.back().length == at &&
          pieces.back().from + pieces.back().length == source->from)
        pieces.back().length = pieces.back().length + source->memory.length;
      else
        pieces.push_back(
            {.at = at, .length = source->memory.length, .source = source->pages, .from = source->from});
    }
    size = size + region.length;
  }
  if (!memory.regions.empty())
    memory.store =
        make_piecewise_store(fmt::format("{}, task {}", directory.path(), pid), size, std::move(pieces));
  return memory;
}

}  // namespace uffdkit
