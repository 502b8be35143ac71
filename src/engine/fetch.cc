#include "engine/fetch.h"

#include <array>
#include <cerrno>
#include <span>

#include "store/read_ahead.h"

namespace uffdkit {

namespace {

// The most pages of a small read. Larger ones the kernel reads in parts, each of which the reader's thread
// has to be woken for, so that threads are faster (bench_cold_reads).
constexpr std::size_t kSmallPages = 2;
// Of so many pieces the disk is as well told before.
constexpr std::size_t kFewPieces = 4;

// Reads these pages one by one.
void read_singly(Fetch& fetch, const std::bitset<kFetchGranulesMax>& pages) {
  const std::size_t page = kPage4K.bytes().value;
  fetch.failed.reset();
  fetch.error.reset();
  for (std::size_t i = 0; i < fetch.granules.value; ++i) {
    if (!pages[i]) continue;
    Result<ReadStatus> read = fetch.store->read(fetch.from + ByteCount(i * page),
                                                fetch.buffer_bytes().subspan(i * page, page), Wait::yes);
    if (read && *read == ReadStatus::done) continue;
    fetch.failed.set(i);
    if (fetch.error) continue;
    // A store that would block although it may breaks its contract; its bytes are not to be trusted.
    fetch.error = read ? Error(fetch.store->name() + " gave no bytes", EIO) : std::move(read).error();
  }
}

// Calls `visit` with each piece that is to be read, its bytes, and the number of its first page in the
// buffer.
template <class Visit>
void for_each_read(const Fetch& fetch, const Visit& visit) {
  std::size_t page = 0;
  for (const FetchPiece& piece : fetch.pieces) {
    if (!piece.read) continue;
    visit(piece,
          fetch.buffer_bytes().subspan(kPage4K.bytes(PageCount(page)).value,
                                       kPage4K.bytes(piece.granules.count).value),
          page);
    page += piece.granules.count.value;
  }
}

// The disk is told of all of them before the first is waited for: it reads many at a time, and in the order
// that it likes.
void tell_of_pieces(Fetch& fetch, ReadAhead& ahead) {
  std::optional<std::uint64_t> told;
  for (const FetchPiece& piece : fetch.pieces) {
    const ByteCount bytes = kPage4K.bytes(piece.granules.count);
    const std::uint64_t last = ahead.unit_at(piece.from + ByteCount(bytes.value - 1));
    if (told != last || ahead.unit_at(piece.from) != last) ahead.will_need(piece.from, bytes);
    told = last;
  }
}

// Whether its pieces are small, more than a few, and parts of a file.
bool suits_a_reader(const Fetch& fetch, const ReadAhead& ahead) {
  std::size_t pieces = 0;
  bool parts = true;
  for_each_read(fetch, [&](const FetchPiece& piece, std::span<std::byte> bytes, std::size_t) {
    parts = parts && (pieces > 0 || ahead.part_of(piece.from, ByteCount(bytes.size())));
    ++pieces;
  });
  return parts && pieces > kFewPieces && fetch.granules.value <= pieces * kSmallPages;
}

// Those that `reader` has read are marked in `read`, by the number of their first page.
void read_pieces_together(Fetch& fetch, ReadAhead& ahead, BatchReader& reader,
                          std::bitset<kFetchGranulesMax>& read) {
  std::array<std::size_t, kFetchGranulesMax> wanted{};
  std::size_t under_way = 0;
  const auto wait = [&] {
    for (const BatchReader::Done& done : reader.wait()) {
      read[done.tag] = done.result == static_cast<std::int64_t>(wanted[done.tag]);
      --under_way;
    }
  };
  for (const FetchPiece& piece : fetch.pieces)
    if (!piece.read) ahead.will_need(piece.from, kPage4K.bytes(piece.granules.count));
  for_each_read(fetch, [&](const FetchPiece& piece, std::span<std::byte> bytes, std::size_t page) {
    const std::optional<FilePart> part = ahead.part_of(piece.from, ByteCount(bytes.size()));
    if (!part) return ahead.will_need(piece.from, ByteCount(bytes.size()));
    if (under_way == reader.most()) wait();
    wanted[page] = bytes.size();
    reader.begin(*part, bytes, page);
    ++under_way;
  });
  while (under_way > 0) wait();
}

void read_pieces(Fetch& fetch, BatchReaders* readers) {
  std::bitset<kFetchGranulesMax> read;
  if (auto* ahead = dynamic_cast<ReadAhead*>(fetch.store.get())) {
    const BorrowedReader reader(readers != nullptr && suits_a_reader(fetch, *ahead) ? readers : nullptr);
    if (reader)
      read_pieces_together(fetch, *ahead, *reader, read);
    else
      tell_of_pieces(fetch, *ahead);
  }
  for_each_read(fetch, [&](const FetchPiece& piece, std::span<std::byte> bytes, std::size_t page) {
    if (read[page]) return;
    const Result<ReadStatus> status = fetch.store->read(piece.from, bytes, Wait::yes);
    const bool failed = !status || *status != ReadStatus::done;
    for (std::size_t i = page; i < page + piece.granules.count.value; ++i) fetch.failed[i] = failed;
  });
}

}  // namespace

void read_fetch(Fetch& fetch, BatchReaders* readers) {
  if (fetch.urgency != Urgency::demand) return read_pieces(fetch, readers);
  if (const auto read = fetch.store->read(fetch.from, fetch.buffer_bytes(), Wait::yes);
      read && *read == ReadStatus::done)
    return;
  read_singly(fetch, std::bitset<kFetchGranulesMax>().set());
}

std::optional<FilePart> small_part(const Fetch& fetch) {
  if (fetch.urgency != Urgency::demand || fetch.granules.value > kSmallPages || fetch.failed.any())
    return std::nullopt;
  const auto* ahead = dynamic_cast<const ReadAhead*>(fetch.store.get());
  return ahead == nullptr ? std::nullopt : ahead->part_of(fetch.from, fetch.bytes());
}

bool read_at_hand(Fetch& fetch) {
  const auto* ahead = dynamic_cast<const ReadAhead*>(fetch.store.get());
  if (ahead == nullptr || !ahead->is_only_copied()) return false;
  std::array<std::byte, kPage4K.bytes().value> unwanted;
  std::span<std::byte> rest = fetch.buffer_bytes();
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
