// Pages on their way from a store to a client's memory.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <bitset>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "store/batch_reader.h"

namespace uffdkit {

// The most granules that one fetch brings: one huge page.
inline constexpr std::size_t kFetchGranulesMax = 512;

class SharedImage;

// Who wants it, most urgent first.
enum class Urgency : std::uint8_t {
  demand,      // a fault waits for it
  prefetch,    // it is expected to be asked for
  background,  // nobody has asked for it
};

// A run of pages that lie one behind the other, of those that a fetch brings which was not asked for.
struct FetchPiece {
  StoreOffset from;
  PageRange granules;  // of the fetch's region
  bool read = true;    // false: it is only to be brought from the disk, and its bytes are not wanted
};

struct Fetch {
  std::uint64_t id;  // within its session
  PageCount granules;
  StoreOffset from;
  std::shared_ptr<Store> store;
  // Whose pages it brings, for a region that shares them; such a fetch has no buffer.
  std::shared_ptr<SharedImage> shared;
  std::unique_ptr<std::byte[]> buffer;    // `granules` pages, filled by read_fetch()
  std::bitset<kFetchGranulesMax> failed;  // pages that could not be read (bit 0: the first)
  std::optional<Error> error;             // the first failure
  unsigned retries = 0;                   // how often it was tried again
  Urgency urgency = Urgency::demand;
  // Of a fetch that is not for a fault: what it brings, in the place of one run from `from` on. `buffer` has
  // the bytes of those that are read, one behind the other, and `granules` counts them. `region`: see
  // Session::RegionServing.
  std::vector<FetchPiece> pieces{};
  std::uint32_t region = 0;
  std::uint64_t region_serial = 0;

  ByteCount bytes() const { return kPage4K.bytes(granules); }
  std::span<std::byte> buffer_bytes() const { return {buffer.get(), bytes().value}; }
};

// Reads a fetch's bytes, waiting as long as it takes. When the whole cannot be read, each page is tried
// alone, so that one bad page does not condemn its neighbours. A piece that cannot be read is left out whole.
// Many small pieces are read by one of `readers` (nullptr: there are none) if one is free.
void read_fetch(Fetch& fetch, BatchReaders* readers = nullptr);

// Where the file is whose part fills the buffer of a fetch for a fault, if that is so small that a
// BatchReader is the better the more such reads there are. None: read_fetch() it.
std::optional<FilePart> small_part(const Fetch& fetch);

// Reads what was not asked for, if none of it has to be waited for or worked for, holes and what is left out
// included. False: some of it has, and what the buffer has is of no use.
bool read_at_hand(Fetch& fetch);

// Tries the pages again that have failed.
void read_failed_again(Fetch& fetch);

// Where a fetch goes when it has been read. Called from any thread.
class FetchSink {
 public:
  virtual ~FetchSink() = default;
  virtual void fetched(std::unique_ptr<Fetch> fetch) = 0;
};

}  // namespace uffdkit
