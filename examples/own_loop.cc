// One's own handler loop, with the kernel layer only: a thread serves the pages of a mapping while another
// touches them and gives some back. Shows what to do with each answer of the kernel.
#include <sys/mman.h>
#include <uffdkit/uffd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <set>
#include <thread>

using namespace uffdkit;

namespace {

// The pages wanted and not served yet, and those that read as zero since they were given back.
struct State {
  std::set<Address> wanted;
  std::set<Address> removed;
};

// True if the page needs no more of us.
bool serve(const Uffd& uffd, Address page, const State& state) {
  std::array<std::byte, 4096> bytes{};
  if (!state.removed.contains(page)) bytes.fill(static_cast<std::byte>(page.value >> 12));
  const Outcome outcome = uffd.copy(page, bytes);
  switch (outcome.stop) {
    case Stop::complete:  // its readers have been woken
      return true;
    case Stop::present:  // EEXIST: it was served before. Nobody was woken by that: do it
      return uffd.wake({page, ByteCount(4096)}).has_value();
    case Stop::changing:   // EAGAIN: an event is to be read first, or its thread has to run. Nobody tells
                           // when:
      return false;        // try again a little later
    case Stop::not_ready:  // ENOENT: unmapped meanwhile. Its readers shall see that
      return uffd.wake({page, ByteCount(4096)}).has_value();
    default:
      std::fprintf(stderr, "copy: %s\n", to_string(outcome.stop).c_str());
      return true;
  }
}

void serve_until(const Uffd& uffd, const std::atomic<bool>& done) {
  State state;
  std::array<abi::Msg, 16> messages;
  while (!done) {
    // Not for ever: faults that were put off come by no message.
    if (!uffd.wait_readable(state.wanted.empty() ? 100 : 1)) return;
    // All that is there, before any page is served: the kernel gives faults before the events of ranges that
    // were given back earlier, and old bytes must not return there.
    while (const std::size_t count = uffd.read(messages).messages) {
      for (const abi::Msg& raw : std::span(messages).first(count)) {
        const Message message = decode(raw);
        if (const auto* fault = std::get_if<Fault>(&message)) state.wanted.insert(fault->address);
        if (const auto* event = std::get_if<RemoveEvent>(&message))
          for (Address page = event->range.start; page < event->range.end(); page = page + ByteCount(4096))
            state.removed.insert(page);
      }
    }
    std::erase_if(state.wanted, [&](Address page) { return serve(uffd, page, state); });
  }
}

}  // namespace

int main() {
  auto uffd =
      Uffd::create({.kernel_faults = false, .required = Features(abi::kFeatureEventRemove), .wanted = {}});
  if (!uffd) return std::fprintf(stderr, "%s\n", uffd.error().text().c_str()), 1;
  constexpr std::size_t kPages = 64;
  void* mapped = ::mmap(nullptr, kPages * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return std::perror("mmap"), 1;
  const Address start(reinterpret_cast<std::uintptr_t>(mapped));
  if (auto registered = uffd->register_range({start, ByteCount(kPages * 4096)}, kMissing); !registered)
    return std::fprintf(stderr, "%s\n", registered.error().text().c_str()), 1;

  std::atomic<bool> done = false;
  std::thread handler([&] { serve_until(*uffd, done); });
  const auto* memory = static_cast<const volatile unsigned char*>(mapped);
  int wrong = 0;
  for (std::size_t page = 0; page < kPages; ++page)
    wrong += memory[page * 4096] != static_cast<unsigned char>((start.value >> 12) + page);
  ::madvise(mapped, std::size_t{8} * 4096, MADV_DONTNEED);
  for (std::size_t page = 0; page < 8; ++page) wrong += memory[page * 4096] != 0;
  done = true;
  handler.join();
  ::munmap(mapped, kPages * 4096);
  std::printf("%zu pages served and 8 given back, %d wrong\n", kPages, wrong);
  return wrong == 0 ? 0 : 1;
}
