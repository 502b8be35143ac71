#include "image/working_set.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <unordered_map>
#include <utility>

#include "base/check.h"
#include "image/identity.h"
#include "image/numbers.h"
#include "image/varint.h"
#include "store/read_ahead.h"

namespace uffdkit::image {
namespace {

constexpr std::uint64_t kMagic = 0x31'73'77'64'66'66'75'00;  // "\0uffdws1"
constexpr std::size_t kHeadHashedBytes = 72;                 // then the hash
constexpr std::size_t kHeadBytes = 512;                      // head and runs; then the list
constexpr std::size_t kRunFields = 5;
constexpr std::size_t kRunBytes = kRunFields * sizeof(std::uint32_t);
constexpr std::size_t kRunsBytes = 8 + kWorkingSetRunsMax * kRunBytes + 8;  // count, runs, hash
static_assert(kRunsAt >= kHeadHashedBytes + 8 && kRunsAt + kRunsBytes <= kHeadBytes);
// A run of pages takes two numbers: where it begins, and how long it is.
constexpr std::size_t kListBytesPerPageMax = 12;
constexpr std::uint64_t kSampledPages = 64;

Failure damaged(const std::string& what) {
  return Failure(Error(what, EBADMSG).with_remedy("remove the file, and record the working set again"));
}

std::uint64_t zigzag(std::int64_t value) {
  return static_cast<std::uint64_t>(value) << 1 ^ static_cast<std::uint64_t>(value >> 63);
}

std::int64_t unzigzag(std::uint64_t value) {
  return static_cast<std::int64_t>(value >> 1) ^ -static_cast<std::int64_t>(value & 1);
}

// Of all but the runs, which may change.
std::uint64_t hash_of(std::span<const std::byte> file) {
  XXH64_state_t* state = XXH64_createState();
  CHECK(state != nullptr);
  XXH64_reset(state, 0);
  XXH64_update(state, file.data(), kHeadHashedBytes);
  XXH64_update(state, file.data() + kHeadBytes, file.size() - kHeadBytes);
  const std::uint64_t hash = XXH64_digest(state);
  XXH64_freeState(state);
  return hash;
}

std::vector<WorkingSetRun> decode_runs(std::span<const std::byte> bytes) {
  const std::size_t hashed = kRunsBytes - 8;
  const auto count = get<std::uint64_t>(bytes, 0);
  if (count > kWorkingSetRunsMax ||
      get<std::uint64_t>(bytes, hashed) != std::uint64_t{XXH64(bytes.data(), hashed, 0)})
    return {};
  std::vector<WorkingSetRun> runs(count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::size_t at = 8 + i * kRunBytes;
    runs[i] = {.brought = get<std::uint32_t>(bytes, at),
               .late = get<std::uint32_t>(bytes, at + 4),
               .missed = get<std::uint32_t>(bytes, at + 8),
               .left_out = get<std::uint32_t>(bytes, at + 12),
               .left_out_used = get<std::uint32_t>(bytes, at + 16)};
  }
  return runs;
}

Result<std::vector<std::uint32_t>> decode_list(std::span<const std::byte> bytes, std::uint64_t page_count,
                                               std::uint64_t memory_pages) {
  std::vector<std::uint32_t> pages;
  std::int64_t end = 0;  // of the run before
  while (!bytes.empty()) {
    std::uint64_t step = 0;
    std::uint64_t more = 0;
    if (!take_varint(bytes, step) || !take_varint(bytes, more))
      return damaged("the list of pages ends within a number");
    if (step > 2 * kWorkingSetMemoryPagesMax)
      return damaged(fmt::format("page {} of the list lies outside of any memory", pages.size()));
    const std::int64_t first = end + unzigzag(step);
    if (first < 0 || static_cast<std::uint64_t>(first) >= memory_pages ||
        more >= memory_pages - static_cast<std::uint64_t>(first))
      return damaged(fmt::format("page {} of the list lies outside of the memory", pages.size()));
    if (more >= page_count - pages.size())
      return damaged(
          fmt::format("the list has more pages than the {} that the file should have", page_count));
    for (std::uint64_t i = 0; i <= more; ++i)
      pages.push_back(static_cast<std::uint32_t>(static_cast<std::uint64_t>(first) + i));
    end = first + static_cast<std::int64_t>(more) + 1;
  }
  if (pages.size() != page_count)
    return damaged(fmt::format("the list has {} pages, and should have {}", pages.size(), page_count));
  std::vector<std::uint32_t> sorted = pages;
  std::ranges::sort(sorted);
  if (const auto twice = std::ranges::adjacent_find(sorted); twice != sorted.end())
    return damaged(fmt::format("page {} is in the list twice", *twice));
  return pages;
}

}  // namespace

double WorkingSetRun::hits() const {
  return left_out == 0 ? 0 : static_cast<double>(brought) * left_out_used / left_out;
}

double WorkingSetRun::coverage() const {
  const double found = hits() + late + left_out_used;
  return found + missed == 0 ? 1 : found / (found + missed);
}

std::vector<std::byte> encode_runs(std::span<const WorkingSetRun> runs) {
  CHECK(runs.size() <= kWorkingSetRunsMax);
  std::vector<std::byte> bytes;
  put(bytes, std::uint64_t{runs.size()});
  for (const WorkingSetRun& run : runs)
    for (const std::uint32_t field : {run.brought, run.late, run.missed, run.left_out, run.left_out_used})
      put(bytes, field);
  bytes.resize(kRunsBytes - 8);
  put(bytes, std::uint64_t{XXH64(bytes.data(), bytes.size(), 0)});
  return bytes;
}

void add_run(std::vector<WorkingSetRun>& runs, const WorkingSetRun& run) {
  if (runs.size() == kWorkingSetRunsMax) runs.erase(runs.begin());
  runs.push_back(run);
}

Result<std::vector<std::byte>> encode(const WorkingSet& set) {
  if (set.pages.size() > kWorkingSetPagesMax || set.memory_pages > kWorkingSetMemoryPagesMax)
    return Failure(Error(fmt::format("{} pages of {} are more than a working set can have", set.pages.size(),
                                     set.memory_pages),
                         EFBIG));
  std::vector<std::byte> list;
  std::int64_t end = 0;
  for (std::size_t i = 0; i < set.pages.size();) {
    std::size_t next = i + 1;
    while (next < set.pages.size() && set.pages[next] == set.pages[next - 1] + std::uint64_t{1}) ++next;
    put_varint(list, zigzag(std::int64_t{set.pages[i]} - end));
    put_varint(list, next - i - 1);
    end = std::int64_t{set.pages[next - 1]} + 1;
    i = next;
  }
  std::vector<std::byte> file;
  put(file, kMagic);
  put(file, std::uint64_t{kHeadBytes + list.size()});
  file.insert(file.end(), set.identity.begin(), set.identity.end());
  put(file, set.memory_pages);
  put(file, std::uint64_t{set.pages.size()});
  put(file, std::uint64_t{set.recordings});
  file.resize(kHeadBytes);
  const std::vector<std::byte> runs = encode_runs(set.runs);
  std::ranges::copy(runs, file.begin() + kRunsAt);
  file.insert(file.end(), list.begin(), list.end());
  const std::uint64_t hash = hash_of(file);
  std::memcpy(file.data() + kHeadHashedBytes, &hash, sizeof hash);
  return file;
}

Result<WorkingSet> decode_working_set(std::span<const std::byte> file) {
  if (file.size() < sizeof kMagic || get<std::uint64_t>(file, 0) != kMagic)
    return damaged("it is no working set, or one of another version");
  if (file.size() < kHeadBytes || get<std::uint64_t>(file, 8) != file.size())
    return damaged(fmt::format("it has {} bytes, which is not what it should have", file.size()));
  if (get<std::uint64_t>(file, kHeadHashedBytes) != hash_of(file)) return damaged("its checksum is wrong");
  WorkingSet set;
  std::memcpy(set.identity.data(), file.data() + 16, set.identity.size());
  set.memory_pages = get<std::uint64_t>(file, 32);
  const auto page_count = get<std::uint64_t>(file, 40);
  const auto recordings = get<std::uint64_t>(file, 48);
  const std::span<const std::byte> list = file.subspan(kHeadBytes);
  // More than a page for each of its bytes there may be, since runs are short to write down.
  if (set.memory_pages > kWorkingSetMemoryPagesMax || page_count > kWorkingSetPagesMax ||
      page_count > set.memory_pages || recordings > UINT32_MAX)
    return damaged(
        fmt::format("it has {} pages of {}, which no working set has", page_count, set.memory_pages));
  if (list.size() > page_count * kListBytesPerPageMax)
    return damaged(fmt::format("its list has {} bytes for {} pages", list.size(), page_count));
  set.recordings = static_cast<std::uint32_t>(recordings);
  Result<std::vector<std::uint32_t>> pages = decode_list(list, page_count, set.memory_pages);
  if (!pages) return Failure(std::move(pages).error());
  set.pages = std::move(*pages);
  set.runs = decode_runs(file.subspan(kRunsAt, kRunsBytes));
  return set;
}

Result<std::optional<WorkingSet>> read_working_set(const std::string& path) {
  // No link, which whoever may write the folder could have put there, and nothing that blocks.
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!file && errno == ENOENT) return std::nullopt;
  if (!file) return Failure(Error::from_errno("open " + path, errno));
  struct stat status;
  if (::fstat(file.get(), &status) != 0) return Failure(Error::from_errno("stat " + path, errno));
  if (!S_ISREG(status.st_mode)) return damaged(path + " is not a regular file");
  if (static_cast<std::uint64_t>(status.st_size) > kWorkingSetFileBytesMax)
    return damaged(fmt::format("{} has {} bytes, more than a working set can have", path, status.st_size));
  std::vector<std::byte> bytes(static_cast<std::size_t>(status.st_size));
  std::size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t read =
        ::pread(file.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(done));
    if (read < 0 && errno == EINTR) continue;
    if (read < 0) return Failure(Error::from_errno("read " + path, errno));
    if (read == 0) break;
    done += static_cast<std::size_t>(read);
  }
  Result<WorkingSet> set = decode_working_set(std::span(bytes).first(done));
  if (!set) return Failure(std::move(set).error().within(path));
  return std::optional(std::move(*set));
}

