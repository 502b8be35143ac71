// Registering and unregistering against the running kernel.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <cerrno>
#include <string>

#include "support/mapping.h"
#include "support/serving.h"

namespace uffdkit {
namespace {

using test::Background;
using test::Mapping;
using test::next_fault;
using test::page_of;
using test::user_faults;

TEST(Register, SaysWhatCanBeDoneWithAnonymousMemory) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePagefaultFlagWp));
  const Mapping memory = Mapping::anonymous(4096);
  const Result<RangeIoctls> ioctls = uffd.register_range(memory.range(), kMissing | kWriteProtect);
  ASSERT_TRUE(ioctls) << ioctls.error().text();
  EXPECT_TRUE(
      ioctls->has(RangeIoctls(abi::kHasWake | abi::kHasCopy | abi::kHasZeropage | abi::kHasWriteprotect)));
  EXPECT_FALSE(ioctls->has(RangeIoctls(abi::kHasContinue)));
}

TEST(Register, RefusesMinorFaultsOfAnonymousMemory) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  const Result<RangeIoctls> ioctls = uffd.register_range(memory.range(), kMinor);
  ASSERT_FALSE(ioctls);
  EXPECT_EQ(ioctls.error().os_error(), EINVAL);
}

TEST(Register, RefusesMemoryThatAnotherUserfaultfdServes) {
  UFFD_OR_SKIP(uffd, user_faults());
  UFFD_OR_SKIP(other, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  const Result<RangeIoctls> ioctls = other.register_range(memory.range(), kMissing);
  ASSERT_FALSE(ioctls);
  EXPECT_EQ(ioctls.error().os_error(), EBUSY);
}

TEST(Register, RefusesASharedMappingThatCanNeverBeWritten) {
  UFFD_OR_SKIP(uffd, user_faults());
  const UniqueFd file = test::memory_file(4096);
  const UniqueFd read_only(
      open(("/proc/self/fd/" + std::to_string(file.get())).c_str(), O_RDONLY | O_CLOEXEC));
  ASSERT_TRUE(read_only);
  const Mapping memory = Mapping::map(nullptr, 4096, PROT_READ, MAP_SHARED, read_only.get());
  const Result<RangeIoctls> ioctls = uffd.register_range(memory.range(), kMissing);
  ASSERT_FALSE(ioctls);
  EXPECT_EQ(ioctls.error().os_error(), EPERM);
}

TEST(Register, RefusesARangeWithoutAnyMapping) {
  UFFD_OR_SKIP(uffd, user_faults());
  AddressRange gone{};
  {
    const Mapping memory = Mapping::anonymous(4096);
    gone = memory.range();
  }
  EXPECT_FALSE(uffd.register_range(gone, kMissing));
}

TEST(Unregister, LetsAMissingFaultReadZero) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  Background reader(uffd, memory.range(), [&] { EXPECT_EQ(memory.read(0), std::byte{0}); });
  next_fault(uffd);
  ASSERT_TRUE(uffd.unregister_range(memory.range()));
  reader.join();
}

TEST(Unregister, WakesAWriterThatWaitsForAProtectedPage) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePagefaultFlagWp));
  const Mapping memory = Mapping::anonymous(4096);
  memory.write(0, std::byte{1});
  ASSERT_TRUE(uffd.register_range(memory.range(), kWriteProtect));
  ASSERT_EQ(uffd.protect(memory.range()).stop, Stop::complete);
  Background writer(uffd, memory.range(), [&] { memory.write(0, std::byte{2}); });
  EXPECT_EQ(next_fault(uffd).kind, Fault::Kind::write_protect);
  ASSERT_TRUE(uffd.unregister_range(memory.range()));
  writer.join();
  EXPECT_EQ(memory.read(0), std::byte{2});
}

TEST(Unregister, WakesAReaderThatWaitsInAMinorFault) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMinorShmem));
  const UniqueFd file = test::memory_file(4096);
  const Mapping memory = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  ASSERT_EQ(pwrite(file.get(), page_of(4).data(), 4096, 0), 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMinor));
  Background reader(uffd, memory.range(), [&] { EXPECT_EQ(memory.read(0), std::byte{4}); });
  EXPECT_EQ(next_fault(uffd).kind, Fault::Kind::minor);
  ASSERT_TRUE(uffd.unregister_range(memory.range()));
  reader.join();
}

TEST(Unregister, OfUnregisteredMemoryIsNoError) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  EXPECT_TRUE(uffd.unregister_range(memory.range()));
}

TEST(WakeRange, IsHarmlessAnywhereAndRefusesAnEmptyRange) {
  UFFD_OR_SKIP(uffd, user_faults());
  const Mapping memory = Mapping::anonymous(4096);
  EXPECT_TRUE(uffd.wake(memory.range()));
  EXPECT_FALSE(uffd.wake({memory.page(0), ByteCount(0)}));
}

