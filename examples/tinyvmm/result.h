// Words that every file here uses: an error is a sentence for the user, and a descriptor has one owner.
#pragma once

#include <fmt/format.h>
#include <unistd.h>

#include <expected>
#include <string>
#include <system_error>
#include <utility>

namespace tinyvmm {

template <class T>
using Result = std::expected<T, std::string>;

template <class... Args>
std::unexpected<std::string> failure(fmt::format_string<Args...> text, Args&&... args) {
  return std::unexpected(fmt::format(text, std::forward<Args>(args)...));
}

// What an errno means, in words.
inline std::string reason(int error) {
  return std::generic_category().message(error);
}

/// A file descriptor, closed when its owner goes.
class Fd {
 public:
  Fd() = default;
  explicit Fd(int fd) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }

  explicit operator bool() const { return fd_ >= 0; }
  int get() const { return fd_; }

 private:
  int fd_ = -1;
};

}  // namespace tinyvmm
