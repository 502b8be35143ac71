#include "sim/access_rules.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>

namespace uffdkit::sim {
namespace {

// A capability counts only in the initial user namespace: the kernel asks capable(), not ns_capable(), and
// root of a child namespace does not have it there. Source: user_namespaces(7), "Interaction of user
// namespaces ...".
bool has_sys_ptrace(const Credentials& who) {
  return who.cap_sys_ptrace && who.initial_user_namespace;
}

// CAP_DAC_OVERRIDE reaches an inode only if its owner is mapped into the namespace; the device belongs to
// users of the initial one, and a child namespace is taken to map none of them.
bool has_dac_override(const Credentials& who) {
  return who.cap_dac_override && who.initial_user_namespace;
}

bool in_group(const Credentials& who, unsigned group) {
  return std::ranges::find(who.gids, group) != who.gids.end();
}

constexpr unsigned kRead = 4;

// acl(5), "ACCESS CHECK ALGORITHM", for reading.
bool may_read(const Credentials& who, const DeviceNode& node) {
  const unsigned group_bits = node.mode >> 3 & 7;
  if (who.uid == node.owner) return (node.mode >> 6 & kRead) != 0;
  for (const AclEntry& entry : node.acl_users)
    if (entry.id == who.uid) return (entry.permissions & group_bits & kRead) != 0;

  // With an ACL the group bits of the mode are its mask; without one they are the owning group's permissions.
  const bool has_acl = !node.acl_users.empty() || !node.acl_groups.empty();
  const unsigned mask = has_acl ? group_bits : 7;
  bool group_matched = false;
  const auto group_allows = [&](unsigned id, unsigned permissions) {
    if (!in_group(who, id)) return false;
    group_matched = true;
    return (permissions & mask & kRead) != 0;
  };
  if (group_allows(node.group, has_acl ? node.acl_owning_group : group_bits)) return true;
  for (const AclEntry& entry : node.acl_groups)
    if (group_allows(entry.id, entry.permissions)) return true;
  // A matching group that does not allow it is the last word: "other" is not asked.
  return !group_matched && (node.mode & kRead) != 0;
}

}  // namespace

// userfaultfd(2), "UFFD_USER_MODE_ONLY", and Documentation/admin-guide/sysctl/vm.rst,
// "unprivileged_userfaultfd". Permission comes before the check of the flags: a stranger with a wrong flag
// hears EPERM.
int may_call_userfaultfd(const Credentials& who, int flags, bool sysctl_unprivileged) {
  const bool allowed = (flags & abi::kUserModeOnly) != 0 || sysctl_unprivileged || has_sys_ptrace(who);
  if (!allowed) return -EPERM;
  return check_creation_flags(flags);
}

// Whoever can open the device may create any kind of userfaultfd from it; sysctl and capability are not
// asked. Source: Documentation/admin-guide/mm/userfaultfd.rst, "Creating a userfaultfd".
int may_open_device(const Credentials& who, const DeviceNode& node, Version version) {
  if (!node.exists || version < Version{6, 1}) return -ENOENT;
  return may_read(who, node) || has_dac_override(who) ? 0 : -EACCES;
}

int check_creation_flags(int flags) {
  return (flags & ~(O_CLOEXEC | O_NONBLOCK | abi::kUserModeOnly)) != 0 ? -EINVAL : 0;
}

// A fork event hands out a descriptor for the child's memory, so it asks for the right to trace: when it is
// enabled, and of whoever enables it. Source: ioctl_userfaultfd(2), UFFDIO_API, EPERM.
int may_enable(const Credentials& who, std::uint64_t features) {
  return (features & abi::kFeatureEventFork) != 0 && !has_sys_ptrace(who) ? -EPERM : 0;
}

// First kernel of each feature: see abi.h.
std::uint64_t features_of(Version version) {
  std::uint64_t features = (abi::kFeatureThreadId << 1) - 1;  // bits 0 to 8: all before 5.11
  const auto since = [&](Version first, std::uint64_t bit) {
    if (version >= first) features |= bit;
  };
  since({5, 13}, abi::kFeatureMinorHugetlbfs);
  since({5, 14}, abi::kFeatureMinorShmem);
  since({5, 18}, abi::kFeatureExactAddress);
  since({5, 19}, abi::kFeatureWpHugetlbfsShmem);
  since({6, 4}, abi::kFeatureWpUnpopulated);
  since({6, 6}, abi::kFeaturePoison);
  since({6, 7}, abi::kFeatureWpAsync);
  since({6, 8}, abi::kFeatureMove);
  return features;
}

}  // namespace uffdkit::sim
