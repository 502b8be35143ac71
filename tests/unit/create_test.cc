// The creation ladder, feature negotiation and receive(), on kernels that answer as the test says.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <uffdkit/uffd.h>

#include <cerrno>
#include <cstring>

#include "support/scripted_system_calls.h"

namespace uffdkit {
namespace {

using test::ScriptedSystemCalls;

const Features kFork(abi::kFeatureEventFork);
const Features kPoison(abi::kFeaturePoison);
const Features kRemove(abi::kFeatureEventRemove);

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

class DeviceRefusal : public testing::TestWithParam<int> {};

TEST_P(DeviceRefusal, FallsOnToTheSystemCall) {
  ScriptedSystemCalls kernel;
  kernel.device_error = GetParam();
  const Result<Uffd> uffd = Uffd::create({}, kernel);
  ASSERT_TRUE(uffd) << uffd.error().text();
  EXPECT_EQ(uffd->way(), CreateWay::system_call);
}

TEST_P(DeviceRefusal, FallsOnToUserModeWhereThatIsEnough) {
  ScriptedSystemCalls kernel;
  kernel.device_error = GetParam();
  kernel.system_call_error = EPERM;
  const Result<Uffd> uffd = Uffd::create({.kernel_faults = false}, kernel);
  ASSERT_TRUE(uffd) << uffd.error().text();
  EXPECT_EQ(uffd->way(), CreateWay::user_mode);
  EXPECT_TRUE(kernel.creation_flags.back() & abi::kUserModeOnly);
}

INSTANTIATE_TEST_SUITE_P(Errno, DeviceRefusal, testing::Values(EACCES, EPERM, ENOENT, ENXIO),
                         [](const auto& error) { return strerrorname_np(error.param); });

TEST(CreationLadder, TakesTheDeviceFirst) {
  ScriptedSystemCalls kernel;
  const Result<Uffd> uffd = Uffd::create({}, kernel);
  ASSERT_TRUE(uffd);
  EXPECT_EQ(uffd->way(), CreateWay::device);
}

TEST(CreationLadder, NeverTakesUserModeWhereKernelFaultsAreNeeded) {
  ScriptedSystemCalls kernel;
  kernel.device_error = EACCES;
  kernel.system_call_error = EPERM;
  ASSERT_FALSE(Uffd::create({.kernel_faults = true}, kernel));
  for (const int flags : kernel.creation_flags) EXPECT_FALSE(flags & abi::kUserModeOnly);
}

TEST(CreationLadder, UsesTheDeviceInUserModeWhereTheSystemCallIsFiltered) {
  // A device that gives kernel faults gives user mode too, so only the fake can refuse the one.
  class OnlyUserMode : public ScriptedSystemCalls {
   public:
    int ioctl(int fd, unsigned long request, std::uintptr_t argument) override {
      if (request == abi::kIocNew && (argument & abi::kUserModeOnly) == 0) return -EPERM;
      return ScriptedSystemCalls::ioctl(fd, request, argument);
    }
  } kernel;
  kernel.system_call_error = ENOSYS;
  kernel.user_mode_error = ENOSYS;
  const Result<Uffd> uffd = Uffd::create({.kernel_faults = false}, kernel);
  ASSERT_TRUE(uffd) << uffd.error().text();
  EXPECT_EQ(uffd->way(), CreateWay::device_user_mode);
}

TEST(CreationLadder, ErrorNamesEveryWayWithItsReasonAndRemedy) {
  ScriptedSystemCalls kernel;
  kernel.device_error = ENOENT;
  kernel.system_call_error = EPERM;
  kernel.user_mode_error = EPERM;
  const Result<Uffd> uffd = Uffd::create({.kernel_faults = false}, kernel);
  ASSERT_FALSE(uffd);
  const Error& error = uffd.error();
  for (const CreateWay way :
       {CreateWay::device, CreateWay::system_call, CreateWay::device_user_mode, CreateWay::user_mode}) {
    EXPECT_TRUE(contains(error.message(), "\n  " + to_string(way) + ": ")) << error.text();
    EXPECT_TRUE(contains(error.remedy(), "\n  " + to_string(way) + ": ")) << error.text();
  }
  EXPECT_TRUE(contains(error.message(), "does not exist"));
  EXPECT_TRUE(contains(error.message(), "CAP_SYS_PTRACE"));
  EXPECT_TRUE(contains(error.remedy(), "vm.unprivileged_userfaultfd=1"));
  EXPECT_TRUE(contains(error.remedy(), "seccomp"));
}

TEST(CreationLadder, ErrorForKernelFaultsSaysWhatUserModeWouldCost) {
  ScriptedSystemCalls kernel;
  kernel.device_error = EACCES;
  kernel.system_call_error = EPERM;
  const Result<Uffd> uffd = Uffd::create({}, kernel);
  ASSERT_FALSE(uffd);
  EXPECT_TRUE(contains(uffd.error().message(), "no permission to open /dev/userfaultfd"));
  EXPECT_FALSE(contains(uffd.error().message(), "user mode only"));
  EXPECT_TRUE(contains(uffd.error().remedy(), "setfacl"));
  EXPECT_TRUE(contains(uffd.error().remedy(), "EFAULT"));
}

TEST(CreationLadder, NamesTheLimitOfDescriptorsAsTheReason) {
  ScriptedSystemCalls kernel;
  kernel.device_error = EMFILE;
  kernel.system_call_error = EMFILE;
  const Result<Uffd> uffd = Uffd::create({}, kernel);
  ASSERT_FALSE(uffd);
  EXPECT_EQ(uffd.error().os_error(), EMFILE);
  EXPECT_TRUE(contains(uffd.error().remedy(), "RLIMIT_NOFILE"));
}

TEST(CreationLadder, LeavesNoDescriptorBehind) {
  ScriptedSystemCalls kernel;
  {
    const Result<Uffd> uffd = Uffd::create({.wanted = kFork}, kernel);
  }
  kernel.fork_permitted = false;
  {
    const Result<Uffd> uffd = Uffd::create({.required = kFork}, kernel);
  }
  {
    const Result<Uffd> uffd = Uffd::create({.required = Features(1ull << 40)}, kernel);
  }
  try_create_ways(kernel);
  EXPECT_TRUE(probe_features(kernel));
  EXPECT_TRUE(kernel.open_descriptors().empty());
}

TEST(CreationLadder, PassesTheDescriptorsFlagsOn) {
  ScriptedSystemCalls kernel;
  ASSERT_TRUE(Uffd::create({.close_on_exec = true, .non_blocking = false}, kernel));
  EXPECT_EQ(kernel.creation_flags.back(), O_CLOEXEC);
  ASSERT_TRUE(Uffd::create({.close_on_exec = false, .non_blocking = true}, kernel));
  EXPECT_EQ(kernel.creation_flags.back(), O_NONBLOCK);
}

TEST(TryCreateWays, SaysOfEachWayWhetherItWorks) {
  ScriptedSystemCalls kernel;
  kernel.device_error = EACCES;
  kernel.system_call_error = EPERM;
  const std::vector<CreateAttempt> attempts = try_create_ways(kernel);
  ASSERT_EQ(attempts.size(), 4u);
  for (const CreateAttempt& attempt : attempts) {
    const bool works = attempt.way == CreateWay::user_mode;
    EXPECT_EQ(attempt.os_error == 0, works) << to_string(attempt.way);
    EXPECT_EQ(attempt.reason.empty(), works) << to_string(attempt.way);
    EXPECT_EQ(attempt.remedy.empty(), works) << to_string(attempt.way);
  }
}

TEST(Features, UnknownBitsOfANewerKernelAreKept) {
  ScriptedSystemCalls kernel;
  kernel.kernel_features = Features(abi::kFeaturesKnown | 1ull << 17 | 1ull << 40);
  const Result<KernelFeatures> probed = probe_features(kernel);
  ASSERT_TRUE(probed);
  EXPECT_EQ(probed->available, kernel.kernel_features);
  EXPECT_TRUE(contains(to_string(probed->available), "move, bit 17, bit 40"));
}

TEST(Features, UnknownBitsCanBeRequired) {
  ScriptedSystemCalls kernel;
  const Features future(1ull << 40);
  kernel.kernel_features = Features(abi::kFeaturesKnown) | future;
  const Result<Uffd> uffd = Uffd::create({.required = future}, kernel);
  ASSERT_TRUE(uffd);
  EXPECT_EQ(uffd->features(), future);
}

TEST(Features, WantedOnesThatTheKernelLacksAreLeftOut) {
  ScriptedSystemCalls kernel;
  kernel.kernel_features = kRemove;
  const Result<Uffd> uffd = Uffd::create({.wanted = kRemove | kPoison}, kernel);
  ASSERT_TRUE(uffd);
  EXPECT_EQ(uffd->features(), kRemove);
  EXPECT_EQ(kernel.features_asked.back(), kRemove);
}

TEST(Features, RequiredOnesThatTheKernelLacksAreAnErrorThatNamesTheVersion) {
  ScriptedSystemCalls kernel;
  kernel.kernel_features = kRemove;
  const Result<Uffd> uffd = Uffd::create({.required = kRemove | kPoison}, kernel);
  ASSERT_FALSE(uffd);
  EXPECT_TRUE(contains(uffd.error().message(), "poison"));
  EXPECT_FALSE(contains(uffd.error().message(), "event-remove"));
  EXPECT_TRUE(contains(uffd.error().remedy(), "6.6"));
}

TEST(Features, EventForkThatIsOnlyWantedIsDroppedWhereItIsNotPermitted) {
  ScriptedSystemCalls kernel;
  kernel.fork_permitted = false;
  const Result<Uffd> uffd = Uffd::create({.required = kPoison, .wanted = kFork | kRemove}, kernel);
  ASSERT_TRUE(uffd) << uffd.error().text();
  EXPECT_EQ(uffd->features(), kPoison | kRemove);
  EXPECT_EQ(kernel.features_asked.back(), kPoison | kRemove);
}

TEST(Features, EventForkThatIsRequiredIsAnErrorWhereItIsNotPermitted) {
  ScriptedSystemCalls kernel;
  kernel.fork_permitted = false;
  const Result<Uffd> uffd = Uffd::create({.required = kFork}, kernel);
  ASSERT_FALSE(uffd);
  EXPECT_EQ(uffd.error().os_error(), EPERM);
  EXPECT_TRUE(contains(uffd.error().remedy(), "CAP_SYS_PTRACE"));
}

TEST(Features, AreFoundByTheirNames) {
  for (const FeatureInfo& info : known_features()) EXPECT_EQ(feature_by_name(info.name), info.bit);
  EXPECT_FALSE(feature_by_name("telepathy"));
}

TEST(Receive, ReadsTheEnabledFeaturesFromTheKernel) {
  ScriptedSystemCalls kernel;
  kernel.descriptor_flags = O_RDWR | O_NONBLOCK;
  kernel.file_text =
      "pos:\t0\nflags:\t02004002\npending:\t0\ntotal:\t0\nAPI:\taa:80014048:80000000000001ff\n";
  const Result<Uffd> uffd = Uffd::receive(kernel.make_descriptor(), kernel);
  ASSERT_TRUE(uffd) << uffd.error().text();
  EXPECT_EQ(uffd->features(), Features(0x14048));
}

TEST(Receive, ClosesWhatItRefuses) {
  ScriptedSystemCalls kernel;
  kernel.descriptor_flags = O_RDWR | O_NONBLOCK;
  for (const char* text : {"pos:\t0\n", "", "API:\taa:", "API:\taa:zz", "API:\taa:0:8000000000000003\n"}) {
    kernel.file_text = text;
    EXPECT_FALSE(Uffd::receive(kernel.make_descriptor(), kernel)) << text;
  }
  kernel.read_error = EIO;
  EXPECT_FALSE(Uffd::receive(kernel.make_descriptor(), kernel));
  EXPECT_TRUE(kernel.open_descriptors().empty());
}

}  // namespace
}  // namespace uffdkit
