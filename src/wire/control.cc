#include "wire/control.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <utility>

namespace uffdkit::control {
namespace {

using Json = nlohmann::json;

constexpr std::string_view kStatus = "status";
constexpr std::string_view kListenAdd = "listen-add";
constexpr std::string_view kListenRemove = "listen-remove";
constexpr std::string_view kListenList = "listen-list";
constexpr std::string_view kSessionResume = "session-resume";
constexpr std::string_view kUpgrade = "upgrade";
constexpr std::string_view kDrain = "drain";

template <class... Fs>
struct Overloaded : Fs... {
  using Fs::operator()...;
};

Failure refuse(std::string what) {
  return Failure(Error(std::move(what), EINVAL));
}

// Paths and names are not always UTF-8, and dump() must not throw.
std::string line_of(const Json& object) {
  return object.dump(-1, ' ', false, Json::error_handler_t::replace) + '\n';
}

// A string of the request, shortened: it goes into logs and answers.
std::string shown(const std::string& text) {
  constexpr std::size_t kShown = 60;
  return Json(text.size() > kShown ? text.substr(0, kShown) + "..." : text)
      .dump(-1, ' ', true, Json::error_handler_t::replace);
}

Result<Json> parse_object(std::string_view line) {
  Json object = Json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return refuse("not a JSON object on one line");
  return object;
}

Result<std::string> text_at(const Json& object, std::string_view command, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) return refuse(fmt::format("{}: \"{}\" is missing", command, key));
  if (!found->is_string()) return refuse(fmt::format("{}: \"{}\" is not a string", command, key));
  std::string text = found->get<std::string>();
  if (text.empty()) return refuse(fmt::format("{}: \"{}\" is empty", command, key));
  if (text.find('\0') != std::string::npos)
    return refuse(fmt::format("{}: \"{}\" has a zero byte", command, key));
  return text;
}

// A key that nobody reads is a mistake of the sender's, who must hear of it.
Result<void> allow_only(const Json& object, std::string_view command,
                        std::initializer_list<std::string_view> keys) {
  for (const auto& [key, value] : object.items())
    if (key != "command" && std::ranges::find(keys, key) == keys.end())
      return refuse(fmt::format("{}: unknown key {}", command, shown(key)));
  return {};
}

Result<Request> decode_listen_add(const Json& object) {
  if (auto allowed = allow_only(object, kListenAdd, {"kind", "socket", "image", "allow"}); !allowed)
    return Failure(allowed.error());
  const Result<std::string> kind = text_at(object, kListenAdd, "kind");
  if (!kind) return Failure(kind.error());
  Result<std::string> socket = text_at(object, kListenAdd, "socket");
  if (!socket) return Failure(socket.error());
  if (*kind == to_string(ListenKind::native)) {
    if (object.contains("image"))
      return refuse("listen-add: native clients name their image themselves: leave \"image\" out");
    if (object.contains("allow"))
      return refuse("listen-add: \"allow\" is of the socket's image, and there is none: leave it out");
    return ListenAdd{.kind = ListenKind::native, .socket = std::move(*socket), .image = {}, .allow = {}};
  }
  if (*kind != to_string(ListenKind::firecracker))
    return refuse(fmt::format("listen-add: unknown kind {}; there are firecracker and native", shown(*kind)));
  Result<std::string> image = text_at(object, kListenAdd, "image");
  if (!image) return Failure(image.error());
  Result<std::string> allow = std::string();
  if (object.contains("allow")) allow = text_at(object, kListenAdd, "allow");
  if (!allow) return Failure(allow.error());
  return ListenAdd{.kind = ListenKind::firecracker,
                   .socket = std::move(*socket),
                   .image = std::move(*image),
                   .allow = std::move(*allow)};
}

Result<Request> decode_listen_remove(const Json& object) {
  if (auto allowed = allow_only(object, kListenRemove, {"socket"}); !allowed) return Failure(allowed.error());
  Result<std::string> socket = text_at(object, kListenRemove, "socket");
  if (!socket) return Failure(socket.error());
  return ListenRemove{.socket = std::move(*socket)};
}

Result<Request> decode_session_resume(const Json& object) {
  if (auto allowed = allow_only(object, kSessionResume, {"session"}); !allowed)
    return Failure(allowed.error());
  const Result<std::string> text = text_at(object, kSessionResume, "session");
  if (!text) return Failure(text.error());
  SessionResume resume{};
  const char* end = text->data() + text->size();
  const auto [stopped, failed] = std::from_chars(text->data(), end, resume.session);
  if (failed != std::errc() || stopped != end)
    return refuse(fmt::format("{}: \"session\" is {}, not a number", kSessionResume, shown(*text)));
  return resume;
}

template <class Plain>
Result<Request> decode_plain(const Json& object, std::string_view command) {
  if (auto allowed = allow_only(object, command, {}); !allowed) return Failure(allowed.error());
  return Plain{};
}

}  // namespace

