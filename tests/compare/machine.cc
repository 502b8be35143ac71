#include "compare/machine.h"

#include <fmt/format.h>

#include <algorithm>

namespace uffdkit::differential {

std::string describe(std::vector<SeenMessage> messages, bool order_is_open) {
  if (order_is_open) {
    const auto events = std::ranges::find_if(messages, [](const SeenMessage& seen) { return !seen.fault; });
    std::sort(messages.begin(), events,
              [](const SeenMessage& a, const SeenMessage& b) { return a.text < b.text; });
  }
  std::string text;
  for (const SeenMessage& seen : messages) text += "\n      " + seen.text;
  return text;
}

std::string describe(const abi::Msg& message, int thread, int child_uffd) {
  switch (message.event) {
    case abi::kEventPagefault:
      return fmt::format("fault at {:#x}, flags {}, thread {}", message.arg.pagefault.address,
                         message.arg.pagefault.flags, thread);
    case abi::kEventFork:
      return fmt::format("fork, uffd {}", child_uffd);
    case abi::kEventRemap:
      return fmt::format("remap {:#x} to {:#x}, {:#x} bytes", message.arg.remap.from, message.arg.remap.to,
                         message.arg.remap.len);
    case abi::kEventRemove:
      return fmt::format("remove {:#x} to {:#x}", message.arg.remove.start, message.arg.remove.end);
    case abi::kEventUnmap:
      return fmt::format("unmap {:#x} to {:#x}", message.arg.remove.start, message.arg.remove.end);
    default:
      return fmt::format("message {:#x}", message.event);
  }
}

}  // namespace uffdkit::differential
