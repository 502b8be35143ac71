// What the kernel layer makes of each answer, on kernels that answer as the test says.
#include <gtest/gtest.h>
#include <poll.h>
#include <uffdkit/uffd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <ostream>
#include <vector>

#include "support/scripted_system_calls.h"

namespace uffdkit {
namespace {

using test::ScriptedSystemCalls;

constexpr AddressRange kRange{Address(0x10000), ByteCount(0x4000)};

struct Answer {
  int os_error;
  Stop stop;
};

// googletest names a parameter so.
void PrintTo(const Answer& answer, std::ostream* out) {
  *out << strerrorname_np(answer.os_error);
}

class FillingIoctl : public testing::TestWithParam<Answer> {};

TEST_P(FillingIoctl, KeepsTheErrnoAndSaysWhatItMeans) {
  ScriptedSystemCalls kernel;
  kernel.on_ioctl = [](unsigned long, void*) { return -GetParam().os_error; };
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  for (const Outcome& outcome : {uffd.zero(kRange), uffd.poison(kRange), uffd.resume(kRange),
                                 uffd.move(kRange.start, kRange), uffd.protect(kRange)}) {
    EXPECT_EQ(outcome.stop, GetParam().stop);
    EXPECT_EQ(outcome.os_error, GetParam().os_error);
    EXPECT_EQ(outcome.done, ByteCount(0));
  }
}

INSTANTIATE_TEST_SUITE_P(Errno, FillingIoctl,
                         testing::Values(Answer{EEXIST, Stop::present}, Answer{ENOENT, Stop::not_ready},
                                         Answer{ESRCH, Stop::gone}, Answer{ENOMEM, Stop::no_memory},
                                         Answer{EFAULT, Stop::bad_memory}, Answer{EBUSY, Stop::busy},
                                         Answer{EIO, Stop::poisoned}, Answer{EHWPOISON, Stop::poisoned},
                                         Answer{EINVAL, Stop::invalid}, Answer{EAGAIN, Stop::changing},
                                         Answer{ENOTTY, Stop::other}, Answer{EBADF, Stop::other}),
                         [](const auto& answer) { return strerrorname_np(answer.param.os_error); });

TEST(FillingIoctl, IsCutShortWhereTheKernelCountedSomeBytes) {
  ScriptedSystemCalls kernel;
  kernel.on_ioctl = [](unsigned long, void* argument) {
    static_cast<abi::FillArgs*>(argument)->done = 0x1000;
    return -EAGAIN;
  };
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  const Outcome outcome = uffd.zero(kRange);
  EXPECT_EQ(outcome.stop, Stop::cut_short);
  EXPECT_EQ(outcome.done, ByteCount(0x1000));
}

TEST(FillingIoctl, IsChangingWhereANewKernelWritesMinusEagain) {
  ScriptedSystemCalls kernel;
  kernel.on_ioctl = [](unsigned long, void* argument) {
    static_cast<abi::CopyArgs*>(argument)->done = -EAGAIN;
    return -EAGAIN;
  };
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  const std::array<std::byte, 4096> page{};
  const Outcome outcome = uffd.copy(kRange.start, page);
  EXPECT_EQ(outcome.stop, Stop::changing);
  EXPECT_EQ(outcome.done, ByteCount(0));
}

TEST(FillingIoctl, IsChangingWhereAnOldKernelLeavesTheCountUnwritten) {
  ScriptedSystemCalls kernel;
  std::int64_t preset = -1;
  kernel.on_ioctl = [&](unsigned long request, void* argument) {
    preset = request == abi::kIoctlCopy ? static_cast<abi::CopyArgs*>(argument)->done
                                        : static_cast<abi::FillArgs*>(argument)->done;
    return -EAGAIN;
  };
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  const std::array<std::byte, 4096> page{};
  EXPECT_EQ(uffd.copy(kRange.start, page).stop, Stop::changing);
  EXPECT_EQ(preset, 0);
  EXPECT_EQ(uffd.resume(kRange).stop, Stop::changing);
  EXPECT_EQ(preset, 0);
}

TEST(FillingIoctl, PassesItsModesOn) {
  ScriptedSystemCalls kernel;
  std::uint64_t mode = 0;
  kernel.on_ioctl = [&](unsigned long request, void* argument) {
    mode = request == abi::kIoctlCopy || request == abi::kIoctlMove
               ? static_cast<abi::CopyArgs*>(argument)->mode
           : request == abi::kIoctlWriteprotect ? static_cast<abi::WriteprotectArgs*>(argument)->mode
                                                : static_cast<abi::FillArgs*>(argument)->mode;
    return 0;
  };
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  const std::array<std::byte, 4096> page{};
  uffd.copy(kRange.start, page, Wake::no, Protect::yes);
  EXPECT_EQ(mode, abi::kDontWake | abi::kCopyWp);
  uffd.copy(kRange.start, page);
  EXPECT_EQ(mode, 0u);
  uffd.resume(kRange, Wake::no, Protect::yes);
  EXPECT_EQ(mode, abi::kDontWake | abi::kContinueWp);
  uffd.zero(kRange, Wake::no);
  EXPECT_EQ(mode, abi::kDontWake);
  uffd.poison(kRange, Wake::no);
  EXPECT_EQ(mode, abi::kDontWake);
  uffd.move(kRange.start, kRange, Wake::no, SourceHoles::allow);
  EXPECT_EQ(mode, abi::kDontWake | abi::kMoveAllowSrcHoles);
  uffd.protect(kRange);
  EXPECT_EQ(mode, abi::kWriteprotectWp);
  uffd.unprotect(kRange, Wake::no);
  EXPECT_EQ(mode, abi::kWriteprotectDontWake);
  uffd.unprotect(kRange);
  EXPECT_EQ(mode, 0u);
}

TEST(UnregisterRange, WakesAfterUnregistering) {
  ScriptedSystemCalls kernel;
  std::vector<unsigned long> requests;
  kernel.on_ioctl = [&](unsigned long request, void*) {
    requests.push_back(request);
    return 0;
  };
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  ASSERT_TRUE(uffd.unregister_range(kRange));
  EXPECT_EQ(requests, (std::vector{abi::kIoctlUnregister, abi::kIoctlWake}));
}

TEST(UffdRead, CountsASignalAndAnEmptyQueueAsNoMessage) {
  ScriptedSystemCalls kernel;
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  std::array<abi::Msg, 2> messages;
  for (const int error : {EAGAIN, EINTR}) {
    kernel.read_error = error;
    EXPECT_EQ(uffd.read(messages).messages, 0u);
    EXPECT_EQ(uffd.read(messages).os_error, 0);
  }
  kernel.read_error = EMFILE;
  EXPECT_EQ(uffd.read(messages).os_error, EMFILE);
}

TEST(WaitReadable, TellsATimeLimitFromAMessageAndFromAnError) {
  ScriptedSystemCalls kernel;
  const Uffd uffd = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
  kernel.poll_answer = POLLIN;
  EXPECT_TRUE(uffd.wait_readable(0).value());
  kernel.poll_answer = 0;
  EXPECT_FALSE(uffd.wait_readable(0).value());
  kernel.poll_answer = -EINTR;
  EXPECT_FALSE(uffd.wait_readable(0).value());
  kernel.poll_answer = POLLERR;
  EXPECT_FALSE(uffd.wait_readable(0));
  kernel.poll_answer = POLLNVAL;
  EXPECT_FALSE(uffd.wait_readable(0)) << "a closed descriptor would be polled for ever";
}

TEST(TargetAlive, AsksAThirtyTwoBitProcessWithinItsAddresses) {
  ScriptedSystemCalls kernel;
  kernel.on_ioctl = [](unsigned long, void* argument) {
    const abi::RangeArgs& range = static_cast<abi::FillArgs*>(argument)->range;
    return range.start + range.len > 0xc0000000 ? -EINVAL : -ESRCH;
  };
  EXPECT_FALSE(Uffd::adopt(kernel.make_descriptor(), Features(), kernel).target_alive());
}

TEST(UffdOwnership, ClosesItsDescriptorOnceWhereverItWasMoved) {
  ScriptedSystemCalls kernel;
  {
    Uffd first = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
    Uffd second = Uffd::adopt(kernel.make_descriptor(), Features(), kernel);
    second = std::move(first);
    EXPECT_EQ(kernel.open_descriptors().size(), 1u);
    const Uffd third(std::move(second));
    EXPECT_EQ(kernel.open_descriptors().size(), 1u);
  }
  EXPECT_TRUE(kernel.open_descriptors().empty());
}

TEST(UffdOwnership, GivesItsDescriptorUpUnclosed) {
  ScriptedSystemCalls kernel;
  const int fd = kernel.make_descriptor();
  EXPECT_EQ(Uffd::adopt(fd, Features(), kernel).release(), fd);
  EXPECT_TRUE(kernel.open_descriptors().contains(fd));
}

}  // namespace
}  // namespace uffdkit
