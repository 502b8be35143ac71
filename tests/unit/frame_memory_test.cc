#include "image/frame_memory.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <set>
#include <vector>

namespace uffdkit::image {
namespace {

constexpr std::size_t kFrameBytes = 64u << 10;
constexpr std::size_t kFramesPerPiece = FrameMemory::kPieceBytes / kFrameBytes;

std::shared_ptr<FrameMemory> memory_of(std::size_t pieces) {
  return std::make_shared<FrameMemory>(ByteCount(pieces * FrameMemory::kPieceBytes));
}

TEST(FrameMemory, FramesOfAPieceDoNotOverlap) {
  const auto memory = memory_of(4);
  std::vector<FrameMemory::Bytes> frames;
  std::set<std::byte*> places;
  for (std::size_t i = 0; i < 3 * kFramesPerPiece; ++i) {
    frames.push_back(memory->take(kFrameBytes));
    std::memset(frames.back().get(), static_cast<int>(i), kFrameBytes);
    places.insert(frames.back().get());
  }
  EXPECT_EQ(places.size(), frames.size());
  EXPECT_EQ(memory->pieces(), 3u);
  for (std::size_t i = 0; i < frames.size(); ++i) {
    EXPECT_EQ(frames[i][0], static_cast<std::byte>(i));
    EXPECT_EQ(frames[i][kFrameBytes - 1], static_cast<std::byte>(i));
  }
}

TEST(FrameMemory, WhatWasGivenBackIsUsedAgain) {
  const auto memory = memory_of(4);
  for (std::size_t i = 0; i < 10 * kFramesPerPiece; ++i) (void)memory->take(kFrameBytes);
  EXPECT_EQ(memory->pieces(), 1u);
}

TEST(FrameMemory, BeyondItsBoundTheHeapServes) {
  const auto memory = memory_of(1);
  std::vector<FrameMemory::Bytes> frames;
  for (std::size_t i = 0; i < 5 * kFramesPerPiece; ++i) {
    frames.push_back(memory->take(kFrameBytes));
    std::memset(frames.back().get(), 1, kFrameBytes);
  }
  EXPECT_LE(memory->pieces(), 2u);
}

TEST(FrameMemory, UnusualSizesComeFromTheHeap) {
  const auto memory = memory_of(4);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{4096}, kFrameBytes + 1, std::size_t{4} << 20}) {
    const FrameMemory::Bytes frame = memory->take(bytes);
    std::memset(frame.get(), 1, bytes);
  }
  EXPECT_EQ(memory->pieces(), 0u);
}

TEST(FrameMemory, MostOfWhatNobodyUsesGoesBackToTheKernel) {
  const auto memory = memory_of(64);
  std::vector<FrameMemory::Bytes> frames;
  for (std::size_t i = 0; i < 60 * kFramesPerPiece; ++i) frames.push_back(memory->take(kFrameBytes));
  EXPECT_EQ(memory->pieces(), 60u);
  frames.clear();
  EXPECT_LT(memory->pieces(), 8u);
}

TEST(FrameMemory, AFrameOutlivesWhoeverMadeTheMemory) {
  auto memory = memory_of(1);
  const FrameMemory::Bytes frame = memory->take(kFrameBytes);
  memory.reset();
  std::memset(frame.get(), 1, kFrameBytes);
  EXPECT_EQ(frame[kFrameBytes - 1], std::byte{1});
}

}  // namespace
}  // namespace uffdkit::image
