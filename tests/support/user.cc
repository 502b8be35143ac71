#include "support/user.h"

#include <grp.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

namespace uffdkit::test {

void become(uid_t user, const std::vector<gid_t>& groups) {
  if (setgroups(groups.size(), groups.data()) != 0 || setresgid(user, user, user) != 0 ||
      setresuid(user, user, user) != 0)
    throw std::system_error(errno, std::generic_category(), "become another user");
  prctl(PR_SET_PDEATHSIG, SIGKILL);  // the change has reset it
}

}  // namespace uffdkit::test
