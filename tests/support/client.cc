#include "support/client.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <exception>
#include <mutex>
#include <random>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "wire/unix_socket.h"

namespace uffdkit::test {
namespace {

constexpr unsigned kLifetimeSeconds = 60;
constexpr std::chrono::seconds kPatience{30};

// Ballooning clients hear of what they give back, as Firecracker asks for.
UffdNeeds needs() {
  return {.kernel_faults = true, .required = Features(abi::kFeatureEventRemove)};
}

Uffd create_uffd() {
  UffdNeeds needed = needs();
  // A client that has become a user without rights touches its memory itself.
  if (geteuid() != 0) needed.kernel_faults = false;
  Result<Uffd> uffd = Uffd::create(needed);
  if (!uffd) throw std::runtime_error(uffd.error().text());
  return std::move(*uffd);
}

Mapping map(ClientShape::Memory memory, std::size_t bytes) {
  constexpr int kAccess = PROT_READ | PROT_WRITE;
  switch (memory) {
    case ClientShape::Memory::anonymous:
      return Mapping::anonymous(bytes);
    case ClientShape::Memory::shared:
      return Mapping::map(nullptr, bytes, kAccess, MAP_SHARED | MAP_ANONYMOUS, -1);
    case ClientShape::Memory::huge_pages:
      return Mapping::map(nullptr, bytes, kAccess,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (21 << MAP_HUGE_SHIFT), -1);
  }
  throw std::logic_error("no such memory");
}

}  // namespace

ClientShape whole(const Image& image) {
  return {.regions = {{.pages = image.pages()}}};
}

std::string clients_lack() {
  const Result<Uffd> uffd = Uffd::create(needs());
  return uffd ? "" : "needs a userfaultfd for kernel faults: " + uffd.error().text();
}

std::string poisoning_lacks() {
  const Result<KernelFeatures> kernel = probe_features();
  return !kernel || kernel->available.has(Features(abi::kFeaturePoison))
             ? ""
             : "needs a kernel that can poison pages (6.6)";
}

ClientMemory::ClientMemory(const Image& image, ClientShape shape)
    : image_(image), shape_(std::move(shape)), uffd_(create_uffd()) {
  for (const ClientShape::Region& region : shape_.regions) {
    const Mapping& mapping = mappings_.emplace_back(map(shape_.memory, region.pages * 4096));
    const auto registered = uffd_.register_range(mapping.range(), kMissing);
    if (!registered) throw std::runtime_error(registered.error().text());
    for (std::size_t page = 0; page < region.pages; ++page)
      pages_.push_back({mapping.data() + page * 4096, region.image_page + page});
  }
}

nlohmann::json ClientMemory::handshake() const {
  const int page_bytes = shape_.memory == ClientShape::Memory::huge_pages ? 2 << 20 : 4096;
  nlohmann::json regions = nlohmann::json::array();
  for (std::size_t i = 0; i < shape_.regions.size(); ++i)
    regions.push_back({{"base_host_virt_addr", mappings_[i].range().start.value},
                       {"size", mappings_[i].size()},
                       {"offset", shape_.regions[i].image_page * 4096},
                       {"page_size", page_bytes},
                       {"page_size_kib", page_bytes}});
  return regions;
}

UniqueFd ClientMemory::hand_over(const std::string& socket) const {
  UniqueFd connection = connect_to(socket);
  const int fd = uffd_.fd();
  send_with_fds(connection.get(), handshake().dump(), {&fd, 1});
  return connection;
}

void ClientMemory::give_up_descriptor() const {
  // Its number stays taken, for whoever closes it later.
  const UniqueFd nothing(::open("/dev/null", O_RDONLY | O_CLOEXEC));
  require(::dup3(nothing.get(), uffd_.fd(), O_CLOEXEC) >= 0, "dup3");
}

void ClientMemory::check(std::size_t page) const {
  require(image_.holds(image_page(page), bytes(page)), "page " + std::to_string(page) + " is wrong");
}

void ClientMemory::check_all(unsigned threads, std::uint64_t seed) const {
  std::vector<std::function<void()>> works;
  for (unsigned thread = 0; thread < threads; ++thread)
    works.emplace_back([this, seed, thread] {
      std::vector<std::size_t> order(pages());
      for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
      std::shuffle(order.begin(), order.end(), std::mt19937_64(seed + thread));
      for (const std::size_t page : order) check(page);
    });
  at_once(works);
}

void ClientMemory::check_zero(std::size_t page) const {
  const auto all = bytes(page);
  require(std::all_of(all.begin(), all.end(), [](std::byte byte) { return byte == std::byte{0}; }),
          "page " + std::to_string(page) + " is not zero");
}

void ClientMemory::give_back(std::size_t first, std::size_t count, int advice) const {
  if (madvise(pages_[first].bytes, count * 4096, advice) != 0)
    throw std::system_error(errno, std::generic_category(), "madvise");
}

Child program(const std::function<void(const Channel&)>& work) {
  return Child([&](const Channel& channel) {
    alarm(kLifetimeSeconds);
    try {
      work(channel);
      return 0;
    } catch (const std::exception& error) {
      std::fprintf(stderr, "client: %s\n", error.what());
      return 1;
    }
  });
}

ClientWork after_one_page(ClientWork work) {
  return [work = std::move(work)](const ClientMemory& memory, const Channel& channel) {
    memory.check(0);
    channel.send(1);
    channel.receive();
    work(memory, channel);
  };
}

void check_all_pages(const ClientMemory& memory, const Channel&) {
  memory.check_all(2, 1);
}

Child client(const Image& image, const ClientShape& shape, const std::string& socket,
             const ClientWork& work) {
  return program([&](const Channel& channel) {
    const ClientMemory memory(image, shape);
    const UniqueFd connection = memory.hand_over(socket);
    work(memory, channel);
  });
}

void at_once(const std::vector<std::function<void()>>& works) {
  std::mutex mutex;
  std::exception_ptr thrown;
  {
    std::vector<std::jthread> threads;
    for (const std::function<void()>& work : works)
      threads.emplace_back([&] {
        try {
          work();
        } catch (...) {
          const std::lock_guard lock(mutex);
          thrown = std::current_exception();
        }
      });
  }
  if (thrown) std::rethrow_exception(thrown);
}

void require(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error(what);
}

UniqueFd connect_to(const std::string& socket) {
  Result<UniqueFd> connection = connect_unix(socket, kPatience);
  if (!connection) throw std::runtime_error(connection.error().text());
  return std::move(*connection);
}

void send_with_fds(int socket, std::string_view bytes, std::span<const int> fds) {
  if (const auto sent = send_all(socket, std::as_bytes(std::span(bytes)), fds, kPatience); !sent)
    throw std::runtime_error(sent.error().text());
}

}  // namespace uffdkit::test
