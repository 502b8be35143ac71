// Layer: store
// What a store has, besides Store, if it can be read inside a signal handler, as SigbusPager does.
//
//   class Squares final : public uffdkit::Store, public uffdkit::SignalSafeStore { ...
//
// The stores of files, memory and zeros (store.h) have it.
#pragma once

#include <uffdkit/units.h>

#include <cstddef>
#include <span>

namespace uffdkit {

// The store's size() and extent_at() are async-signal-safe then too: no allocation, no lock, no text.
class SignalSafeStore {
 public:
  virtual ~SignalSafeStore() = default;

  // As Store::read() with Wait::yes. Returns 0, or the errno of what went wrong. Any thread, several at once.
  virtual int read_in_handler(StoreOffset from, std::span<std::byte> to) noexcept = 0;
};

}  // namespace uffdkit
