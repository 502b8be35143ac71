#include "support/native_connection.h"

#include <fcntl.h>
#include <poll.h>

#include <array>
#include <chrono>
#include <variant>

#include "wire/unix_socket.h"

namespace uffdkit::test {

void succeed(const Result<void>& result) {
  require(result.has_value(), result ? "" : result.error().text());
}

UniqueFd duplicate(int fd) {
  return UniqueFd(fcntl(fd, F_DUPFD_CLOEXEC, 0));
}

NativeConnection::NativeConnection(const std::string& socket) : socket_(connect_to(socket)) {
  require(std::holds_alternative<native::Welcome>(ask(native::Hello{})), "not welcome");
}

native::Answer NativeConnection::ask(native::Request request) {
  const native::OutgoingFrame frame = native::encode_request(++last_request_, std::move(request));
  succeed(send_all(socket_.get(), frame.bytes, frame.fd_numbers(), std::chrono::seconds(30)));
  std::array<std::byte, 4096> buffer;
  while (true) {
    pollfd entry{.fd = socket_.get(), .events = POLLIN, .revents = 0};
    require(poll(&entry, 1, 30'000) == 1, "no answer");
    auto frames = take(reader_.feed(take(receive_some(socket_.get(), buffer))));
    if (!frames.empty()) return take(native::decode_answer(std::move(frames.front())));
  }
}

bool NativeConnection::is_refused(native::Request request, native::ErrorCode code) {
  const native::Answer answer = ask(std::move(request));
  const auto* refused = std::get_if<native::Refused>(&answer);
  return refused != nullptr && refused->code == code;
}

}  // namespace uffdkit::test
