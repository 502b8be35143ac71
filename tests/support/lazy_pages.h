// A program that listens at lazy-pages.socket, as a process of its own.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace uffdkit::test {

class LazyPages {
 public:
  // Runs `command` (a path and arguments, to which "--status-fd N" is added) and waits until it says that
  // criu can connect. Its stderr is kept in the file `log`. Throws with that if it ends instead.
  LazyPages(std::vector<std::string> command, std::string log);
  // `uffdkit criu lazy-pages -D DIRECTORY ARGUMENTS`; the log is in the directory.
  LazyPages(const std::string& directory, const std::vector<std::string>& arguments);
  ~LazyPages();
  LazyPages(const LazyPages&) = delete;
  LazyPages& operator=(const LazyPages&) = delete;

  pid_t pid() const { return pid_; }
  // What it has written to stderr.
  std::string log() const;
  // Waits for its end. Returns its exit code, or minus the signal that ended it.
  int wait();

 private:
  std::string log_;
  pid_t pid_ = -1;
};

}  // namespace uffdkit::test
