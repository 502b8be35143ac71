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

enum Command : std::uint64_t { kTouch, kTouchAll, kResident };

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

std::uint64_t touch_by_threads(const Served& served, std::span<const std::uint64_t> pages, unsigned threads) {
  std::barrier start(static_cast<std::ptrdiff_t>(threads) + 1);
  std::vector<std::jthread> touchers;
  for (unsigned i = 0; i < threads; ++i) {
    const std::size_t first = pages.size() * i / threads;
    const auto part = pages.subspan(first, pages.size() * (i + 1) / threads - first);
    touchers.emplace_back([&, part] {
      start.arrive_and_wait();
      for (const std::uint64_t page : part) served.touch(page);
    });
  }
  start.arrive_and_wait();
  const std::int64_t begin = monotonic_ns();
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
    for (;;) {
      const std::uint64_t command = parent.receive();
      const std::uint64_t argument = parent.receive();
      switch (command) {
        case kTouch:
          for (std::uint64_t i = 0; i < argument; ++i) {
            const std::uint64_t page = shared_->pages[i];
            const std::int64_t start = monotonic_ns();
            served.touch(page);
            shared_->ns[i] = static_cast<std::uint32_t>(monotonic_ns() - start);
          }
          parent.send(0);
          break;
        case kTouchAll:
          parent.send(
              touch_by_threads(served, {shared_->pages, parent.receive()}, static_cast<unsigned>(argument)));
          break;
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

std::vector<std::uint32_t> Client::touch(std::span<const std::uint64_t> pages) {
  put(pages);
  child_->channel().send(kTouch);
  child_->channel().send(pages.size());
  (void)child_->channel().receive();
  return {shared_->ns, shared_->ns + pages.size()};
}

std::uint64_t Client::touch_all(std::span<const std::uint64_t> pages, unsigned threads) {
  put(pages);
  child_->channel().send(kTouchAll);
  child_->channel().send(threads);
  child_->channel().send(pages.size());
  return child_->channel().receive();
}

std::uint64_t Client::resident_pages() {
  child_->channel().send(kResident);
  child_->channel().send(0);
  return child_->channel().receive();
}

}  // namespace uffdkit::bench