std::string_view to_string(ListenKind kind) {
  return kind == ListenKind::firecracker ? "firecracker" : "native";
}

Result<Request> decode_request(std::string_view line) {
  const Result<Json> object = parse_object(line);
  if (!object) return Failure(object.error());
  const Result<std::string> command = text_at(*object, "request", "command");
  if (!command) return Failure(command.error());
  if (*command == kStatus) return decode_plain<Status>(*object, kStatus);
  if (*command == kListenAdd) return decode_listen_add(*object);
  if (*command == kListenRemove) return decode_listen_remove(*object);
  if (*command == kListenList) return decode_plain<ListenList>(*object, kListenList);
  if (*command == kSessionResume) return decode_session_resume(*object);
  if (*command == kUpgrade) return decode_plain<Upgrade>(*object, kUpgrade);
  if (*command == kDrain) return decode_plain<Drain>(*object, kDrain);
  return refuse(fmt::format("unknown command {}; there are {}, {}, {}, {}, {}, {} and {}", shown(*command),
                            kStatus, kListenAdd, kListenRemove, kListenList, kSessionResume, kUpgrade,
                            kDrain));
}

std::string encode_request(const Request& request) {
  return line_of(std::visit(
      Overloaded{[](const Status&) { return Json{{"command", kStatus}}; },
                 [](const ListenAdd& add) {
                   Json object{
                       {"command", kListenAdd}, {"kind", to_string(add.kind)}, {"socket", add.socket}};
                   if (add.kind == ListenKind::firecracker) object["image"] = add.image;
                   if (!add.allow.empty()) object["allow"] = add.allow;
                   return object;
                 },
                 [](const ListenRemove& remove) {
                   return Json{{"command", kListenRemove}, {"socket", remove.socket}};
                 },
                 [](const ListenList&) { return Json{{"command", kListenList}}; },
                 [](const SessionResume& resume) {
                   return Json{{"command", kSessionResume}, {"session", std::to_string(resume.session)}};
                 },
                 [](const Upgrade&) { return Json{{"command", kUpgrade}}; },
                 [](const Drain&) { return Json{{"command", kDrain}}; }},
      request));
}

std::string encode_ok(const Json& fields) {
  Json object = fields;
  object["ok"] = true;
  return line_of(object);
}

std::string encode_error(const Error& error) {
  return line_of(Json{{"ok", false}, {"error", error.message()}, {"remedy", error.remedy()}});
}

Result<Json> decode_answer(std::string_view line) {
  Result<Json> object = parse_object(line);
  if (!object) return Failure(std::move(object).error().within("the manager's answer"));
  const auto ok = object->find("ok");
  if (ok == object->end() || !ok->is_boolean())
    return refuse("the manager's answer: \"ok\" is missing or not true or false");
  if (ok->get<bool>()) return object;
  const auto text = [&](const char* key) {
    const auto found = object->find(key);
    return found != object->end() && found->is_string() ? found->get<std::string>() : std::string();
  };
  Error error(text("error").empty() ? "the manager refused and gave no reason" : text("error"));
  if (!text("remedy").empty()) error = std::move(error).with_remedy(text("remedy"));
  return Failure(std::move(error));
}

Result<std::vector<std::string>> LineReader::feed(const Piece& piece) {
  std::vector<std::string> lines;
  std::string_view rest(reinterpret_cast<const char*>(piece.bytes.data()), piece.bytes.size());
  while (!rest.empty()) {
    const std::size_t end = rest.find('\n');
    const std::string_view part = rest.substr(0, end);
    if (part.size() > line_bytes_max_ - line_.size())
      return refuse(fmt::format("a line longer than {} bytes", line_bytes_max_));
    line_ += part;
    if (end == std::string_view::npos) break;
    if (!line_.empty()) lines.push_back(std::exchange(line_, {}));
    rest.remove_prefix(end + 1);
  }
  if (piece.end && !line_.empty()) return refuse("the connection ended within a line");
  return lines;
}

}  // namespace uffdkit::control
