// When a file was read last, for those who are to leave that alone.
#pragma once

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <ctime>
#include <string>

namespace uffdkit::test {

inline std::time_t accessed_at(const std::string& path) {
  struct stat status{};
  EXPECT_EQ(::stat(path.c_str(), &status), 0);
  return status.st_atim.tv_sec;
}

// So long ago that the next read is noted, unless its reader has the kernel leave it alone. False where the
// file system notes none.
inline bool set_accessed_long_ago(const std::string& path) {
  const timespec times[] = {{.tv_sec = 1, .tv_nsec = 0}, {.tv_sec = 0, .tv_nsec = UTIME_OMIT}};
  const auto set = [&] { EXPECT_EQ(::utimensat(AT_FDCWD, path.c_str(), times, 0), 0); };
  set();
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  char byte = 0;
  EXPECT_EQ(::read(file.get(), &byte, 1), 1);
  const bool notes = accessed_at(path) != 1;
  set();
  return notes;
}

}  // namespace uffdkit::test
