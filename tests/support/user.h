// Being another user.
#pragma once

#include <sys/types.h>

#include <vector>

#include "support/program.h"

namespace uffdkit::test {

// Makes this process one of `user`, in the group of the same number and these; throws unless it is root's. It
// goes on having what it has open.
void become(uid_t user, const std::vector<gid_t>& groups = {});

}  // namespace uffdkit::test
