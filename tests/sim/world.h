// A small simulated machine for one test: a process, its userfaultfd, areas and threads.
#pragma once

#include <fcntl.h>
#include <uffdkit/sim.h>
#include <uffdkit/uffd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <vector>

namespace uffdkit::sim::test {

inline constexpr std::uint64_t kPage = 4096;
inline constexpr std::uint64_t kHuge = 2u << 20;

struct World {
  explicit World(std::uint64_t features = 0, KernelOptions options = {}, bool kernel_faults = true)
      : kernel(std::move(options)),
        process(kernel.spawn()),
        uffd(Uffd::create({.kernel_faults = kernel_faults, .required = Features(features)},
                          process.system_calls())
                 .value()) {}

  // An area of `pages` pages, registered for `modes` if any.
  Address area(Memory memory, std::uint64_t pages, std::uint64_t modes = 0, ObjectPtr object = nullptr) {
    const ByteCount length(pages * page_size(memory).bytes().value);
    const Address start =
        process.map({.memory = memory, .length = length, .object = std::move(object)}).value();
    if (modes != 0) uffd.register_range({start, length}, RegisterModes(modes)).value();
    return start;
  }

  // A new thread that starts the access; the machine runs until nothing moves.
  Thread& access(Access what, Process* who = nullptr) {
    Thread& thread = (who != nullptr ? *who : process).spawn_thread();
    thread.access(what);
    kernel.run();
    return thread;
  }
  Thread& read(Address address) { return access({.address = address}); }
  Thread& write(Address address, std::uint8_t value = 1) {
    return access({.address = address, .write = true, .value = std::byte{value}});
  }

  // All messages that wait.
  std::vector<abi::Msg> messages() {
    std::array<abi::Msg, 32> buffer;
    const std::size_t count = uffd.read(buffer).messages;
    kernel.run();
    return {buffer.begin(), buffer.begin() + static_cast<std::ptrdiff_t>(count)};
  }

  Outcome copy(Address to, std::uint8_t value, std::uint64_t bytes = kPage, Wake wake = Wake::yes,
               Protect protect = Protect::no) {
    const std::vector<std::byte> source(bytes, std::byte{value});
    const Outcome outcome = uffd.copy(to, source, wake, protect);
    kernel.run();
    return outcome;
  }

  Kernel kernel;
  Process& process;
  Uffd uffd;
};

inline AddressRange pages(Address start, std::uint64_t count, std::uint64_t size = kPage) {
  return {start, ByteCount(count * size)};
}
inline Address at(Address start, std::uint64_t page, std::uint64_t offset = 0) {
  return start + ByteCount(page * kPage + offset);
}

// What a finished access gave; -1 for one that did not end with a byte.
inline int byte_of(const Thread& thread) {
  const auto last = thread.last();
  return last && last->kind == Completion::Kind::value ? std::to_integer<int>(last->value) : -1;
}
inline std::int64_t result_of(const Thread& thread) {
  const auto last = thread.last();
  return last && last->kind == Completion::Kind::result ? last->result : INT64_MAX;
}
inline bool asleep(const Thread& thread) {
  return thread.state() == Thread::State::fault_sleep || thread.state() == Thread::State::event_sleep;
}

inline constexpr std::uint64_t kMissingMode = abi::kRegisterMissing;
inline constexpr std::uint64_t kWpMode = abi::kRegisterWp;
inline constexpr std::uint64_t kMinorMode = abi::kRegisterMinor;

}  // namespace uffdkit::sim::test
