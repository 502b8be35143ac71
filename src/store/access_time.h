// When a file was read last.
#pragma once

#include <fcntl.h>

namespace uffdkit {

// Has the kernel leave that alone from now on, for whoever reads by this open file, which is to be this
// program's own. Looking whether it is to be noted takes a hundredth of the time of a fault, and noting it
// writes to the disk. Only the file's owner and privileged users may ask for that; for others nothing
// changes.
inline void leave_access_time(int file) {
  const int flags = ::fcntl(file, F_GETFL);
  if (flags >= 0) (void)::fcntl(file, F_SETFL, flags | O_NOATIME);
}

}  // namespace uffdkit
