#include <uffdkit/message.h>

namespace uffdkit {
namespace {

AddressRange decode_range(const abi::Msg& raw) {
  const auto& range = raw.arg.remove;
  return {Address(range.start), ByteCount(range.end - range.start)};
}

}  // namespace

Message decode(const abi::Msg& raw) {
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
