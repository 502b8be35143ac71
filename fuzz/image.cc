// A compressed image, as somebody may have forged it. The input: a byte of which bit 0 says whether the
// hashes are mended, lest nothing get past them; the lengths of record and seek table, 2 bytes each; both;
// and the frames.
#include <uffdkit/store.h>
#include <xxhash.h>

#include <cstring>
#include <vector>

#include "base/check.h"
#include "image/image_file.h"
#include "image/layered_store.h"
#include "input.h"

namespace {

void put(std::span<std::byte> to, std::size_t at, const auto& value) {
  std::memcpy(to.data() + at, &value, sizeof value);
}

void mend(std::span<std::byte> record, std::span<const std::byte> table) {
  if (record.size() < 32) return;
  const std::size_t tail = record.size() - 16;
  put(record, 4, static_cast<std::uint32_t>(record.size() - 8));
  put(record, 16, std::uint64_t{XXH64(table.data(), table.size(), 0)});
  put(record, tail + 8, static_cast<std::uint32_t>(record.size()));
  put(record, tail, std::uint64_t{XXH64(record.data(), tail, 0)});
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  if (size < 5) return 0;
  const auto input = fuzz::bytes_of(data, size);
  const auto rest = input.subspan(5);
  const std::size_t record_bytes = std::min<std::size_t>(data[1] | std::size_t{data[2]} << 8, rest.size());
  const std::size_t table_bytes =
      std::min<std::size_t>(data[3] | std::size_t{data[4]} << 8, rest.size() - record_bytes);
  std::vector<std::byte> record(rest.begin(), rest.begin() + static_cast<std::ptrdiff_t>(record_bytes));
  const auto table = rest.subspan(record_bytes, table_bytes);
  if (data[0] & 1) mend(record, table);

  const auto frames = rest.subspan(record_bytes + table_bytes);
  std::vector<std::byte> file(frames.begin(), frames.end());
  file.insert(file.end(), record.begin(), record.end());
  file.insert(file.end(), table.begin(), table.end());
  (void)image::kind_of(file, file.size());
  const auto store = make_memory_store(file, "fuzz.img");
  const auto cache = std::make_shared<image::FrameCache>(ByteCount(1 << 20));
  auto opened = image::ImageFile::open(*store, file.size(), store, cache);
  if (!opened) return 0;
  auto memory = image::make_layered_store("fuzz.img", {*opened});
  if (!memory) return 0;
  const std::uint64_t end = (*memory)->size().value;
  CHECK(end == (*opened)->record().pages() * 4096);
  std::vector<std::byte> bytes(5 * 4096);
  std::uint64_t at = 0;
  for (int i = 0; i < 50 && at < end; ++i) {
    const Extent extent = (*memory)->extent_at(StoreOffset(at));
    CHECK(extent.end.value > at && extent.end.value <= end);
    const std::size_t wanted = std::min<std::uint64_t>(bytes.size(), end - at);
    (void)(*memory)->read(StoreOffset(at), std::span(bytes).first(wanted), Wait::yes);
    at = extent.end.value;
  }
  for (std::size_t frame = 0; frame < std::min<std::size_t>((*opened)->frame_count(), 50); ++frame) {
    bytes.resize((*opened)->is_long(frame) ? 0 : (*opened)->frame_bytes(frame));
    (void)(*opened)->decode_frame(frame, bytes, Wait::yes);
  }
  return 0;
}
