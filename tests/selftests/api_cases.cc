// The two cases of the API itself: UFFDIO_API by hand, on a descriptor of each way.
#include <fcntl.h>

#include <cerrno>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

// What came of making a bare descriptor and of asking it for these.
int enable(OneWay& system, int fd, std::uint64_t api, std::uint64_t features) {
  abi::ApiArgs args{.api = api, .features = features, .ioctls = 0};
  return system.ioctl(fd, abi::kIoctlApi, reinterpret_cast<std::uintptr_t>(&args));
}

UniqueFd bare_descriptor(OneWay& system) {
  if (system.way() == CreateWay::system_call) {
    const int made = system.userfaultfd(O_CLOEXEC | O_NONBLOCK);
    if (made < 0) throw Lacking("needs userfaultfd(2) with kernel faults");
    return UniqueFd(made);
  }
  const UniqueFd device(system.open(abi::kDevicePath, O_RDWR | O_CLOEXEC));
  if (!device) throw Lacking("needs /dev/userfaultfd");
  return UniqueFd(system.ioctl(device.get(), abi::kIocNew, O_CLOEXEC | O_NONBLOCK));
}

void check_api(CreateWay way) try {
  OneWay system(way);
  const UniqueFd fd = bare_descriptor(system);
  ASSERT_TRUE(fd);
  EXPECT_EQ(enable(system, fd.get(), abi::kApi + 1, 0), -EINVAL) << "a wrong api";
  EXPECT_EQ(enable(system, fd.get(), abi::kApi, std::uint64_t{1} << 63), -EINVAL) << "an unknown feature";
  EXPECT_EQ(enable(system, fd.get(), abi::kApi, 0), 0);
  EXPECT_EQ(enable(system, fd.get(), abi::kApi, 0), -EINVAL) << "a second time";
} catch (const Lacking& lacking) {
  GTEST_SKIP() << lacking.what();
}

TEST(api, syscall) {
  check_api(CreateWay::system_call);
}

TEST(api, device) {
  check_api(CreateWay::device);
}

}  // namespace
}  // namespace uffdkit::selftests
