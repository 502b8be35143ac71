// A working set, as somebody may have forged it. The input: a byte of which bit 0 says whether length and
// hash are mended, lest nothing get past them; and the file.
#include "image/working_set.h"

#include <xxhash.h>

#include <cstring>
#include <vector>

#include "base/check.h"
#include "input.h"

namespace {

constexpr std::size_t kHashAt = 72;
constexpr std::size_t kHeadBytes = 512;

void mend(std::vector<std::byte>& file) {
  if (file.size() < kHeadBytes) return;
  const std::uint64_t bytes = file.size();
  std::memcpy(file.data() + 8, &bytes, sizeof bytes);
  std::vector<std::byte> hashed(file.begin(), file.begin() + kHashAt);
  hashed.insert(hashed.end(), file.begin() + kHeadBytes, file.end());
  const std::uint64_t hash = XXH64(hashed.data(), hashed.size(), 0);
  std::memcpy(file.data() + kHashAt, &hash, sizeof hash);
}

}  // namespace

int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace uffdkit;
  if (size < 1) return 0;
  const auto input = fuzz::bytes_of(data, size).subspan(1);
  std::vector<std::byte> file(input.begin(), input.end());
  if (data[0] & 1) mend(file);
  const auto set = image::decode_working_set(file);
  if (!set) return 0;
  for (const std::uint32_t page : set->pages) CHECK(page < set->memory_pages);
  const auto again = image::encode(*set);
  CHECK(again);
  const auto same = image::decode_working_set(*again);
  CHECK(same && same->pages == set->pages && same->runs == set->runs);
  if (set->memory_pages > 1u << 20) return 0;
  image::WorkingSet merged = *set;
  image::merge(merged, *same);
  CHECK(merged.pages == set->pages);
  return 0;
}
