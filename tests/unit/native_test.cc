#include "wire/native.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <fstream>
#include <random>
#include <sstream>

#include "support/paths.h"
#include "support/pieces.h"

namespace uffdkit::native {
namespace {

using test::end_of_stream;
using test::WatchedFds;
using Reads = FrameReader::Reads;

UniqueFd one_fd() {
  return std::move(WatchedFds().make(1)[0]);
}

Piece piece_of(std::span<const std::byte> bytes, std::vector<UniqueFd> fds = {}) {
  return {.bytes = bytes, .fds = std::move(fds)};
}

const std::vector<RequestedRegion> kRegions = {{.memory = {Address(0x7f1122334000), ByteCount(0x10000)},
                                                .offset = StoreOffset(0x2000),
                                                .page_size = kPage4K},
                                               {.memory = {Address(0x7f1100000000), ByteCount(0x40000000)},
                                                .offset = StoreOffset(0),
                                                .page_size = kPage2M}};

// One of every request, with values that no other field has.
std::vector<Request> every_request() {
  std::vector<Request> requests;
  requests.emplace_back(Hello{.version_min = 1, .version_max = 7});
  requests.emplace_back(ImageInfo{.image = "guest.mem"});
  requests.emplace_back(Attach{.request = {.image = "guest.mem", .regions = kRegions},
                               .uffd = one_fd(),
                               .sharing = SharingMode::resolve});
  requests.emplace_back(Resume{.session = SessionId{77}, .uffd = one_fd(), .state_file = one_fd()});
  requests.emplace_back(AddRegions{.regions = kRegions});
  requests.emplace_back(DropRegions{.ranges = {{Address(0x1000), ByteCount(0x2000)}}});
  requests.emplace_back(Detach{.mode = DetachMode::populate});
  requests.emplace_back(Query{});
  requests.emplace_back(ShareImage{.image = "guest.mem", .removed_reads_zero = true});
  return requests;
}

std::vector<Answer> every_answer() {
  std::vector<Answer> answers;
  answers.emplace_back(Welcome{.version = 1, .features = 0x8000000000000001});
  answers.emplace_back(ImageSize{.size = ByteCount(1 << 30)});
  answers.emplace_back(Attached{
      .session = SessionId{77}, .image_size = ByteCount(1 << 30), .regions = 2, .state_file = one_fd()});
  answers.emplace_back(Ok{});
  answers.emplace_back(Status{.pages_served = 123456789012, .faults_pending = 3});
  answers.emplace_back(Refused{.code = ErrorCode::busy, .message = "served by process 12"});
  answers.emplace_back(
      ImageMemory{.size = ByteCount(1 << 30), .mode = SharingMode::page_cache, .memory = one_fd()});
  return answers;
}

// The frame of a single encoded message.
Result<Frame> frame_of(OutgoingFrame outgoing, Reads reads) {
  FrameReader reader(reads);
  auto frames = reader.feed(piece_of(outgoing.bytes, std::move(outgoing.fds)));
  if (!frames) return Failure(frames.error());
  EXPECT_EQ(frames->size(), 1u);
  return std::move(frames->at(0));
}

template <class Message>
Message request_through(Request request) {
  auto frame = frame_of(encode_request(5, std::move(request)), Reads::requests);
  EXPECT_TRUE(frame);
  EXPECT_EQ(frame->request_id, 5u);
  auto decoded = decode_request(std::move(*frame));
  EXPECT_TRUE(decoded) << decoded.error().text();
  return std::get<Message>(std::move(*decoded));
}

template <class Message>
Message answer_through(Answer answer) {
  auto frame = frame_of(encode_answer(6, std::move(answer)), Reads::answers);
  EXPECT_TRUE(frame);
  EXPECT_EQ(frame->request_id, 6u);
  auto decoded = decode_answer(std::move(*frame));
  EXPECT_TRUE(decoded) << decoded.error().text();
  return std::get<Message>(std::move(*decoded));
}

TEST(Native, EveryRequestComesBackFromItsEncoding) {
  auto requests = every_request();
  const auto hello = request_through<Hello>(std::move(requests[0]));
  EXPECT_EQ(hello.version_min, 1);
  EXPECT_EQ(hello.version_max, 7);
  EXPECT_EQ(request_through<ImageInfo>(std::move(requests[1])).image, "guest.mem");
  const int uffd = std::get<Attach>(requests[2]).uffd.get();
  const auto attach = request_through<Attach>(std::move(requests[2]));
  EXPECT_EQ(attach.request.image, "guest.mem");
  EXPECT_EQ(attach.request.regions, kRegions);
  EXPECT_EQ(attach.uffd.get(), uffd);
  EXPECT_EQ(attach.sharing, SharingMode::resolve);
  const int resumed = std::get<Resume>(requests[3]).uffd.get();
  const int state = std::get<Resume>(requests[3]).state_file.get();
  const auto resume = request_through<Resume>(std::move(requests[3]));
  EXPECT_EQ(resume.session, SessionId{77});
  EXPECT_EQ(resume.uffd.get(), resumed);
  EXPECT_EQ(resume.state_file.get(), state);
  EXPECT_EQ(request_through<AddRegions>(std::move(requests[4])).regions, kRegions);
  const auto drop = request_through<DropRegions>(std::move(requests[5]));
  EXPECT_EQ(drop.ranges, (std::vector<AddressRange>{{Address(0x1000), ByteCount(0x2000)}}));
  EXPECT_EQ(request_through<Detach>(std::move(requests[6])).mode, DetachMode::populate);
  request_through<Query>(std::move(requests[7]));
  const auto share = request_through<ShareImage>(std::move(requests[8]));
  EXPECT_EQ(share.image, "guest.mem");
  EXPECT_TRUE(share.removed_reads_zero);
}

TEST(Native, EveryAnswerComesBackFromItsEncoding) {
  auto answers = every_answer();
  const auto welcome = answer_through<Welcome>(std::move(answers[0]));
  EXPECT_EQ(welcome.version, 1);
  EXPECT_EQ(welcome.features, 0x8000000000000001);
  EXPECT_EQ(answer_through<ImageSize>(std::move(answers[1])).size, ByteCount(1 << 30));
  const auto attached = answer_through<Attached>(std::move(answers[2]));
  EXPECT_EQ(attached.session, SessionId{77});
  EXPECT_EQ(attached.image_size, ByteCount(1 << 30));
  EXPECT_EQ(attached.regions, 2u);
  EXPECT_TRUE(attached.state_file);
  answer_through<Ok>(std::move(answers[3]));
  const auto status = answer_through<Status>(std::move(answers[4]));
  EXPECT_EQ(status.pages_served, 123456789012u);
  EXPECT_EQ(status.faults_pending, 3u);
  const auto refused = answer_through<Refused>(std::move(answers[5]));
  EXPECT_EQ(refused.code, ErrorCode::busy);
  EXPECT_EQ(refused.message, "served by process 12");
  const auto memory = answer_through<ImageMemory>(std::move(answers[6]));
  EXPECT_EQ(memory.size, ByteCount(1 << 30));
  EXPECT_EQ(memory.mode, SharingMode::page_cache);
  EXPECT_TRUE(memory.memory);
}

TEST(Native, TheLargestAttachFitsIntoAFrame) {
  const std::vector<RequestedRegion> regions(kRegionsMax, kRegions[0]);
  const std::string name(kImageNameBytesMax, 'n');
  const auto attach =
      request_through<Attach>(Attach{.request = {.image = name, .regions = regions}, .uffd = one_fd()});
  EXPECT_EQ(attach.request.regions.size(), kRegionsMax);
  EXPECT_EQ(attach.request.image, name);
}

TEST(Native, ALongErrorMessageIsCut) {
  const auto refused =
      answer_through<Refused>(Refused{.code = ErrorCode::internal, .message = std::string(100'000, 'x')});
  EXPECT_EQ(refused.message.size(), kErrorMessageBytesMax);
}

// All requests one after another, descriptors with the first byte of their frame, cut at `cut` at the latest.
void feed_all_with_cut(std::size_t cut) {
  std::size_t index = 0;
  FrameReader reader(Reads::requests);
  for (Request& request : every_request()) {
    OutgoingFrame frame = encode_request(static_cast<std::uint32_t>(index), std::move(request));
    const std::size_t first = std::min(cut, frame.bytes.size());
    const std::span<const std::byte> bytes(frame.bytes);
    auto frames = reader.feed(piece_of(bytes.first(first), std::move(frame.fds)));
    ASSERT_TRUE(frames) << frames.error().text();
    if (first < bytes.size()) {
      ASSERT_TRUE(frames->empty());
      frames = reader.feed(piece_of(bytes.subspan(first)));
      ASSERT_TRUE(frames) << frames.error().text();
    }
    ASSERT_EQ(frames->size(), 1u);
    const auto decoded = decode_request(std::move(frames->at(0)));
    ASSERT_TRUE(decoded);
    ASSERT_EQ(decoded->index(), index++);
  }
  EXPECT_TRUE(reader.feed(end_of_stream()));
}

TEST(FrameReader, AFrameMayBeCutAnywhere) {
  for (std::size_t cut = 1; cut < 130; ++cut) {
    SCOPED_TRACE(cut);
    feed_all_with_cut(cut);
  }
}

TEST(FrameReader, SeveralFramesMayComeAtOnce) {
  std::vector<std::byte> bytes;
  for (std::uint32_t id = 0; id < 3; ++id) {
    const OutgoingFrame frame = encode_request(id, Query{});
    bytes.insert(bytes.end(), frame.bytes.begin(), frame.bytes.end());
  }
  const std::size_t cut = bytes.size() - 1;
  FrameReader reader(Reads::requests);
  auto frames = reader.feed(piece_of(std::span(bytes).first(cut)));
  ASSERT_TRUE(frames);
  EXPECT_EQ(frames->size(), 2u);
  frames = reader.feed(piece_of(std::span(bytes).subspan(cut)));
  ASSERT_TRUE(frames);
  ASSERT_EQ(frames->size(), 1u);
  EXPECT_EQ(frames->at(0).request_id, 2u);
}

// As the kernel does with what is sent before anything is received.
TEST(FrameReader, DescriptorsMayComeWithTheFramesBeforeTheirOwn) {
  OutgoingFrame hello = encode_request(1, Hello{});
  OutgoingFrame attach =
      encode_request(2, Attach{.request = {.image = "guest", .regions = kRegions}, .uffd = one_fd()});
  std::vector<std::byte> bytes = hello.bytes;
  bytes.insert(bytes.end(), attach.bytes.begin(), attach.bytes.end());
  FrameReader reader(Reads::requests);
  auto frames = reader.feed(piece_of(bytes, std::move(attach.fds)));
  ASSERT_TRUE(frames) << frames.error().text();
  ASSERT_EQ(frames->size(), 2u);
  EXPECT_TRUE(frames->front().fds.empty());
  EXPECT_EQ(frames->back().fds.size(), 1u);
}

TEST(FrameReader, ATypeOfALaterVersionIsPassedOnAndItsDescriptorsAreClosed) {
  OutgoingFrame frame = encode_request(9, Query{});
  frame.bytes[6] = std::byte{0x42};
  WatchedFds watched;
  FrameReader reader(Reads::requests);
  auto frames = reader.feed(piece_of(frame.bytes, watched.make(3)));
  ASSERT_TRUE(frames && frames->size() == 1);
  EXPECT_EQ(frames->at(0).request_id, 9u);
  const auto request = decode_request(std::move(frames->at(0)));
  ASSERT_TRUE(request);
  EXPECT_EQ(std::get<Unsupported>(*request).type, 0x42);
  EXPECT_TRUE(watched.all_closed());
  EXPECT_TRUE(reader.feed(piece_of(encode_request(10, Query{}).bytes)));
}

TEST(FrameReader, AnAnswerIsNoRequestAndARequestNoAnswer) {
  auto frame = frame_of(encode_answer(1, Ok{}), Reads::requests);
  ASSERT_TRUE(frame);
  EXPECT_TRUE(std::holds_alternative<Unsupported>(decode_request(std::move(*frame)).value()));
  frame = frame_of(encode_request(1, Query{}), Reads::answers);
  ASSERT_TRUE(frame);
  EXPECT_FALSE(decode_answer(std::move(*frame)));
}

struct BadDescriptors {
  const char* name;
  std::size_t request;  // into every_request()
  int fds;
};

class BadDescriptorsTest : public testing::TestWithParam<BadDescriptors> {};

TEST_P(BadDescriptorsTest, AreRefusedAndClosed) {
  WatchedFds watched;
  {
    auto requests = every_request();
    const OutgoingFrame frame = encode_request(1, std::move(requests[GetParam().request]));
    FrameReader reader(Reads::requests);
    EXPECT_FALSE(reader.feed(piece_of(frame.bytes, watched.make(GetParam().fds))));
  }
  EXPECT_TRUE(watched.all_closed());
}

INSTANTIATE_TEST_SUITE_P(
    FrameReader, BadDescriptorsTest,
    testing::Values(BadDescriptors{"OneWithHello", 0, 1}, BadDescriptors{"NoneWithAttach", 2, 0},
                    BadDescriptors{"TwoWithAttach", 2, 2}, BadDescriptors{"OneWithResume", 3, 1},
                    BadDescriptors{"ThreeWithResume", 3, 3}, BadDescriptors{"OneWithQuery", 7, 1},
                    BadDescriptors{"OneWithShareImage", 8, 1}),
    [](const auto& test) { return test.param.name; });

TEST(FrameReader, NobodyCanMakeItHoldManyDescriptors) {
  const OutgoingFrame frame = encode_request(1, Query{});
  FrameReader reader(Reads::requests);
  const std::span<const std::byte> bytes(frame.bytes);
  EXPECT_TRUE(reader.feed(piece_of(bytes.first(1), WatchedFds().make(8))));
  EXPECT_FALSE(reader.feed(piece_of(bytes.subspan(1, 1), WatchedFds().make(1))));
}

TEST(FrameReader, LostDescriptorsAreAnError) {
  const OutgoingFrame frame = encode_request(1, Query{});
  FrameReader reader(Reads::requests);
  Piece piece = piece_of(frame.bytes);
  piece.fds_lost = true;
  EXPECT_FALSE(reader.feed(std::move(piece)));
}

TEST(FrameReader, TheEndWithinAFrameIsAnError) {
  const OutgoingFrame frame = encode_request(1, Query{});
  for (std::size_t bytes = 1; bytes < frame.bytes.size(); ++bytes) {
    FrameReader reader(Reads::requests);
    EXPECT_TRUE(reader.feed(piece_of(std::span(frame.bytes).first(bytes))));
    EXPECT_FALSE(reader.feed(end_of_stream())) << bytes;
  }
}

// A good frame with one field of its bytes replaced.
struct BadBytes {
  const char* name;
  std::size_t request;  // into every_request()
  std::size_t at;       // position in the frame
  std::vector<std::uint8_t> bytes;
  std::string said;
};

class BadBytesTest : public testing::TestWithParam<BadBytes> {};

TEST_P(BadBytesTest, AreRefusedWithTheReason) {
  auto requests = every_request();
  OutgoingFrame outgoing = encode_request(1, std::move(requests[GetParam().request]));
  for (std::size_t i = 0; i < GetParam().bytes.size(); ++i)
    outgoing.bytes.at(GetParam().at + i) = static_cast<std::byte>(GetParam().bytes[i]);
  Error error("");
  if (auto frame = frame_of(std::move(outgoing), Reads::requests); !frame) {
    error = frame.error();
  } else {
    const auto request = decode_request(std::move(*frame));
    ASSERT_FALSE(request);
    error = request.error();
  }
  EXPECT_NE(error.message().find(GetParam().said), std::string::npos) << error.message();
}

INSTANTIATE_TEST_SUITE_P(
    Native, BadBytesTest,
    testing::Values(
        BadBytes{"Magic", 0, 0, {'x'}, "begins with"}, BadBytes{"Version", 0, 4, {2}, "version 2"},
        BadBytes{"PayloadTooLarge", 0, 8, {1, 0, 1, 0}, "65537"},
        BadBytes{"HelloVersionsReversed", 0, 16, {9, 0, 8, 0}, "lowest"},
        BadBytes{"HelloFlags", 0, 20, {1}, "flags"},
        BadBytes{"ImageInfoFlags", 1, 16, {0, 0, 0, 0x80}, "flags"},
        BadBytes{"ImageNameLongerThanThePayload", 1, 20, {10, 0}, "too short"},
        BadBytes{"ImageNameShorterThanThePayload", 1, 20, {8, 0}, "1 bytes too many"},
        BadBytes{"ImageNameTooLong", 1, 20, {1, 4}, "1025"},
        BadBytes{"ImageNameWithZeroByte", 1, 25, {0}, "zero byte"},
        BadBytes{"AttachSharing", 2, 16, {3}, "sharing mode 3"},
        BadBytes{"AttachNoRegion", 2, 20, {0}, "count is 0"},
        BadBytes{"AttachFewerRegionsThanCounted", 2, 20, {3}, "too short"},
        BadBytes{"AttachMoreRegionsThanCounted", 2, 20, {1}, ""},
        BadBytes{"AttachTooManyRegions", 2, 20, {0xe9, 3}, "1001"},
        BadBytes{"AttachCountThatOverflows", 2, 20, {1, 0, 0, 0x80}, "limit"},
        BadBytes{"AttachPageSize", 2, 48, {0, 0x20}, "page size 8192"},
        BadBytes{"AttachRegionFlags", 2, 52, {1}, "flags"}, BadBytes{"ResumeFlags", 3, 16, {1}, "flags"},
        BadBytes{"ResumeReserved", 3, 20, {1}, "reserved"}, BadBytes{"DropFlags", 5, 16, {1}, "flags"},
        BadBytes{"DropCount", 5, 20, {2}, "too short"}, BadBytes{"DetachFlags", 6, 16, {1}, "flags"},
        BadBytes{"DetachModeZero", 6, 20, {0}, "mode 0"}, BadBytes{"DetachModeUnknown", 6, 20, {3}, "mode 3"},
        BadBytes{"QueryFlags", 7, 16, {1}, "flags"}, BadBytes{"ShareImageFlags", 8, 16, {2}, "flags"}),
    [](const auto& test) { return test.param.name; });

TEST(Native, APayloadOneByteShortOrLongIsRefused) {
  for (std::size_t i = 0; i < every_request().size(); ++i) {
    for (const int change : {-1, 1}) {
      auto requests = every_request();
      auto frame = frame_of(encode_request(1, std::move(requests[i])), Reads::requests);
      ASSERT_TRUE(frame);
      frame->payload.resize(frame->payload.size() + static_cast<std::size_t>(change));
      EXPECT_FALSE(decode_request(std::move(*frame))) << "request " << i << ", change " << change;
    }
  }
  for (std::size_t i = 0; i < every_answer().size(); ++i) {
    auto answers = every_answer();
    auto frame = frame_of(encode_answer(1, std::move(answers[i])), Reads::answers);
    ASSERT_TRUE(frame);
    frame->payload.emplace_back();
    EXPECT_FALSE(decode_answer(std::move(*frame))) << "answer " << i;
  }
}

TEST(Native, GarbageNeverCrashesTheDecoders) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  for (int round = 0; round < 5000; ++round) {
    const bool requests = random() % 2 == 0;
    OutgoingFrame frame;
    if (requests) {
      auto all = every_request();
      frame = encode_request(1, std::move(all[random() % all.size()]));
    } else {
      auto all = every_answer();
      frame = encode_answer(1, std::move(all[random() % all.size()]));
    }
    const auto changes = random() % 6;
    for (unsigned i = 0; i < changes; ++i) {
      constexpr std::size_t kFrom =
          6;  // what is before it is magic and version, whose refusal is tested above
      frame.bytes[kFrom + random() % (frame.bytes.size() - kFrom)] = static_cast<std::byte>(random());
    }
    FrameReader reader(requests ? Reads::requests : Reads::answers);
    std::span<const std::byte> rest(frame.bytes);
    while (!rest.empty()) {
      const std::size_t cut = 1 + random() % rest.size();
      auto frames = reader.feed(piece_of(rest.first(cut), std::exchange(frame.fds, {})));
      if (!frames) break;
      for (Frame& whole : *frames) {
        std::string error = "none";
        if (requests) {
          if (const auto request = decode_request(std::move(whole)); !request)
            error = request.error().message();
        } else {
          if (const auto answer = decode_answer(std::move(whole)); !answer) error = answer.error().message();
        }
        EXPECT_FALSE(error.empty());
      }
      rest = rest.subspan(cut);
    }
  }
}

TEST(Native, AnImageMemoryWithoutAModeIsRefused) {
  auto frame = frame_of(
      encode_answer(
          1, ImageMemory{.size = ByteCount(4096), .mode = SharingMode::page_cache, .memory = one_fd()}),
      Reads::answers);
  ASSERT_TRUE(frame);
  frame->payload[8] = std::byte{0};
  EXPECT_FALSE(decode_answer(std::move(*frame)));
}

// The bytes after `marker` in docs/protocol.md, up to the end of its code block: in each line, the
// hexadecimal numbers before two spaces.
std::vector<std::byte> documented_bytes(const std::string& marker) {
  std::ifstream file(test::in_source("docs/protocol.md"));
  std::string line;
  while (std::getline(file, line) && line != marker) {
  }
  std::vector<std::byte> bytes;
  while (std::getline(file, line) && !line.starts_with("```")) {
    std::istringstream numbers(line.substr(0, line.find("  ")));
    for (std::string number; numbers >> number;)
      bytes.push_back(static_cast<std::byte>(std::stoul(number, nullptr, 16)));
  }
  return bytes;
}

std::vector<std::byte> documented_block(const std::string& marker) {
  std::vector<std::byte> bytes = documented_bytes(marker);
  EXPECT_FALSE(bytes.empty()) << marker;
  return bytes;
}

TEST(Native, TheExampleInTheDocumentIsWhatTheEncodersWrite) {
  EXPECT_EQ(documented_block("```hex HELLO"), encode_request(1, Hello{}).bytes);
  EXPECT_EQ(documented_block("```hex WELCOME"), encode_answer(1, Welcome{}).bytes);
  EXPECT_EQ(documented_block("```hex IMAGE_INFO"), encode_request(2, ImageInfo{.image = "guest.mem"}).bytes);
  EXPECT_EQ(documented_block("```hex IMAGE_SIZE"),
            encode_answer(2, ImageSize{.size = ByteCount(0x10000000)}).bytes);
  const RequestedRegion region{.memory = {Address(0x7f4a80000000), ByteCount(0x10000000)},
                               .offset = StoreOffset(0),
                               .page_size = kPage4K};
  EXPECT_EQ(documented_block("```hex SHARE_IMAGE"),
            encode_request(3, ShareImage{.image = "guest.mem"}).bytes);
  EXPECT_EQ(
      documented_block("```hex IMAGE_MEMORY"),
      encode_answer(
          3, ImageMemory{.size = ByteCount(0x10000000), .mode = SharingMode::page_cache, .memory = one_fd()})
          .bytes);
  EXPECT_EQ(
      documented_block("```hex ATTACH"),
      encode_request(3, Attach{.request = {.image = "guest.mem", .regions = {region}}, .uffd = one_fd()})
          .bytes);
  EXPECT_EQ(documented_block("```hex ATTACHED"),
            encode_answer(3, Attached{.session = SessionId{1},
                                      .image_size = ByteCount(0x10000000),
                                      .regions = 1,
                                      .state_file = one_fd()})
                .bytes);
  EXPECT_EQ(documented_block("```hex DETACH"), encode_request(4, Detach{.mode = DetachMode::populate}).bytes);
  EXPECT_EQ(documented_block("```hex ERROR"),
            encode_answer(4, Refused{.code = ErrorCode::internal, .message = "read error"}).bytes);
}

}  // namespace
}  // namespace uffdkit::native
