#include "wire/criu_protocol.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

#include "support/pieces.h"

namespace uffdkit::criu {
namespace {

using test::end_of_stream;
using test::piece_of;
using test::WatchedFds;

std::string number(std::int32_t value) {
  std::string text;
  for (int i = 0; i < 4; ++i) text += static_cast<char>(static_cast<std::uint32_t>(value) >> (8 * i) & 0xff);
  return text;
}

const std::string kZero(1, '\0');

TEST(CriuProtocol, ATaskIsItsNumberAndThenItsDescriptor) {
  WatchedFds fds;
  RestoreDecoder decoder;
  const std::string pid = number(4711);
  auto first = decoder.feed(piece_of(pid));
  ASSERT_TRUE(first);
  EXPECT_TRUE(first->empty());
  auto second = decoder.feed(piece_of(kZero, fds.make(1)));
  ASSERT_TRUE(second && second->size() == 1);
  const auto& task = std::get<TaskRestored>(second->front());
  EXPECT_EQ(task.pid, 4711);
  EXPECT_TRUE(task.uffd);
}

TEST(CriuProtocol, PiecesMayBeCutAndJoinedAnywhere) {
  const std::string zombie = number(-7);
  const std::string before = zombie.substr(0, 3);
  // The end of one number, all of the next, and the byte that its descriptor comes with.
  const std::string joined = zombie.substr(3) + number(8) + kZero;
  WatchedFds fds;
  RestoreDecoder decoder;
  EXPECT_TRUE(decoder.feed(piece_of(before))->empty());
  const auto messages = decoder.feed(piece_of(joined, fds.make(1)));
  ASSERT_TRUE(messages && messages->size() == 2);
  EXPECT_EQ(std::get<ZombieRestored>((*messages)[0]).pid, 7);
  EXPECT_EQ(std::get<TaskRestored>((*messages)[1]).pid, 8);
  const std::string number_of_the_end = number(0x52535446);
  const auto end = decoder.feed(piece_of(number_of_the_end));
  ASSERT_TRUE(end && end->size() == 1);
  EXPECT_TRUE(std::holds_alternative<RestoreFinished>(end->front()));
  EXPECT_TRUE(decoder.finished());
  EXPECT_TRUE(decoder.feed(end_of_stream()));
}

TEST(CriuProtocol, TheEndBeforeTheRestoreIsFinishedIsAnError) {
  RestoreDecoder decoder;
  const auto ended = decoder.feed(end_of_stream());
  ASSERT_FALSE(ended);
  EXPECT_NE(ended.error().message().find("gone before it was done"), std::string::npos);
}

TEST(CriuProtocol, WhatIsNotInTurnIsRefused) {
  const std::string pid = number(5);
  const std::string none = number(0);
  const std::string finished_and_more = number(0x52535446) + "x";
  WatchedFds fds;
  {
    RestoreDecoder decoder;  // a byte without a descriptor
    EXPECT_TRUE(decoder.feed(piece_of(pid)));
    EXPECT_FALSE(decoder.feed(piece_of(kZero)));
  }
  {
    RestoreDecoder decoder;  // two descriptors
    EXPECT_TRUE(decoder.feed(piece_of(pid)));
    EXPECT_FALSE(decoder.feed(piece_of(kZero, fds.make(2))));
  }
  {
    RestoreDecoder decoder;  // a descriptor with a number
    EXPECT_FALSE(decoder.feed(piece_of(pid, fds.make(1))));
  }
  EXPECT_FALSE(RestoreDecoder().feed(piece_of(none)));
  EXPECT_FALSE(RestoreDecoder().feed(piece_of(finished_and_more)));
  Piece lost = piece_of(pid);
  lost.fds_lost = true;
  EXPECT_FALSE(RestoreDecoder().feed(std::move(lost)));
  EXPECT_TRUE(fds.all_closed());
}

TEST(CriuProtocol, TakesAnyBytesAndKeepsNoDescriptor) {
  const std::uint32_t seed = 20260823;
  std::mt19937 random(seed);
  WatchedFds fds;
  for (int round = 0; round < 2000; ++round) {
    RestoreDecoder decoder;
    for (int i = 0; i < 20; ++i) {
      std::string bytes(random() % 12, '\0');
      for (char& c : bytes) c = static_cast<char>(random() % 3 == 0 ? random() : 0);
      if (!decoder.feed(piece_of(bytes, fds.make(static_cast<int>(random() % 3))))) break;
    }
  }
  EXPECT_TRUE(fds.all_closed()) << "seed " << seed;
}

}  // namespace
}  // namespace uffdkit::criu
