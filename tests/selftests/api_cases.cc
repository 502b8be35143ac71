// The two cases of the API itself: UFFDIO_API by hand, on a descriptor of each way.
#include <fcntl.h>

#include <cerrno>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

// What came of asking a bare descriptor for these.
int enable(OneWay& system, int fd, std::uint64_t api, std::uint64_t features) {
  abi::ApiArgs args{.api = api, .features = features, .ioctls = 0};
  return system.ioctl(fd, abi::kIoctlApi, reinterpret_cast<std::uintptr_t>(&args));
}

int bare_descriptor(OneWay& system) {
  if (system.way() == CreateWay::system_call) {
    const int made = system.userfaultfd(O_CLOEXEC | O_NONBLOCK);
    if (made < 0) throw Lacking("needs userfaultfd(2) with kernel faults");
    return made;
  }
  const int device = system.open(abi::kDevicePath, O_RDWR | O_CLOEXEC);
  if (device < 0) throw Lacking("needs /dev/userfaultfd");
  const int made = system.ioctl(device, abi::kIocNew, O_CLOEXEC | O_NONBLOCK);
  system.close(device);
  return made;
}

}  // namespace

KERNEL_CASE(api) {
  OneWay& system = test.system();
  const int fd = bare_descriptor(system);
  ASSERT_GE(fd, 0);
  EXPECT_EQ(enable(system, fd, abi::kApi + 1, 0), -EINVAL) << "a wrong api";
  EXPECT_EQ(enable(system, fd, abi::kApi, std::uint64_t{1} << 63), -EINVAL) << "an unknown feature";
  EXPECT_EQ(enable(system, fd, abi::kApi, 0), 0);
  EXPECT_EQ(enable(system, fd, abi::kApi, 0), -EINVAL) << "a second time";
  system.close(fd);
}

}  // namespace uffdkit::selftests
