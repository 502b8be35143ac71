// Who may create a userfaultfd, and enable what on it. Pure functions of credentials and settings.
#pragma once

#include <uffdkit/sim.h>

namespace uffdkit::sim {

// userfaultfd(2): 0, or -EPERM, -EINVAL.
int may_call_userfaultfd(const Credentials& who, int flags, bool sysctl_unprivileged);

// open(2) of /dev/userfaultfd for reading: 0, or -ENOENT, -EACCES.
int may_open_device(const Credentials& who, const DeviceNode& node, Version version);

// The flags of either way, once the caller may use it: 0 or -EINVAL.
int check_creation_flags(int flags);

// UFFDIO_API asking for `features`: 0, or -EPERM.
int may_enable(const Credentials& who, std::uint64_t features);

// All features of a kernel.
std::uint64_t features_of(Version version);

}  // namespace uffdkit::sim
