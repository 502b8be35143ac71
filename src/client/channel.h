// A connection to a manager, past its greeting: one request at a time, each waits for its answer.
// Threads: one at a time, but fd() and close_both_ways() at any time.
#pragma once

#include <fmt/format.h>
#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <variant>

#include "wire/native.h"

namespace uffdkit::internal {

// How long to wait, and a descriptor that ends the wait early when it becomes readable; -1 for none.
struct Patience {
  std::optional<std::chrono::milliseconds> limit{};  // for each step; nothing: for ever
  int cancel_fd = -1;
};

class Channel {
 public:
  // Connects to the socket at `path` and says HELLO.
  // Errors: those of connect_unix(); no answer in time; no version in common.
  static Result<Channel> open(const std::string& path, std::chrono::milliseconds connect_limit,
                              const Patience& patience);

  int fd() const { return socket_.get(); }

  // Sends a request and waits for the answer, which must be an `Expected`.
  // Errors: the manager refuses (its reason is the message); ETIMEDOUT; ECANCELED; the connection ends, or
  // the manager breaks the protocol: then the connection is closed both ways. After ETIMEDOUT the channel is
  // still good: a late answer is skipped.
  template <class Expected>
  Result<Expected> ask(native::Request request, const Patience& patience) {
    Result<native::Answer> answer = ask_any(std::move(request), patience);
    if (!answer) return Failure(std::move(answer).error());
    if (auto* expected = std::get_if<Expected>(&*answer)) return std::move(*expected);
    if (const auto* refused = std::get_if<native::Refused>(&*answer))
      return Failure(Error(
          fmt::format("the manager refuses ({}): {}", native::to_string(refused->code), refused->message)));
    close_both_ways();
    return Failure(Error("the manager gave an answer that does not fit the request"));
  }

  // Ends the connection for everybody who holds it, copies in forked children too.
  void close_both_ways() const;

 private:
  explicit Channel(UniqueFd socket) : socket_(std::move(socket)) {}
  Result<native::Answer> ask_any(native::Request request, const Patience& patience);
  Result<native::Answer> receive_answer(std::uint32_t request_id, const Patience& patience);

  UniqueFd socket_;
  native::FrameReader reader_{native::FrameReader::Reads::answers};
  std::uint32_t last_request_id_ = 0;
};

}  // namespace uffdkit::internal
