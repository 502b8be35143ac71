#include "engine/fetch.h"

#include <cerrno>
#include <span>

namespace uffdkit {

namespace {

std::span<std::byte> buffer_of(const Fetch& fetch) {
  return {fetch.buffer.get(), fetch.bytes().value};
}

// Reads these pages one by one.
void read_singly(Fetch& fetch, const std::bitset<kFetchGranulesMax>& pages) {
  const std::size_t page = kPage4K.bytes().value;
  fetch.failed.reset();
  fetch.error.reset();
  for (std::size_t i = 0; i < fetch.granules.value; ++i) {
    if (!pages[i]) continue;
    Result<ReadStatus> read = fetch.store->read(fetch.from + ByteCount(i * page),
                                                buffer_of(fetch).subspan(i * page, page), Wait::yes);
    if (read && *read == ReadStatus::done) continue;
    fetch.failed.set(i);
    if (fetch.error) continue;
    // A store that would block although it may breaks its contract; its bytes are not to be trusted.
    fetch.error = read ? Error(fetch.store->name() + " gave no bytes", EIO) : std::move(read).error();
  }
}

}  // namespace

void read_fetch(Fetch& fetch) {
  if (const auto read = fetch.store->read(fetch.from, buffer_of(fetch), Wait::yes);
      read && *read == ReadStatus::done)
    return;
  read_singly(fetch, std::bitset<kFetchGranulesMax>().set());
}

void read_failed_again(Fetch& fetch) {
  ++fetch.retries;
  read_singly(fetch, std::bitset<kFetchGranulesMax>(fetch.failed));
}

}  // namespace uffdkit
