#include "wire/control.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <random>

#include "support/pieces.h"

namespace uffdkit::control {
namespace {

using test::end_of_stream;
using test::piece_of;

std::string_view without_end(std::string_view line) {
  EXPECT_EQ(line.back(), '\n');
  line.remove_suffix(1);
  EXPECT_EQ(line.find('\n'), std::string_view::npos);
  return line;
}

TEST(Control, EveryRequestComesBackFromItsEncoding) {
  EXPECT_TRUE(std::holds_alternative<Status>(*decode_request(without_end(encode_request(Status{})))));
  EXPECT_TRUE(std::holds_alternative<ListenList>(*decode_request(without_end(encode_request(ListenList{})))));
  const auto remove = decode_request(without_end(encode_request(ListenRemove{.socket = "/a\n\"b"})));
  EXPECT_EQ(std::get<ListenRemove>(*remove).socket, "/a\n\"b");
  const auto add = decode_request(without_end(
      encode_request(ListenAdd{.kind = ListenKind::firecracker, .socket = "/s", .image = "/images/a.mem"})));
  EXPECT_EQ(std::get<ListenAdd>(*add).kind, ListenKind::firecracker);
  EXPECT_EQ(std::get<ListenAdd>(*add).socket, "/s");
  EXPECT_EQ(std::get<ListenAdd>(*add).image, "/images/a.mem");
  EXPECT_EQ(std::get<ListenAdd>(*add).allow, "");
  const auto shared = decode_request(without_end(encode_request(
      ListenAdd{.kind = ListenKind::firecracker, .socket = "/s", .image = "/i", .allow = "user:1,group:2"})));
  EXPECT_EQ(std::get<ListenAdd>(*shared).allow, "user:1,group:2");
  const auto resume = decode_request(without_end(encode_request(SessionResume{.session = 1ull << 40})));
  EXPECT_EQ(std::get<SessionResume>(*resume).session, 1ull << 40);
  const auto native = decode_request(
      without_end(encode_request(ListenAdd{.kind = ListenKind::native, .socket = "/s", .image = {}})));
  EXPECT_EQ(std::get<ListenAdd>(*native).kind, ListenKind::native);
}

struct BadRequest {
  const char* name;
  std::string line;
  std::vector<std::string> said;
};

class BadRequestTest : public testing::TestWithParam<BadRequest> {};

TEST_P(BadRequestTest, IsRefusedWithTheReason) {
  const auto request = decode_request(GetParam().line);
  ASSERT_FALSE(request);
  for (const std::string& part : GetParam().said)
    EXPECT_NE(request.error().message().find(part), std::string::npos) << request.error().message();
}

INSTANTIATE_TEST_SUITE_P(
    Control, BadRequestTest,
    testing::Values(
        BadRequest{"NotJson", "status", {"not a JSON object"}},
        BadRequest{"Array", "[]", {"not a JSON object"}},
        BadRequest{"NoCommand", "{}", {"\"command\" is missing"}},
        BadRequest{"CommandIsANumber", R"({"command":1})", {"\"command\" is not a string"}},
        BadRequest{"SessionIsNoNumber", R"({"command":"session-resume","session":"1x"})", {"not a number"}},
        BadRequest{"AllowWithoutAnImage",
                   R"({"command":"listen-add","kind":"native","socket":"/s","allow":"anyone"})",
                   {"allow"}},
        BadRequest{"UnknownCommand",
                   R"({"command":"halt"})",
                   {"\"halt\"", "status", "listen-add", "listen-remove", "listen-list", "upgrade", "drain"}},
        BadRequest{"LongUnknownCommand", R"({"command":")" + std::string(5000, 'x') + R"("})", {"xxx..."}},
        BadRequest{"UnknownKey", R"({"command":"status","verbose":"yes"})", {"status", "\"verbose\""}},
        BadRequest{"NoSocket", R"({"command":"listen-remove"})", {"\"socket\" is missing"}},
        BadRequest{"EmptySocket", R"({"command":"listen-remove","socket":""})", {"\"socket\" is empty"}},
        BadRequest{"ZeroByte", R"({"command":"listen-remove","socket":"a\u0000b"})", {"zero byte"}},
        BadRequest{"UnknownKind",
                   R"({"command":"listen-add","kind":"criu","socket":"/s"})",
                   {"\"criu\"", "firecracker", "native"}},
        BadRequest{"NoImage",
                   R"({"command":"listen-add","kind":"firecracker","socket":"/s"})",
                   {"\"image\" is missing"}},
        BadRequest{"ImageForNative",
                   R"({"command":"listen-add","kind":"native","socket":"/s","image":"a"})",
                   {"\"image\""}}),
    [](const auto& test) { return test.param.name; });

TEST(Control, AnOkAnswerKeepsItsFields) {
  const auto answer = decode_answer(without_end(encode_ok({{"sockets", {"/a", "/b"}}})));
  ASSERT_TRUE(answer);
  EXPECT_EQ((*answer)["sockets"].size(), 2u);
}

TEST(Control, AnErrorAnswerKeepsMessageAndRemedy) {
  const auto answer =
      decode_answer(without_end(encode_error(Error("no such image: \xff").with_remedy("look"))));
  ASSERT_FALSE(answer);
  EXPECT_EQ(answer.error().message().find("no such image"), 0u);
  EXPECT_EQ(answer.error().remedy(), "look");
}

TEST(Control, AnAnswerThatIsNoneIsAnError) {
  for (const char* line : {"", "ok", "{}", R"({"ok":1})", R"({"ok":false})"})
    EXPECT_FALSE(decode_answer(line));
}

TEST(Control, LinesMayComeInAnyPieces) {
  constexpr std::string_view kText = "one\n\ntwo\nthree\n";
  for (std::size_t cut = 0; cut <= kText.size(); ++cut) {
    LineReader reader(5);
    auto lines = reader.feed(piece_of(kText.substr(0, cut)));
    ASSERT_TRUE(lines);
    auto more = reader.feed(piece_of(kText.substr(cut)));
    ASSERT_TRUE(more);
    lines->insert(lines->end(), more->begin(), more->end());
    EXPECT_EQ(*lines, (std::vector<std::string>{"one", "two", "three"})) << cut;
    EXPECT_TRUE(reader.feed(end_of_stream()));
  }
}

TEST(Control, ALineLongerThanTheBoundIsRefusedBeforeItsEnd) {
  LineReader reader(5);
  EXPECT_TRUE(reader.feed(piece_of("12345")));
  EXPECT_FALSE(reader.feed(piece_of("6")));
}

TEST(Control, TheEndWithinALineIsAnError) {
  LineReader reader(5);
  EXPECT_TRUE(reader.feed(piece_of("12")));
  EXPECT_FALSE(reader.feed(end_of_stream()));
}

TEST(Control, GarbageIsRefused) {
  const auto seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937 random(seed);
  const std::string good = R"({"command":"listen-add","kind":"firecracker","socket":"/s","image":"/i"})";
  for (int round = 0; round < 5000; ++round) {
    std::string line = good;
    const auto changes = 1 + random() % 4;
    for (unsigned i = 0; i < changes; ++i) line[random() % line.size()] = static_cast<char>(random());
    const auto request = decode_request(line);
    if (request) {
      EXPECT_TRUE(std::holds_alternative<ListenAdd>(*request)) << line;
    } else {
      EXPECT_FALSE(request.error().message().empty());
    }
  }
}

}  // namespace
}  // namespace uffdkit::control