Result<void> write_working_set(const WorkingSet& set, OutputFile file) {
  const Result<std::vector<std::byte>> bytes = encode(set);
  if (!bytes) return Failure(bytes.error());
  if (auto written = file.append(*bytes); !written) return written;
  return file.commit();
}

Result<void> check_recorded_of(const WorkingSet& set, const Identity& identity, std::uint64_t memory_pages,
                               const std::string& path) {
  if (set.identity == identity && set.memory_pages == memory_pages) return {};
  return Failure(Error(path + " was recorded of another image", ESTALE)
                     .with_remedy("remove it, or record the working set again"));
}

void merge(WorkingSet& into, const WorkingSet& recording) {
  CHECK(into.memory_pages == recording.memory_pages);
  std::vector<bool> known(into.memory_pages);
  std::vector<std::uint32_t> merged;
  merged.reserve(std::max(into.pages.size(), recording.pages.size()));
  const auto add = [&](const std::vector<std::uint32_t>& pages, std::size_t place) {
    if (place >= pages.size() || known[pages[place]] || merged.size() == kWorkingSetPagesMax) return;
    known[pages[place]] = true;
    merged.push_back(pages[place]);
  };
  for (std::size_t place = 0; place < std::max(into.pages.size(), recording.pages.size()); ++place) {
    add(into.pages, place);
    add(recording.pages, place);
  }
  into.pages = std::move(merged);
  into.recordings = static_cast<std::uint32_t>(
      std::min<std::uint64_t>(std::uint64_t{into.recordings} + recording.recordings, UINT32_MAX));
}

