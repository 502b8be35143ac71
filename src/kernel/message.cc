#include <uffdkit/message.h>

namespace uffdkit {
namespace {

Fault decode_fault(const abi::Msg& raw) {
  const auto& fault = raw.arg.pagefault;
  const Fault::Kind kind = (fault.flags & abi::kPagefaultWp) != 0      ? Fault::Kind::write_protect
                           : (fault.flags & abi::kPagefaultMinor) != 0 ? Fault::Kind::minor
                                                                       : Fault::Kind::missing;
  return Fault{.address = Address(fault.address),
               .kind = kind,
               .write = (fault.flags & abi::kPagefaultWrite) != 0,
               .thread_id = fault.ptid};
}

AddressRange decode_range(const abi::Msg& raw) {
  const auto& range = raw.arg.remove;
  return {Address(range.start), ByteCount(range.end - range.start)};
}

}  // namespace

[[gnu::hot]] Message decode(const abi::Msg& raw) {
  switch (raw.event) {
    case abi::kEventPagefault:
      return decode_fault(raw);
    case abi::kEventFork:
      return ForkEvent{.child_fd = static_cast<int>(raw.arg.fork.ufd)};
    case abi::kEventRemap:
      return RemapEvent{.from = {Address(raw.arg.remap.from), ByteCount(raw.arg.remap.len)},
                        .to = Address(raw.arg.remap.to)};
    case abi::kEventRemove:
      return RemoveEvent{.range = decode_range(raw)};
    case abi::kEventUnmap:
      return UnmapEvent{.range = decode_range(raw)};
    default:
      return UnknownMessage{.event = raw.event};
  }
}

}  // namespace uffdkit
