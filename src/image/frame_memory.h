// Memory for decompressed frames, in huge pages where the kernel has them.
//
// A frame of 64 KiB is 16 pages, and to get these from the kernel one by one takes longer than decompressing
// what goes into them, above all in a virtual machine. So frames of the usual sizes are cut from pieces of 2
// MiB, which are given back to the kernel when nothing of them is used any more. Threads: any. The lock is
// held while a piece is mapped or unmapped, and not while its memory is touched.
#pragma once

#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace uffdkit::image {

class FrameMemory : public std::enable_shared_from_this<FrameMemory> {
 public:
  static constexpr std::size_t kPieceBytes = 2u << 20;

  class Deleter {
   public:
    Deleter() = default;
    Deleter(std::shared_ptr<FrameMemory> owner, std::size_t bytes)
        : owner_(std::move(owner)), bytes_(bytes) {}
    void operator()(std::byte* memory) const;

   private:
    std::shared_ptr<FrameMemory> owner_;  // nullptr for memory of the heap
    std::size_t bytes_ = 0;
  };
  using Bytes = std::unique_ptr<std::byte[], Deleter>;

  // Takes no more pieces than these bytes need; what goes beyond comes from the heap.
  explicit FrameMemory(ByteCount bytes_max) : pieces_max_(bytes_max.value / kPieceBytes + 1) {}
  ~FrameMemory();
  FrameMemory(const FrameMemory&) = delete;
  FrameMemory& operator=(const FrameMemory&) = delete;

  // Not set to anything; `bytes` is not 0. The first use of a piece may take half a millisecond, in which the
  // kernel clears a huge page.
  Bytes take(std::size_t bytes);
  static Bytes of_heap(std::size_t bytes) { return {new std::byte[bytes], Deleter()}; }

  // How many pieces there are.
  std::size_t pieces() const;

 private:
  std::byte* take_of_piece(std::size_t bytes);
  void give_back(std::byte* memory, std::size_t bytes);

  const std::size_t pieces_max_;
  mutable std::mutex mutex_;
  std::map<std::byte*, std::vector<std::uint32_t>> pieces_;  // by where they begin: the free frames
  // Of each size, the pieces that have room.
  std::map<std::size_t, std::vector<std::byte*>> with_room_;
};

}  // namespace uffdkit::image
