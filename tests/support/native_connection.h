// The native protocol, spoken by a test itself: one request after the other, each with its answer.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <cstdint>
#include <string>
#include <utility>

#include "support/client.h"
#include "wire/native.h"

namespace uffdkit::test {

// What a call was to bring; throws its error.
template <class T>
T take(Result<T> result) {
  require(result.has_value(), result ? "" : result.error().text());
  return std::move(*result);
}
void succeed(const Result<void>& result);

// A descriptor for the same open file.
UniqueFd duplicate(int fd);

class NativeConnection {
 public:
  // Connects, and says HELLO.
  explicit NativeConnection(const std::string& socket);

  // Throws when there is no answer.
  native::Answer ask(native::Request request);
  // Whether it is refused, with this code.
  bool is_refused(native::Request request, native::ErrorCode code);
  int fd() const { return socket_.get(); }

 private:
  UniqueFd socket_;
  std::uint32_t last_request_ = 0;
  native::FrameReader reader_{native::FrameReader::Reads::answers};
};

}  // namespace uffdkit::test
