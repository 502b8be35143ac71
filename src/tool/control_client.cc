#include "tool/control_client.h"

#include <fmt/format.h>
#include <poll.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <thread>
#include <variant>

#include "wire/unix_socket.h"

namespace uffdkit::tool {
namespace {

constexpr std::chrono::milliseconds kAnswerLimit{10'000};
// Between two attempts while one worker takes over from another.
constexpr std::chrono::milliseconds kPause{10};

Result<nlohmann::json> ask_once(const std::string& socket, const control::Request& request) {
  Result<UniqueFd> connection = connect_unix(socket, kAnswerLimit);
  if (!connection)
    return Failure(std::move(connection)
                       .error()
                       .with_remedy("start the manager with --control " + socket +
                                    ", or name its control socket with --control"));
  const std::string line = control::encode_request(request);
  // A client that is turned away is told so before it says anything; it may not be able to say it any more.
  const Result<void> sent = send_all(connection->get(), std::as_bytes(std::span(line)), {}, kAnswerLimit);
  if (!sent && sent.error().os_error() != EPIPE) return Failure(sent.error());

  control::LineReader reader(control::kAnswerBytesMax);
  std::array<std::byte, 65'536> buffer;
  while (true) {
    pollfd entry{.fd = connection->get(), .events = POLLIN, .revents = 0};
    if (::poll(&entry, 1, static_cast<int>(kAnswerLimit.count())) == 0)
      return Failure(Error(fmt::format("the manager at {} does not answer", socket), ETIMEDOUT));
    Result<Piece> piece = receive_some(connection->get(), buffer);
    if (!piece) return Failure(sent ? piece.error() : sent.error());
    const bool end = piece->end;
    const Result<std::vector<std::string>> lines = reader.feed(*piece);
    if (!lines) return Failure(lines.error());
    if (!lines->empty()) return control::decode_answer(lines->front());
    if (end)
      return Failure(Error(fmt::format("the manager at {} closed the connection", socket), ECONNRESET));
  }
}

}  // namespace

Result<nlohmann::json> ask_manager(const std::string& socket, const control::Request& request) {
  // What changes something may have been done although nobody said so.
  const bool may_repeat = std::holds_alternative<control::Status>(request) ||
                          std::holds_alternative<control::ListenList>(request) ||
                          std::holds_alternative<control::Drain>(request);
  const auto give_up = std::chrono::steady_clock::now() + kAnswerLimit;
  while (true) {
    Result<nlohmann::json> answer = ask_once(socket, request);
    if (answer || !is_lost(answer.error()) || !may_repeat || std::chrono::steady_clock::now() >= give_up)
      return answer;
    // The worker that was asked has been replaced; the next one answers.
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace uffdkit::tool
