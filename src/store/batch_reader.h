// Reads of files of which many are under way at once by one thread, where the system has that. Who is given
// none has each read wait on a thread of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace uffdkit {

// Where bytes lie in an open file, as they are.
struct FilePart {
  int file;
  std::uint64_t offset;
};

// Threads: one at a time.
class BatchReader {
 public:
  struct Done {
    std::uint64_t tag;    // of begin()
    std::int64_t result;  // bytes that were read, maybe fewer than asked for; or -errno
  };

  virtual ~BatchReader() = default;
  // How many may be under way at once.
  virtual std::size_t most() const = 0;
  // A read for which wait() will answer; with fewer than most() under way. `to` and the file stay until then.
  virtual void begin(FilePart from, std::span<std::byte> to, std::uint64_t tag) = 0;
  // Waits until at least one of those under way is done; tells each of these once. Valid until the next call.
  virtual std::span<const Done> wait() = 0;
};

// A few of them, for all. Threads: any.
class BatchReaders {
 public:
  virtual ~BatchReaders() = default;
  // nullptr: none is free now, or there never is one.
  virtual BatchReader* take() = 0;
  // Whether there are any, free or not.
  virtual bool has_any() const = 0;
  // With nothing under way.
  virtual void give_back(BatchReader& reader) = 0;
};

// One that is given back by the destructor, if there was one.
class BorrowedReader {
 public:
  explicit BorrowedReader(BatchReaders* readers)
      : readers_(readers), reader_(readers == nullptr ? nullptr : readers->take()) {}
  ~BorrowedReader() {
    if (reader_ != nullptr) readers_->give_back(*reader_);
  }
  BorrowedReader(const BorrowedReader&) = delete;
  BorrowedReader& operator=(const BorrowedReader&) = delete;

  explicit operator bool() const { return reader_ != nullptr; }
  BatchReader* operator->() const { return reader_; }
  BatchReader& operator*() const { return *reader_; }

 private:
  BatchReaders* const readers_;
  BatchReader* const reader_;
};

}  // namespace uffdkit