TEST(Resume, MapsThePageThatIsInTheCache) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMinorShmem));
  const UniqueFd file = test::memory_file(4096);
  const Mapping memory = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  ASSERT_EQ(pwrite(file.get(), page_of(4).data(), 4096, 0), 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMinor));
  Background reader(uffd, memory.range(), [&] { EXPECT_EQ(memory.read(0), std::byte{5}); });
  EXPECT_EQ(next_fault(uffd).kind, Fault::Kind::minor);
  ASSERT_EQ(pwrite(file.get(), page_of(5).data(), 4096, 0), 4096);
  EXPECT_EQ(uffd.resume(memory.range()).stop, Stop::complete);
  reader.join();
  EXPECT_EQ(uffd.resume(memory.range()).stop, Stop::present);
}

TEST(Resume, IsBadMemoryWhereTheCacheHasNoPage) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMinorShmem));
  const UniqueFd file = test::memory_file(4096);
  const Mapping memory = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing | kMinor));
  EXPECT_EQ(uffd.resume(memory.range()).stop, Stop::bad_memory);
}

TEST(Resume, IsInvalidOnAnonymousMemory) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMinorShmem));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  EXPECT_EQ(uffd.resume(memory.range()).stop, Stop::invalid);
}

TEST(Resume, CanMapThePageProtected) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureMinorShmem | abi::kFeatureWpUnpopulated));
  const UniqueFd file = test::memory_file(4096);
  const Mapping memory = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  ASSERT_EQ(pwrite(file.get(), page_of(4).data(), 4096, 0), 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMinor | kWriteProtect));
  ASSERT_EQ(uffd.resume(memory.range(), Wake::yes, Protect::yes).stop, Stop::complete);
  Background writer(uffd, memory.range(), [&] { memory.write(0, std::byte{1}); });
  EXPECT_EQ(next_fault(uffd).kind, Fault::Kind::write_protect);
  ASSERT_EQ(uffd.unprotect(memory.range()).stop, Stop::complete);
  writer.join();
}

TEST(ProtectRange, StopsAWriterUntilItIsUnprotected) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePagefaultFlagWp));
  const Mapping memory = Mapping::anonymous(4096);
  memory.write(0, std::byte{1});
  ASSERT_TRUE(uffd.register_range(memory.range(), kWriteProtect));
  const Outcome armed = uffd.protect(memory.range());
  EXPECT_EQ(armed.stop, Stop::complete);
  EXPECT_EQ(armed.done, ByteCount(4096));
  Background writer(uffd, memory.range(), [&] { memory.write(0, std::byte{2}); });
  const Fault fault = next_fault(uffd);
  EXPECT_EQ(fault.kind, Fault::Kind::write_protect);
  EXPECT_TRUE(fault.write);
  EXPECT_EQ(memory.read(0), std::byte{1}) << "reading is not stopped";
  EXPECT_EQ(uffd.unprotect(memory.range()).stop, Stop::complete);
  writer.join();
  EXPECT_EQ(memory.read(0), std::byte{2});
}

TEST(ProtectRange, LeavesWritersAsleepUntilTheyAreWokenWhenAskedTo) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePagefaultFlagWp));
  const Mapping memory = Mapping::anonymous(4096);
  memory.write(0, std::byte{1});
  ASSERT_TRUE(uffd.register_range(memory.range(), kWriteProtect));
  ASSERT_EQ(uffd.protect(memory.range()).stop, Stop::complete);
  Background writer(uffd, memory.range(), [&] { memory.write(0, std::byte{2}); });
  next_fault(uffd);
  EXPECT_EQ(uffd.unprotect(memory.range(), Wake::no).stop, Stop::complete);
  EXPECT_EQ(test::waiting_threads(uffd), 1u);
  ASSERT_TRUE(uffd.wake(memory.range()));
  writer.join();
}

TEST(ProtectRange, IsNotReadyWhereWriteProtectionIsNotRegistered) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePagefaultFlagWp));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  EXPECT_EQ(uffd.protect(memory.range()).stop, Stop::not_ready);
}

TEST(ProtectRange, ArmsEmptyPagesWithWpUnpopulated) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeatureWpUnpopulated));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kWriteProtect));
  ASSERT_EQ(uffd.protect(memory.range()).stop, Stop::complete);
  Background writer(uffd, memory.range(), [&] { memory.write(0, std::byte{2}); });
  EXPECT_EQ(next_fault(uffd).kind, Fault::Kind::write_protect);
  ASSERT_EQ(uffd.unprotect(memory.range()).stop, Stop::complete);
  writer.join();
}

TEST(Copy, CanInstallPagesProtected) {
  UFFD_OR_SKIP(uffd, user_faults(abi::kFeaturePagefaultFlagWp));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing | kWriteProtect));
  ASSERT_EQ(uffd.copy(memory.page(0), page_of(3), Wake::yes, Protect::yes).stop, Stop::complete);
  EXPECT_EQ(memory.read(0), std::byte{3});
  Background writer(uffd, memory.range(), [&] { memory.write(0, std::byte{4}); });
  EXPECT_EQ(next_fault(uffd).kind, Fault::Kind::write_protect);
  ASSERT_EQ(uffd.unprotect(memory.range()).stop, Stop::complete);
  writer.join();
}

}  // namespace
}  // namespace uffdkit
