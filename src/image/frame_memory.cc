#include "image/frame_memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>

#include "base/address_space.h"

namespace uffdkit::image {
namespace {

constexpr std::ptrdiff_t kEmptyPiecesKept = 4;  // of each size

// Of frames that have another size there are few: the last ones of images.
bool is_usual(std::size_t bytes) {
  return std::has_single_bit(bytes) && bytes >= 16u << 10 && bytes <= 1u << 20;
}

// A piece that begins at a multiple of its length; nullptr if there is none.
std::byte* map_piece() {
  constexpr std::size_t kBytes = FrameMemory::kPieceBytes;
  void* const piece = take_addresses(kBytes, kBytes);
  if (piece == MAP_FAILED) return nullptr;
  if (::mprotect(piece, kBytes, PROT_READ | PROT_WRITE) != 0) {
    ::munmap(piece, kBytes);
    return nullptr;
  }
  // Without huge pages it is memory like other.
  (void)::madvise(piece, kBytes, MADV_HUGEPAGE);
  return static_cast<std::byte*>(piece);
}

std::byte* piece_of(std::byte* memory) {
  return memory - reinterpret_cast<std::uintptr_t>(memory) % FrameMemory::kPieceBytes;
}

}  // namespace

void FrameMemory::Deleter::operator()(std::byte* memory) const {
  if (owner_ != nullptr)
    owner_->give_back(memory, bytes_);
  else
    delete[] memory;
}

FrameMemory::~FrameMemory() {
  for (const auto& [memory, free] : pieces_) ::munmap(memory, kPieceBytes);
}

FrameMemory::Bytes FrameMemory::take(std::size_t bytes) {
  if (is_usual(bytes))
    if (std::byte* memory = take_of_piece(bytes)) return {memory, Deleter(shared_from_this(), bytes)};
  return of_heap(bytes);
}

std::byte* FrameMemory::take_of_piece(std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  std::vector<std::byte*>& with_room = with_room_[bytes];
  if (with_room.empty()) {
    if (pieces_.size() == pieces_max_) return nullptr;
    std::byte* memory = map_piece();
    if (memory == nullptr) return nullptr;
    std::vector<std::uint32_t>& free = pieces_[memory];
    for (std::size_t i = kPieceBytes / bytes; i-- > 0;) free.push_back(static_cast<std::uint32_t>(i));
    with_room.push_back(memory);
  }
  std::byte* const memory = with_room.back();
  std::vector<std::uint32_t>& free = pieces_.at(memory);
  std::byte* const frame = memory + free.back() * bytes;
  free.pop_back();
  if (free.empty()) with_room.pop_back();
  return frame;
}

void FrameMemory::give_back(std::byte* frame, std::size_t bytes) {
  const std::lock_guard lock(mutex_);
  std::byte* const memory = piece_of(frame);
  std::vector<std::uint32_t>& free = pieces_.at(memory);
  std::vector<std::byte*>& with_room = with_room_[bytes];
  if (free.empty()) with_room.push_back(memory);
  free.push_back(static_cast<std::uint32_t>(static_cast<std::size_t>(frame - memory) / bytes));
  if (free.size() < kPieceBytes / bytes) return;
  // Frames come and go, and a piece that was there is had for nothing.
  if (std::ranges::count_if(with_room, [&](std::byte* piece) {
        return pieces_.at(piece).size() == kPieceBytes / bytes;
      }) <= kEmptyPiecesKept)
    return;
  std::erase(with_room, memory);
  pieces_.erase(memory);
  ::munmap(memory, kPieceBytes);
}

std::size_t FrameMemory::pieces() const {
  const std::lock_guard lock(mutex_);
  return pieces_.size();
}

}  // namespace uffdkit::image
