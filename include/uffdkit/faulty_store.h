// Layer: store
// A store that misbehaves as it is told to: for tests of whoever reads it, and of what comes of it.
//
//   error,rate=0.1,seed=7        one read of a page in ten fails
//   error,times=2                the first two reads of each page fail
//   corrupt,from=4096,to=8192    one bit of each page there arrives inverted
//   stall,while=/tmp/wall        reads wait for as long as that file exists
//
// Which reads are hit follows from the seed, the page and how often that page was read before, and from
// nothing else: threads may come in any order. Holes are not read, so nothing happens to them.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/units.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace uffdkit {

struct StoreFault {
  enum class Kind : std::uint8_t {
    error,       // the read fails with EIO
    short_read,  // the store gives half of what was asked for; an error too, as every short read is
    corrupt,     // the read succeeds, with one bit of the page inverted
    delay,       // the read takes `delay` longer
    stall,       // the read does not come back
  };

  Kind kind = Kind::error;
  double rate = 1;                       // of the reads of a page there, 0 to 1
  StoreOffset from{0};                   // the first page that is concerned
  StoreOffset to{UINT64_MAX};            // and the end, exclusive
  std::uint64_t times = 0;               // each page is hit so often at most, its first reads; 0: no limit
  std::uint64_t seed = 1;                //
  std::chrono::milliseconds delay{100};  // of Kind::delay
  std::string image = {};                // only stores whose name has this in it
  std::string only_while = {};           // only as long as this file exists; a stall ends with it
};

// KIND[,KEY=VALUE]...: error, short, corrupt, delay or stall, with rate=, from=, to=, times=, seed=, ms=,
// image= and while=. from= and to= take K, M and G. Errors name what is wrong.
Result<StoreFault> parse_store_fault(std::string_view text);

// `store`, with these faults. Those that name another image are left out; without any left it is `store`.
std::shared_ptr<Store> make_faulty_store(std::shared_ptr<Store> store, const std::vector<StoreFault>& faults);

}  // namespace uffdkit
