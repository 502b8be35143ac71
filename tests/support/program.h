// Running a program to its end, and what it printed.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

namespace uffdkit::test {

struct Finished {
  int exit_code;  // or minus the signal that ended it
  std::string out;
  std::string err;
};

// The user without rights.
inline constexpr uid_t kNobody = 65534;

// Runs `program` of the build with these arguments, as the user `as` (0: as this one; another needs
// root). Waits for its end.
Finished run_program(const std::string& program, const std::vector<std::string>& arguments, uid_t as = 0);

}  // namespace uffdkit::test
