#include "engine/fetch.h"

#include <cerrno>
#include <span>

namespace uffdkit {

void read_fetch(Fetch& fetch) {
  const std::span<std::byte> buffer(fetch.buffer.get(), fetch.bytes().value);
  if (const auto read = fetch.store->read(fetch.from, buffer, Wait::yes); read && *read == ReadStatus::done)
    return;
  const std::size_t page = kPage4K.bytes().value;
  for (std::size_t i = 0; i < fetch.granules.value; ++i) {
    Result<ReadStatus> read =
        fetch.store->read(fetch.from + ByteCount(i * page), buffer.subspan(i * page, page), Wait::yes);
    if (read && *read == ReadStatus::done) continue;
    fetch.failed.set(i);
    if (fetch.error) continue;
    // A store that would block although it may breaks its contract; its bytes are not to be trusted.
    fetch.error = read ? Error(fetch.store->name() + " gave no bytes", EIO) : std::move(read).error();
  }
}

}  // namespace uffdkit
