#include "simulate/visitors.h"

#include <fmt/format.h>

#include <array>
#include <cstddef>
#include <utility>

#include "support/client.h"
#include "wire/unix_socket.h"

namespace uffdkit::simulate {

void Operators::ask_something() {
  switch (story_.draw(5)) {
    case 0:
      return ask(control::Drain{}, "drain");
    case 1:
      return ask(control::ListenAdd{.kind = control::ListenKind::firecracker,
                                    .socket = managers_.added_socket(),
                                    .image = managers_.image()},
                 "listen");
    case 2:
      return ask(control::ListenRemove{.socket = managers_.added_socket()}, "listen no more");
    default:
      return ask(control::Status{}, "status");
  }
}

void Operators::ask(const control::Request& request, std::string what) {
  if (managers_.is_ending()) return;
  if (!connection_) connection_ = test::connect_to(managers_.control_socket());
  story_.note("an operator asks: " + what);
  test::send_with_fds(connection_.get(), control::encode_request(request), {});
  asked_.push_back(std::move(what));
}

void Operators::hear() {
  std::array<std::byte, 16'384> buffer;
  while (connection_) {
    Result<Piece> piece = receive_some(connection_.get(), buffer);
    const bool ended = !piece || piece->end;
    if (!ended && piece->bytes.empty()) return;
    Result<std::vector<std::string>> lines = std::vector<std::string>();
    if (piece) lines = reader_.feed(*piece);
    if (!lines) return story_.fail("what an operator hears is no line: " + lines.error().text());
    for (const std::string& line : *lines) {
      if (asked_.empty()) return story_.fail("an operator hears what was not asked");
      const std::string asked = std::exchange(asked_.front(), "");
      asked_.erase(asked_.begin());
      const auto answer = control::decode_answer(line);
      // What is there cannot be added, and what is not cannot be removed.
      if (!answer && !asked.starts_with("listen")) return story_.fail(asked + ": " + answer.error().text());
    }
    if (!ended) continue;
    connection_.reset();
    asked_.clear();
    reader_ = control::LineReader(control::kAnswerBytesMax);
  }
}

void Strangers::add() {
  if (managers_.is_ending()) return;
  constexpr std::array kWords = {"", "[{", "uffk", "uffkuffkuffkuffk"};
  const std::string word = kWords[story_.draw(kWords.size())];
  story_.note(fmt::format("a stranger connects, and says '{}'", word));
  connections_.push_back(
      test::connect_to(story_.one_in(2) ? managers_.native_socket() : managers_.firecracker_socket()));
  if (!word.empty()) test::send_with_fds(connections_.back().get(), word, {});
}

void Strangers::hear() {
  std::array<std::byte, 4096> buffer;
  std::erase_if(connections_, [&](const UniqueFd& stranger) {
    const Result<Piece> piece = receive_some(stranger.get(), buffer);
    return !piece || piece->end;
  });
}

}  // namespace uffdkit::simulate
