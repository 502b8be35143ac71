// Layer: store
// Where page bytes live. A store is anything that can give the bytes of an image by position: a file, memory,
// a computation. Write one by implementing the four methods below.
//
// The contract:
// - Contents never change while the store exists. Bytes that were handed out once may be handed out again.
// - Threads: every method may be called from any thread, several at once.
// - Blocking: size(), name() and extent_at() never block. read() blocks only with Wait::yes. The engine calls
//   it with Wait::no on the thread that serves faults, and when that answers would_block, again with
//   Wait::yes on a thread of the store's own, so that a slow store delays nobody else.
// - Memory: no method may touch memory that is served from this store, by the same pager or another: the
//   thread would wait for itself.
// - Errors are values, and no method throws. An error of read() condemns only the pages that it was asked
//   for.
// - Lifetime: the engine keeps a shared pointer for as long as a region uses the store.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/units.h>

#include <cstddef>
#include <memory>
#include <span>
#include <string>

namespace uffdkit {

// Whether a read may block.
enum class Wait : bool { no, yes };

enum class ReadStatus : std::uint8_t {
  done,         // the buffer is filled, all of it
  would_block,  // nothing is promised about the buffer; only with Wait::no
};

// A stretch of a store of one kind.
struct Extent {
  bool zero;        // all of it is known to be zero (a hole); otherwise it has to be read to know
  StoreOffset end;  // where it ends, exclusive; greater than the position that was asked for
};

class Store {
 public:
  virtual ~Store() = default;

  // The store's length in bytes, a multiple of 4096. Constant.
  virtual ByteCount size() const noexcept = 0;

  // What to call it in messages: a path, for example.
  virtual std::string name() const = 0;

  // The kind of what is at `from` (below size()), and how far it is of this kind.
  virtual Extent extent_at(StoreOffset from) const noexcept = 0;

  // Fills `to` with the bytes at [from, from + to.size()), which lie within size(). All of it or an error: a
  // short read is an error here, never a short success.
  virtual Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept = 0;
};

// A file that holds raw bytes, position by position, such as a Firecracker memory file. Holes are known as
// zero without being read. The last page's bytes beyond the end of the file are zero. The file is read by
// pread(2), never through a mapping, so a failing disk or a file cut short while in use is an error of the
// pages concerned. The file must not be changed while the store exists. Where the caller owns the file, or is
// privileged, reading is not noted as an access (O_NOATIME). Errors of opening: no such file, no permission,
// not a regular file.
Result<std::shared_ptr<Store>> open_file_store(const std::string& path);

// The same for a descriptor that is open for reading; `name` is for messages.
Result<std::shared_ptr<Store>> open_file_store(int fd, const std::string& name);

// `size` bytes of zero; rounded up to whole pages.
std::shared_ptr<Store> make_zero_store(ByteCount size);

// A copy of `bytes`, padded with zeros to whole pages.
std::shared_ptr<Store> make_memory_store(std::span<const std::byte> bytes, std::string name = "memory");

}  // namespace uffdkit
