// The creation ladder on the running kernel, as this user and as one without rights.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>

#include "support/child.h"
#include "support/mapping.h"
#include "support/serving.h"

namespace uffdkit {
namespace {

using test::Background;
using test::Channel;
using test::Child;
using test::Mapping;
using test::page_of;
using test::user_faults;

constexpr uid_t kNobody = 65534;

bool become_nobody() {
  return setresgid(kNobody, kNobody, kNobody) == 0 && setresuid(kNobody, kNobody, kNobody) == 0;
}

// Why a process cannot be made that may create user-mode userfaultfds only; empty if it can.
std::string lacks_for_nobody() {
  if (geteuid() != 0) return "needs root, to become a user without rights";
  int everybody = 0;
  std::ifstream("/proc/sys/vm/unprivileged_userfaultfd") >> everybody;
  if (everybody != 0) return "needs vm.unprivileged_userfaultfd=0";
  return "";
}

TEST(CreateOnThisKernel, ProbesFeaturesAndLeavesThemAllReported) {
  const Result<KernelFeatures> kernel = probe_features();
  if (!kernel) GTEST_SKIP() << "needs a userfaultfd: " << kernel.error().text();
  EXPECT_TRUE(kernel->available.has(Features(abi::kFeatureEventRemove | abi::kFeatureMissingShmem)));
  EXPECT_EQ(kernel->ioctls & 3, 3u);
}

TEST(CreateOnThisKernel, EnablesExactlyWhatItReports) {
  UFFD_OR_SKIP(uffd, {.kernel_faults = false,
                      .wanted = Features(abi::kFeatureEventRemove | abi::kFeatureExactAddress | 1ull << 62)});
  Result<Uffd> same = Uffd::receive(dup(uffd.fd()));
  ASSERT_TRUE(same) << same.error().text();
  EXPECT_EQ(same->features(), uffd.features());
  EXPECT_FALSE(uffd.features().has(Features(1ull << 62)));
}

TEST(CreateOnThisKernel, RefusesAFeatureThatDoesNotExist) {
  UFFD_OR_SKIP(possible, user_faults());
  const Result<Uffd> uffd = Uffd::create(user_faults(1ull << 62));
  ASSERT_FALSE(uffd);
  EXPECT_NE(uffd.error().message().find("bit 62"), std::string::npos);
}

TEST(CreateOnThisKernel, ServesFaultsInsideTheKernel) {
  UFFD_OR_SKIP(uffd, {});
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const UniqueFd out(ends[0]);
  const UniqueFd in(ends[1]);
  ssize_t written = 0;
  Background client(uffd, memory.range(), [&] { written = write(in.get(), memory.data(), 16); });
  test::next_fault(uffd);
  ASSERT_EQ(uffd.copy(memory.page(0), page_of(1)).stop, Stop::complete);
  client.join();
  EXPECT_EQ(written, 16);
}

TEST(CreateWithoutRights, RefusesKernelFaultsAndNamesTheRemedies) {
  if (const std::string lacks = lacks_for_nobody(); !lacks.empty()) GTEST_SKIP() << lacks;
  Child child([](const Channel&) {
    if (!become_nobody()) return 2;
    const Result<Uffd> uffd = Uffd::create({});
    if (uffd) return 3;
    const std::string text = uffd.error().text();
    for (const char* part : {"/dev/userfaultfd", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd", "EFAULT"})
      if (text.find(part) == std::string::npos) return 4;
    return 0;
  });
  EXPECT_EQ(child.wait(), 0);
}

TEST(CreateWithoutRights, FallsOnToUserModeAndDropsEventForkThatIsOnlyWanted) {
  if (const std::string lacks = lacks_for_nobody(); !lacks.empty()) GTEST_SKIP() << lacks;
  Child child([](const Channel&) {
    if (!become_nobody()) return 2;
    const Features remove(abi::kFeatureEventRemove);
    const Result<Uffd> uffd =
        Uffd::create({.kernel_faults = false, .wanted = remove | Features(abi::kFeatureEventFork)});
    if (!uffd) return 3;
    if (uffd->way() != CreateWay::user_mode) return 4;
    if (uffd->features() != remove) return 5;
    if (Uffd::create(user_faults(abi::kFeatureEventFork))) return 6;
    return 0;
  });
  EXPECT_EQ(child.wait(), 0);
}

TEST(CreateWithoutRights, SystemCallsOnMissingPagesFail) {
  if (const std::string lacks = lacks_for_nobody(); !lacks.empty()) GTEST_SKIP() << lacks;
  Child child([](const Channel&) {
    if (!become_nobody()) return 2;
    const Result<Uffd> uffd = Uffd::create(user_faults());
    const Mapping memory = Mapping::anonymous(4096);
    int ends[2];
    if (!uffd || !uffd->register_range(memory.range(), kMissing) || pipe(ends) != 0) return 3;
    const bool refused = write(ends[1], memory.data(), 16) == -1 && errno == EFAULT;
    return refused ? 0 : 4;
  });
  EXPECT_EQ(child.wait(), 0);
}

}  // namespace
}  // namespace uffdkit
