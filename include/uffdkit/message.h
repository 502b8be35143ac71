// Layer: kernel
// What a userfaultfd tells, decoded once. Source: userfaultfd(2), "Reading from the userfaultfd object".
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/units.h>

#include <cstdint>
#include <variant>

namespace uffdkit {

// A thread waits for a page. One message per waiting thread, and another each time that it faults again
// (after a wake, a signal): several messages for one page are normal.
struct Fault {
  enum class Kind : std::uint8_t {
    missing,        // no page there
    minor,          // the page is in the page cache, but not mapped (5.13)
    write_protect,  // the page is write-protected through userfaultfd (5.7)
  };
  Address address;  // rounded down to the page, unless EXACT_ADDRESS was enabled
  Kind kind;
  bool write;               // the access was a write
  std::uint32_t thread_id;  // in the faulting task's own pid namespace; 0 unless THREAD_ID was enabled
};

// The process forked; its child has a userfaultfd of its own. (EVENT_FORK)
struct ForkEvent {
  int child_fd;  // open in the process that read the message, which owns it from then on: Uffd::adopt() it
};

// mremap(2) moved memory; the registration went with it. (EVENT_REMAP)
struct RemapEvent {
  AddressRange from;  // the old range, with its old length
  Address to;
};

// The range was given back by madvise(2) with MADV_DONTNEED, MADV_FREE or MADV_REMOVE. It stays registered;
// what is read there from now on must be zero. (EVENT_REMOVE)
struct RemoveEvent {
  AddressRange range;
};

// The range is no longer mapped, or something else is mapped there. (EVENT_UNMAP)
struct UnmapEvent {
  AddressRange range;
};

// A message of a newer kernel.
struct UnknownMessage {
  std::uint8_t event;
};

using Message = std::variant<Fault, ForkEvent, RemapEvent, RemoveEvent, UnmapEvent, UnknownMessage>;

// Total: every value of `raw` has a meaning. A fork message's descriptor passes to the caller, so decode each
// fork message once only.
Message decode(const abi::Msg& raw);

// The same for a loop that wants faults told from events first: `raw.event` is abi::kEventPagefault.
inline Fault decode_fault(const abi::Msg& raw) {
  const auto& fault = raw.arg.pagefault;
  const Fault::Kind kind = (fault.flags & abi::kPagefaultWp) != 0      ? Fault::Kind::write_protect
                           : (fault.flags & abi::kPagefaultMinor) != 0 ? Fault::Kind::minor
                                                                       : Fault::Kind::missing;
  return Fault{.address = Address(fault.address),
               .kind = kind,
               .write = (fault.flags & abi::kPagefaultWrite) != 0,
               .thread_id = fault.ptid};
}

}  // namespace uffdkit
