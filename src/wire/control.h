// The manager's control socket: one JSON object a line, each way; docs/protocol.md describes it.
//
//   -> {"command":"listen-add","kind":"firecracker","socket":"/run/a.sock","image":"/images/a.mem"}
//   <- {"ok":true}
//   <- {"ok":false,"error":"what was wrong","remedy":"what to do"}
#pragma once

#include <uffdkit/error.h>

#include <cstddef>
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "wire/piece.h"

namespace uffdkit::control {

// Requests are short: two paths of at most 4096 bytes, written as JSON.
inline constexpr std::size_t kRequestBytesMax = std::size_t{64} << 10;
// A status of some thousand sessions.
inline constexpr std::size_t kAnswerBytesMax = std::size_t{16} << 20;

enum class ListenKind { firecracker, native };
// "firecracker", "native".
std::string_view to_string(ListenKind kind);

struct Status {};
struct ListenAdd {
  ListenKind kind;
  std::string socket;
  std::string image;    // for firecracker; empty for native, where clients name it
  std::string allow{};  // for firecracker: who may connect beside those who may have the image; may be empty
};
struct ListenRemove {
  std::string socket;
};
struct ListenList {};
struct SessionResume {
  std::uint64_t session;
};
// Has the program replaced by the one at its path.
struct Upgrade {};
// Completes and releases the sessions whose clients keep no descriptor of their own.
struct Drain {};

using Request = std::variant<Status, ListenAdd, ListenRemove, ListenList, SessionResume, Upgrade, Drain>;

// One line, without its end. Errors: not a JSON object; an unknown command (all commands are named); a key
// missing, unknown, empty or not a string; an image where there can be none.
Result<Request> decode_request(std::string_view line);
// With the line's end.
std::string encode_request(const Request& request);

// {"ok":true} and the members of `fields`, an object; with the line's end.
std::string encode_ok(const nlohmann::json& fields);
// {"ok":false,"error":...,"remedy":...}; with the line's end.
std::string encode_error(const Error& error);
// The whole object of an answer that is ok; the error of one that is not.
Result<nlohmann::json> decode_answer(std::string_view line);

// Cuts a stream into lines. Descriptors that come along stay with the piece, to be closed with it.
class LineReader {
 public:
  explicit LineReader(std::size_t line_bytes_max) : line_bytes_max_(line_bytes_max) {}

  // Takes one piece; returns the lines that it completes, without their ends; empty lines are left out.
  // Errors: a line longer than the bound; the end within a line.
  Result<std::vector<std::string>> feed(const Piece& piece);

 private:
  std::size_t line_bytes_max_;
  std::string line_;
};

}  // namespace uffdkit::control