std::vector<std::uint32_t> by_frames(const std::vector<std::uint32_t>& pages, const Store& store) {
  const auto* frames = dynamic_cast<const ReadAhead*>(&store);
  if (frames == nullptr || frames->is_only_copied()) return pages;
  std::unordered_map<std::uint64_t, std::size_t> place_of;
  std::vector<std::vector<std::uint32_t>> together;
  for (const std::uint32_t page : pages) {
    const std::uint64_t frame = frames->unit_at(StoreOffset(page * kPageBytes));
    const auto [place, is_new] = place_of.try_emplace(frame, together.size());
    if (is_new) together.emplace_back();
    together[place->second].push_back(page);
  }
  std::vector<std::uint32_t> order;
  order.reserve(pages.size());
  for (const auto& frame : together) order.insert(order.end(), frame.begin(), frame.end());
  return order;
}

Result<Identity> identity_of(Store& raw) {
  const std::uint64_t pages = raw.size().value / kPageBytes;
  const std::uint64_t samples = std::min(pages, kSampledPages);
  std::array<std::byte, kPageBytes> page;
  IdentityHash hash;
  for (std::uint64_t i = 0; i < samples; ++i) {
    // First and last, and between them at equal distances.
    const std::uint64_t at = samples == 1 ? 0 : i * (pages - 1) / (samples - 1);
    Result<ReadStatus> read = raw.read(StoreOffset(at * kPageBytes), page, Wait::yes);
    if (!read) return Failure(std::move(read).error());
    if (*read != ReadStatus::done) return Failure(Error(raw.name() + " gave no bytes", EIO));
    hash.add(hash_block(page));
  }
  return hash.finish(raw.size().value);
}

}  // namespace uffdkit::image
