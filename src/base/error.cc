#include <uffdkit/error.h>

#include <cerrno>
#include <cstring>

namespace uffdkit {

Error Error::from_errno(std::string doing, int os_error) {
  char buffer[128];
  // The GNU strerror_r: thread safe, and may return a text of its own instead of filling the buffer.
  const char* text = strerror_r(os_error, buffer, sizeof buffer);
  return Error(std::move(doing) + ": " + text, os_error);
}

Error Error::from_open(const std::string& what, int os_error) {
  Error error = from_errno("open " + what, os_error);
  switch (os_error) {
    case ENOENT:
    case ENOTDIR:
      return std::move(error).with_remedy("check the path: all of it must be there");
    case EACCES:
    case EPERM:
      return std::move(error).with_remedy(
          "give this user permission to read it, and to enter each directory above it");
    case EMFILE:
    case ENFILE:
      return std::move(error).with_remedy("raise the limit of open files (ulimit -n, LimitNOFILE=)");
    default:
      return error;
  }
}

Error Error::with_remedy(const std::string& remedy) && {
  if (!remedy_.empty()) remedy_ += '\n';
  remedy_ += remedy;
  return std::move(*this);
}

Error Error::within(const std::string& doing) && {
  message_ = doing + ": " + message_;
  return std::move(*this);
}

std::string Error::text() const {
  return remedy_.empty() ? message_ : message_ + "\n" + remedy_;
}

}  // namespace uffdkit
