// The manager's log: lines on standard error. Whoever reads them may be slow or gone, and must hold nobody
// up: what a pipe, a terminal or a socket does not take at once is left out, counted, and told when it takes
// lines again. A file takes everything. Threads: one at a time.
#pragma once

#include <uffdkit/unique_fd.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace uffdkit {

class Log {
 public:
  // Writes to `fd`, which stays open for as long as this lives.
  explicit Log(int fd);

  // One message. Its further lines are indented, and control characters, which might drive a terminal, are
  // written as "?".
  void write(std::string_view text);

 private:
  // What was taken of `text`, in bytes.
  std::size_t write_some(std::string_view text) const;

  const int given_fd_;
  UniqueFd own_fd_;  // the same pipe or terminal opened again, so that it can be non-blocking for us alone
  bool is_socket_ = false;
  bool is_file_ = false;
  std::string rest_;  // of a line that was taken in part
  std::uint64_t left_out_ = 0;
};

}  // namespace uffdkit
