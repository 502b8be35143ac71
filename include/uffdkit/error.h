// Layer: base
// What an operator must hear, as a value: what was wrong, where, and what to do.
// What the kernel answers every day (a page is already there, a process is gone) is not an Error but part of
// a call's typed outcome; what only a bug can cause stops the program (base/check.h).
#pragma once

#include <expected>
#include <string>
#include <utility>

namespace uffdkit {

class Error {
 public:
  // `message` says what was wrong and where; `os_error` is the errno behind it, 0 where there is none.
  explicit Error(std::string message, int os_error = 0) : message_(std::move(message)), os_error_(os_error) {}

  // An errno with what was being done: "open /x/y: Permission denied".
  static Error from_errno(std::string doing, int os_error);

  // Likewise for what could not be opened: "open <what>: Permission denied", with the usual remedy.
  static Error from_open(const std::string& what, int os_error);

  // The same error with what to do about it. A second remedy goes on a line of its own.
  Error with_remedy(const std::string& remedy) &&;
  // The same error inside a larger task: "<doing>: <message>".
  Error within(const std::string& doing) &&;

  const std::string& message() const { return message_; }
  const std::string& remedy() const { return remedy_; }
  int os_error() const { return os_error_; }
  // Message and remedy, for a log or a terminal.
  std::string text() const;

 private:
  std::string message_;
  std::string remedy_;
  int os_error_;
};

template <class T>
using Result = std::expected<T, Error>;

using Failure = std::unexpected<Error>;

}  // namespace uffdkit
