#include "engine/fetch.h"

#include <array>
#include <cerrno>
#include <span>

#include "store/read_ahead.h"

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

// The disk is told of all of them before the first is waited for: it reads many at a time, and in the order
// that it likes.
void read_pieces(Fetch& fetch) {
  if (auto* ahead = dynamic_cast<ReadAhead*>(fetch.store.get())) {
    std::optional<std::uint64_t> told;
    for (const FetchPiece& piece : fetch.pieces) {
      const ByteCount bytes = kPage4K.bytes(piece.granules.count);
      const std::uint64_t last = ahead->unit_at(piece.from + ByteCount(bytes.value - 1));
      if (told != last || ahead->unit_at(piece.from) != last) ahead->will_need(piece.from, bytes);
      told = last;
    }
  }
  std::size_t page = 0;
  for (const FetchPiece& piece : fetch.pieces) {
    if (!piece.read) continue;
    const std::size_t pages = piece.granules.count.value;
    const std::span<std::byte> bytes = buffer_of(fetch).subspan(kPage4K.bytes(PageCount(page)).value,
                                                                kPage4K.bytes(piece.granules.count).value);
    const Result<ReadStatus> read = fetch.store->read(piece.from, bytes, Wait::yes);
    for (std::size_t i = page; i < page + pages; ++i) fetch.failed[i] = !read || *read != ReadStatus::done;
    page += pages;
  }
}

}  // namespace

void read_fetch(Fetch& fetch) {
  if (fetch.urgency != Urgency::demand) return read_pieces(fetch);
  if (const auto read = fetch.store->read(fetch.from, buffer_of(fetch), Wait::yes);
      read && *read == ReadStatus::done)
    return;
  read_singly(fetch, std::bitset<kFetchGranulesMax>().set());
}

bool read_at_hand(Fetch& fetch) {
  const auto* ahead = dynamic_cast<const ReadAhead*>(fetch.store.get());
  if (ahead == nullptr || !ahead->is_only_copied()) return false;
  std::array<std::byte, kPage4K.bytes().value> unwanted;
  std::span<std::byte> rest = buffer_of(fetch);
  const auto read = [&](StoreOffset from, std::span<std::byte> to) {
    const Result<ReadStatus> status = fetch.store->read(from, to, Wait::no);
    return status && *status == ReadStatus::done;
  };
  for (const FetchPiece& piece : fetch.pieces) {
    const std::uint64_t bytes = kPage4K.bytes(piece.granules.count).value;
    if (piece.read) {
      if (!read(piece.from, rest.first(bytes))) return false;
      rest = rest.subspan(bytes);
      continue;
    }
    for (std::uint64_t at = 0; at < bytes; at += unwanted.size())
      if (!read(piece.from + ByteCount(at), unwanted)) return false;
  }
  return true;
}

void read_failed_again(Fetch& fetch) {
  ++fetch.retries;
  read_singly(fetch, std::bitset<kFetchGranulesMax>(fetch.failed));
}

}  // namespace uffdkit
