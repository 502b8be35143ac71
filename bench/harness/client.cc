#include "harness/client.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <uffdkit/uffd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cerrno>
#include <cstdio>
#include <exception>
#include <functional>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "harness/image.h"
#include "harness/placement.h"

namespace uffdkit::bench {

// Seen by both processes. A touch takes less than four seconds.
struct Client::Shared {
  std::uint64_t* pages;
  std::uint32_t* ns;
};

namespace {

enum Command : std::uint64_t { kTouch, kTouchAll, kSwitches, kResident };

template <class T>
T* shared_array(std::size_t count) {
  void* memory =
      ::mmap(nullptr, count * sizeof(T), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  return static_cast<T*>(memory);
}

// The memory, in the client's process.
class Served {
 public:
  Served(const Server& server, std::uint64_t bytes) : bytes_(bytes) {
    void* memory =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
    memory_ = static_cast<std::byte*>(memory);
    const AddressRange range{Address(reinterpret_cast<std::uintptr_t>(memory)), ByteCount(bytes)};
    Result<Uffd> uffd = Uffd::create({.kernel_faults = false,
                                      .required = Features(abi::kFeatureEventRemove),
                                      .non_blocking = server.non_blocking()});
    if (!uffd) throw std::runtime_error(uffd.error().text());
    if (const auto registered = uffd->register_range(range, kMissing); !registered)
      throw std::runtime_error(registered.error().text());
    connection_ = server.hand_over(uffd->fd(), range);
    uffd_.push_back(std::move(*uffd));
  }

  void touch(std::uint64_t page) const {
    const volatile auto* word = reinterpret_cast<const std::uint64_t*>(memory_ + page * kPageBytes);
    if (*word != stamp(page)) throw std::runtime_error(fmt::format("page {} is not the image's", page));
  }

  std::uint64_t resident_pages() const {
    std::vector<unsigned char> flags(bytes_ / kPageBytes);
    if (::mincore(memory_, bytes_, flags.data()) != 0)
      throw std::system_error(errno, std::generic_category(), "mincore");
    return static_cast<std::uint64_t>(std::count(flags.begin(), flags.end(), 1));
  }

 private:
  std::uint64_t bytes_;
  std::byte* memory_;
  std::vector<Uffd> uffd_;  // one; kept open as Firecracker does
  UniqueFd connection_;
};

// Nanoseconds that all of it took. `touch` is given an index of `pages`. One thread is the caller's.
std::uint64_t touch_by_threads(std::size_t pages, unsigned threads,
                               const std::function<void(std::size_t)>& touch) {
  const std::int64_t begin_alone = monotonic_ns();
  if (threads == 1) {
    for (std::size_t page = 0; page < pages; ++page) touch(page);
    return static_cast<std::uint64_t>(monotonic_ns() - begin_alone);
  }
  std::barrier start(static_cast<std::ptrdiff_t>(threads) + 1);
  std::vector<std::jthread> touchers;
  for (unsigned i = 0; i < threads; ++i) {
    touchers.emplace_back([&, first = pages * i / threads, end = pages * (i + 1) / threads] {
      start.arrive_and_wait();
      for (std::size_t page = first; page < end; ++page) touch(page);
    });
  }
  // Before they may go: on one CPU they may be done by the time that this thread has it again.
  const std::int64_t begin = monotonic_ns();
  start.arrive_and_wait();
  touchers.clear();
  return static_cast<std::uint64_t>(monotonic_ns() - begin);
}

void raise_descriptor_limit() {
  rlimit limit;
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  (void)::setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

Client::Client(const Server& server, int cpu, std::uint64_t bytes, std::size_t touches_max, unsigned sessions)
    : touches_max_(touches_max),
      shared_(
          new Shared{shared_array<std::uint64_t>(touches_max), shared_array<std::uint32_t>(touches_max)}) {
  const auto run = [&](const test::Channel& parent) -> int {
    raise_descriptor_limit();
    pin(0, cpu);
    const std::int64_t begin = monotonic_ns();
    std::vector<Served> memories;
    memories.emplace_back(server, bytes);
    memories.front().touch(0);
    parent.send(static_cast<std::uint64_t>(monotonic_ns() - begin));
    while (memories.size() < sessions) {
      memories.emplace_back(server, bytes);
      memories.back().touch(0);
    }
    parent.send(0);
    const Served& served = memories.front();
    const auto touch = [&](std::size_t i) {
      const std::int64_t start = monotonic_ns();
      served.touch(shared_->pages[i]);
      shared_->ns[i] = static_cast<std::uint32_t>(monotonic_ns() - start);
    };
    const auto touch_untimed = [&](std::size_t i) { served.touch(shared_->pages[i]); };
    for (;;) {
      const std::uint64_t command = parent.receive();
      const auto threads = static_cast<unsigned>(parent.receive());
      const std::size_t pages = parent.receive();
      switch (command) {
        case kTouch:
          parent.send(touch_by_threads(pages, threads, touch));
          break;
        case kTouchAll:
          parent.send(touch_by_threads(pages, threads, touch_untimed));
          break;
        case kSwitches: {
          rusage use;
          ::getrusage(RUSAGE_SELF, &use);
          parent.send(static_cast<std::uint64_t>(use.ru_nvcsw + use.ru_nivcsw));
          break;
        }
        default:
          parent.send(served.resident_pages());
      }
    }
  };
  child_ = std::make_unique<test::Child>([&](const test::Channel& parent) {
    try {
      return run(parent);
    } catch (const std::exception& error) {
      fmt::print(stderr, "client: {}\n", error.what());
      throw;
    }
  });
  attach_ns_ = child_->channel().receive();
  (void)child_->channel().receive();
}

Client::~Client() {
  child_->kill();
  ::munmap(shared_->pages, touches_max_ * sizeof(std::uint64_t));
  ::munmap(shared_->ns, touches_max_ * sizeof(std::uint32_t));
  delete shared_;
}

void Client::put(std::span<const std::uint64_t> pages) {
  if (pages.size() > touches_max_) throw std::logic_error("more touches than there is room for");
  std::copy(pages.begin(), pages.end(), shared_->pages);
}

std::uint64_t Client::ask(std::uint64_t command, std::size_t pages, unsigned threads) {
  child_->channel().send(command);
  child_->channel().send(threads);
  child_->channel().send(pages);
  return child_->channel().receive();
}

std::vector<std::uint32_t> Client::touch(std::span<const std::uint64_t> pages, unsigned threads) {
  put(pages);
  took_ns_ = ask(kTouch, pages.size(), threads);
  return {shared_->ns, shared_->ns + pages.size()};
}

std::uint64_t Client::touch_all(std::span<const std::uint64_t> pages, unsigned threads) {
  put(pages);
  return ask(kTouchAll, pages.size(), threads);
}

std::uint64_t Client::context_switches() {
  return ask(kSwitches, 0, 0);
}

std::uint64_t Client::resident_pages() {
  return ask(kResident, 0, 0);
}

}  // namespace uffdkit::bench
