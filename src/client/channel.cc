#include "client/channel.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "wire/unix_socket.h"

namespace uffdkit::internal {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

// What poll(2) is to be told; it is asked again until the deadline.
int poll_ms(std::optional<Clock::time_point> deadline) {
  if (!deadline) return -1;
  const auto left = std::chrono::ceil<milliseconds>(*deadline - Clock::now()).count();
  return static_cast<int>(std::clamp<milliseconds::rep>(left, 0, 60'000));
}

// Sending needs a limit even where the answer has none: a manager that reads nothing is as good as dead.
constexpr milliseconds kSendLimit{5000};

}  // namespace

Result<Channel> Channel::open(const std::string& path, milliseconds connect_limit, const Patience& patience) {
  Result<UniqueFd> socket = connect_unix(path, connect_limit);
  if (!socket) return Failure(std::move(socket).error());
  Channel channel(std::move(*socket));
  const Result<native::Welcome> welcome = channel.ask<native::Welcome>(native::Hello{}, patience);
  if (!welcome) return Failure(Error(welcome.error()).within("greet the manager at " + path));
  if (welcome->version != native::kVersion)
    return Failure(
        Error(fmt::format("the manager at {} chose version {} of the protocol, which was not offered", path,
                          welcome->version)));
  return channel;
}

void Channel::close_both_ways() const {
  ::shutdown(socket_.get(), SHUT_RDWR);
}

Result<native::Answer> Channel::ask_any(native::Request request, const Patience& patience) {
  const std::uint32_t request_id = ++last_request_id_;
  const native::OutgoingFrame frame = native::encode_request(request_id, std::move(request));
  const Result<void> sent =
      send_all(socket_.get(), frame.bytes, frame.fd_numbers(), patience.limit.value_or(kSendLimit));
  if (!sent) {
    // A client that is not let in is told so before it says anything.
    Result<native::Answer> told = receive_answer(request_id, {.limit = milliseconds(0)});
    close_both_ways();  // half a frame may be out
    if (told) return told;
    return Failure(Error(sent.error()).within("send a request to the manager"));
  }
  Result<native::Answer> answer = receive_answer(request_id, patience);
  if (!answer && answer.error().os_error() != ETIMEDOUT) close_both_ways();
  return answer;
}

Result<native::Answer> Channel::receive_answer(std::uint32_t request_id, const Patience& patience) {
  std::optional<Clock::time_point> deadline;
  if (patience.limit) deadline = Clock::now() + *patience.limit;
  for (;;) {
    std::array<std::byte, 4096> buffer;
    Result<Piece> piece = receive_some(socket_.get(), buffer);
    if (!piece) return Failure(std::move(piece).error().within("receive the manager's answer"));
    if (piece->end) return Failure(Error("the manager closed the connection", ECONNRESET));
    if (piece->bytes.empty()) {
      if (deadline && Clock::now() >= *deadline)
        return Failure(Error("the manager does not answer in time", ETIMEDOUT));
      std::array<pollfd, 2> entries = {pollfd{.fd = socket_.get(), .events = POLLIN, .revents = 0},
                                       pollfd{.fd = patience.cancel_fd, .events = POLLIN, .revents = 0}};
      if (::poll(entries.data(), entries.size(), poll_ms(deadline)) < 0 && errno != EINTR)
        return Failure(Error::from_errno("wait for the manager's answer", errno));
      if ((entries[1].revents & POLLIN) != 0) return Failure(Error("no longer wanted", ECANCELED));
      continue;
    }
    Result<std::vector<native::Frame>> frames = reader_.feed(std::move(*piece));
    if (!frames) return Failure(std::move(frames).error());
    for (native::Frame& frame : *frames) {
      // An answer to an earlier request came too late. 0: the manager could not read the request's number.
      if (frame.request_id != request_id && frame.request_id != 0) continue;
      return native::decode_answer(std::move(frame));
    }
  }
}

}  // namespace uffdkit::internal
