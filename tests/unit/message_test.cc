#include <gtest/gtest.h>
#include <uffdkit/message.h>

namespace uffdkit {
namespace {

Fault decode_fault(std::uint64_t flags) {
  abi::Msg raw{};
  raw.event = abi::kEventPagefault;
  raw.arg.pagefault = {.flags = flags, .address = 0x7000, .ptid = 42};
  return std::get<Fault>(decode(raw));
}

TEST(Decode, FaultKindsComeFromTheFlags) {
  EXPECT_EQ(decode_fault(0).kind, Fault::Kind::missing);
  EXPECT_EQ(decode_fault(abi::kPagefaultWrite).kind, Fault::Kind::missing);
  EXPECT_EQ(decode_fault(abi::kPagefaultMinor).kind, Fault::Kind::minor);
  EXPECT_EQ(decode_fault(abi::kPagefaultWp | abi::kPagefaultWrite).kind, Fault::Kind::write_protect);
}

TEST(Decode, FaultsSayWhetherTheAccessWasAWrite) {
  EXPECT_FALSE(decode_fault(0).write);
  EXPECT_TRUE(decode_fault(abi::kPagefaultWrite).write);
  EXPECT_FALSE(decode_fault(abi::kPagefaultMinor).write);
  EXPECT_TRUE(decode_fault(abi::kPagefaultMinor | abi::kPagefaultWrite).write);
}

TEST(Decode, FaultsKeepAddressAndThread) {
  EXPECT_EQ(decode_fault(0).address, Address(0x7000));
  EXPECT_EQ(decode_fault(0).thread_id, 42u);
}

TEST(Decode, RemoveAndUnmapGiveTheirRange) {
  abi::Msg raw{};
  raw.arg.remove = {.start = 0x5000, .end = 0x9000};
  const AddressRange range{Address(0x5000), ByteCount(0x4000)};
  raw.event = abi::kEventRemove;
  EXPECT_EQ(std::get<RemoveEvent>(decode(raw)).range, range);
  raw.event = abi::kEventUnmap;
  EXPECT_EQ(std::get<UnmapEvent>(decode(raw)).range, range);
}

TEST(Decode, RemapGivesTheOldRangeAndTheNewPlace) {
  abi::Msg raw{};
  raw.event = abi::kEventRemap;
  raw.arg.remap = {.from = 0x5000, .to = 0x20000, .len = 0x2000};
  const auto remap = std::get<RemapEvent>(decode(raw));
  EXPECT_EQ(remap.from, (AddressRange{Address(0x5000), ByteCount(0x2000)}));
  EXPECT_EQ(remap.to, Address(0x20000));
}

TEST(Decode, ForkGivesTheDescriptor) {
  abi::Msg raw{};
  raw.event = abi::kEventFork;
  raw.arg.fork.ufd = 17;
  EXPECT_EQ(std::get<ForkEvent>(decode(raw)).child_fd, 17);
}

TEST(Decode, AnyOtherEventIsUnknownAndKeepsItsNumber) {
  for (unsigned event = 0; event < 256; ++event) {
    if (event >= abi::kEventPagefault && event <= abi::kEventUnmap) continue;
    abi::Msg raw{};
    raw.event = static_cast<std::uint8_t>(event);
    EXPECT_EQ(std::get<UnknownMessage>(decode(raw)).event, event);
  }
}

}  // namespace
}  // namespace uffdkit
