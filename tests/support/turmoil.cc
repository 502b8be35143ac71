#include "support/turmoil.h"

#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <random>
#include <span>
#include <stdexcept>
#include <system_error>

#include "support/client.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kClientsMax = 256;
constexpr std::size_t kForkSteps = 24;
constexpr std::size_t kBlock = 16;  // pages that move together

std::int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return std::int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

const Features kEvents(abi::kFeatureEventFork | abi::kFeatureEventRemap | abi::kFeatureEventRemove |
                       abi::kFeatureEventUnmap);

}  // namespace

struct Turmoil::Shared {
  std::atomic<std::uint64_t> steps;
  std::atomic<std::uint64_t> removes;
  std::atomic<std::uint64_t> moves;
  std::atomic<std::uint64_t> forks;
  std::atomic<std::int64_t> step_began_ns;  // 0: in none
  std::atomic<std::int64_t> wait_began_ns;  // likewise of one touch or call
  std::atomic<std::uint64_t> longest_ns;
  std::atomic<bool> stop;

  // Does what a manager may be needed for.
  template <class Work>
  auto timed(const Work& work) {
    const std::int64_t began = now_ns();
    wait_began_ns = began;
    const auto result = work();
    wait_began_ns = 0;
    const auto took = static_cast<std::uint64_t>(now_ns() - began);
    std::uint64_t longest = longest_ns;
    while (took > longest && !longest_ns.compare_exchange_weak(longest, took)) {
    }
    return result;
  }
};

// One process's memory, and what each page of it must hold.
class Turmoil::Life {
 public:
  Life(const Image& image, std::byte* memory, std::uint64_t seed, Shared& shared)
      : image_(image), memory_(memory), shared_(shared), contents_(image.pages()), random_(seed) {}

  std::size_t random_page() { return random_() % contents_.size(); }
  std::uint64_t random(std::uint64_t below) { return random_() % below; }

  void check(std::size_t page) const { check_at(page, memory_ + page * 4096); }
  void write(std::size_t page) {
    const auto value = static_cast<unsigned char>(1 + random(255));
    // Part of it, so that the rest must have come.
    check(page);
    std::memset(memory_ + page * 4096, value, 4096);
    contents_[page] = value;
  }
  void give_back(std::size_t first, std::size_t count) {
    if (shared_.timed([&] { return madvise(memory_ + first * 4096, count * 4096, MADV_DONTNEED); }) != 0)
      throw std::system_error(errno, std::generic_category(), "madvise");
    std::fill_n(contents_.begin() + static_cast<std::ptrdiff_t>(first), count,
                std::optional<unsigned char>(0));
  }
  void move_and_back(std::size_t first, std::size_t count) {
    const std::size_t bytes = count * 4096;
    std::byte* const home = memory_ + first * 4096;
    const Mapping other = Mapping::map(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    move(home, other.data(), bytes);
    for (std::size_t i = 0; i < count; i += 2) check_at(first + i, other.data() + i * 4096);
    move(other.data(), home, bytes);
  }

 private:
  void move(std::byte* from, std::byte* to, std::size_t bytes) {
    if (shared_.timed([&] { return mremap(from, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, to); }) != to)
      throw std::system_error(errno, std::generic_category(), "mremap");
  }
  void check_at(std::size_t page, const std::byte* at) const {
    (void)shared_.timed([at] { return *const_cast<const volatile std::byte*>(at); });
    const std::span<const std::byte, 4096> bytes(at, 4096);
    const bool right = contents_[page]
                           ? std::all_of(bytes.begin(), bytes.end(),
                                         [&](std::byte byte) { return byte == std::byte{*contents_[page]}; })
                           : image_.holds(page, bytes);
    if (!right) throw std::runtime_error("page " + std::to_string(page) + " has wrong bytes");
  }

  const Image& image_;
  std::byte* const memory_;
  Shared& shared_;
  std::vector<std::optional<unsigned char>> contents_;  // nothing: the image's
  std::mt19937_64 random_;
};

// Runs `work` in a process of its own; throws if it fails there.
void Turmoil::in_process(Shared& shared, const std::function<void()>& work) {
  const pid_t pid = shared.timed([] { return fork(); });
  if (pid < 0) throw std::system_error(errno, std::generic_category(), "fork");
  if (pid == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    alarm(kHangSeconds);
    try {
      work();
      _exit(0);
    } catch (const std::exception& error) {
      std::fprintf(stderr, "client %d: %s\n", static_cast<int>(getpid()), error.what());
      _exit(1);
    }
  }
  // The child's steps have their own time.
  const bool had_time = alarm(0) > 0;
  int status = 0;
  while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
  }
  if (had_time) alarm(kHangSeconds);
  if (!WIFEXITED(status) || WEXITSTATUS(status) != 0)
    throw std::runtime_error("process " + std::to_string(pid) + " ended with status " +
                             std::to_string(status));
}

std::string Turmoil::lack(Kind kind) {
  if (const std::string lacking = clients_lack(); !lacking.empty()) return lacking;
  if (kind != Kind::forking) return "";
  const Result<Uffd> uffd = Uffd::create({.kernel_faults = true, .required = kEvents});
  return uffd ? "" : "needs a userfaultfd that follows forks: " + uffd.error().text();
}

Turmoil::Turmoil(const Image& image)
    : image_(image),
      memory_(Mapping::map(nullptr, kClientsMax * 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
                           -1)) {}

Turmoil::~Turmoil() {
  for (const auto& client : clients_) client->kill();
}

Turmoil::Shared& Turmoil::shared(std::size_t client) const {
  return *reinterpret_cast<Shared*>(memory_.data() + client * 4096);
}

void Turmoil::start(const Setting& setting) {
  Shared& own = shared(clients_.size());
  clients_.push_back(std::make_unique<Child>([&](const Channel&) {
    try {
      run(image_, setting, own);
      return 0;
    } catch (const std::exception& error) {
      own.step_began_ns = 0;
      std::fprintf(stderr, "client: %s\n", error.what());
      return 1;
    }
  }));
}

void Turmoil::run(const Image& image, const Setting& setting, Shared& shared) {
  std::mt19937_64 random(setting.seed);
  for (std::size_t life = 0; !shared.stop && (setting.lives == 0 || life < setting.lives); ++life) {
    const std::uint64_t seed = random();
    in_process(shared, [&] { live(image, setting, seed, shared); });
  }
}

void Turmoil::live(const Image& image, const Setting& setting, std::uint64_t seed, Shared& shared) {
  const auto begin_step = [&] {
    shared.step_began_ns = now_ns();
    alarm(kHangSeconds);
  };
  const auto step = [&](const std::function<void()>& work) {
    begin_step();
    work();
    shared.step_began_ns = 0;
    ++shared.steps;
  };

  std::optional<RemoteMapping> native;
  std::optional<Mapping> own;
  std::optional<Uffd> uffd;
  std::byte* memory = nullptr;
  if (setting.kind == Kind::native) {
    step([&] {
      (void)shared.timed([&] {
        Result<RemoteMapping> made = attach(setting.socket, setting.image_name, setting.options);
        if (!made) throw std::runtime_error(made.error().text());
        native.emplace(std::move(*made));
        return true;
      });
    });
    memory = native->data();
  } else {
    own.emplace(Mapping::anonymous(image.pages() * 4096));
    memory = own->data();
    const Features events = setting.kind == Kind::forking ? kEvents : Features(abi::kFeatureEventRemove);
    Result<Uffd> made = Uffd::create({.kernel_faults = true, .required = events});
    if (!made) throw std::runtime_error(made.error().text());
    if (auto registered = made->register_range(own->range(), kMissing); !registered)
      throw std::runtime_error(registered.error().text());
    const nlohmann::json handshake = {{{"base_host_virt_addr", own->range().start.value},
                                       {"size", own->size()},
                                       {"offset", 0},
                                       {"page_size", 4096}}};
    const UniqueFd connection = connect_to(setting.socket);
    const int fd = made->fd();
    send_with_fds(connection.get(), handshake.dump(), {&fd, 1});
  }

  Life life(image, memory, seed, shared);
  const bool moves = setting.kind != Kind::firecracker;
  for (std::uint64_t i = 0; i < setting.steps && !shared.stop; ++i) {
    step([&] {
      const std::uint64_t kind = life.random(100);
      const std::size_t page = life.random_page();
      const std::size_t count = std::min<std::size_t>(1 + life.random(12), image.pages() - page);
      if (kind < 66) {
        life.check(page);
      } else if (kind < 80) {
        life.write(page);
      } else if (kind < 92) {
        life.give_back(page, count);
        ++shared.removes;
      } else if (kind < 97 && moves) {
        // Always the same blocks: memory that has come back stays a mapping of its own.
        life.move_and_back(page / kBlock * kBlock, std::min(kBlock, image.pages() - page / kBlock * kBlock));
        ++shared.moves;
      } else if (setting.kind == Kind::forking && kind >= 98) {
        in_process(shared, [&] {
          for (std::size_t j = 0; j < kForkSteps; ++j) {
            begin_step();
            life.check(life.random_page());
            if (j % 8 == 3) life.write(life.random_page());
            if (j % 8 == 5) life.give_back(life.random_page(), 1);
          }
        });
        ++shared.forks;
      }
    });
    if (setting.rest_us > 0) usleep(static_cast<useconds_t>(life.random(setting.rest_us)));
  }
}

Turmoil::Counts Turmoil::counts() const {
  Counts counts;
  for (std::size_t i = 0; i < clients_.size(); ++i) {
    counts.steps += shared(i).steps;
    counts.removes += shared(i).removes;
    counts.moves += shared(i).moves;
    counts.forks += shared(i).forks;
  }
  return counts;
}

std::string Turmoil::hanging(std::chrono::seconds limit) const {
  for (std::size_t i = 0; i < clients_.size(); ++i) {
    const std::int64_t began = shared(i).step_began_ns;
    if (began != 0 && now_ns() - began > std::chrono::nanoseconds(limit).count())
      return "client " + std::to_string(i) + " has waited for more than " + std::to_string(limit.count()) +
             " seconds";
  }
  return "";
}

std::vector<std::uint64_t> Turmoil::longest_us() const {
  std::vector<std::uint64_t> all;
  for (std::size_t i = 0; i < clients_.size(); ++i) {
    std::uint64_t longest = shared(i).longest_ns.exchange(0);
    const std::int64_t began = shared(i).wait_began_ns;
    if (began != 0) longest = std::max(longest, static_cast<std::uint64_t>(now_ns() - began));
    all.push_back(longest / 1000);
  }
  return all;
}

std::size_t Turmoil::stop() {
  for (std::size_t i = 0; i < clients_.size(); ++i) shared(i).stop = true;
  return wait();
}

std::size_t Turmoil::wait() {
  std::size_t failed = 0;
  for (const auto& client : clients_) {
    const std::int64_t give_up = now_ns() + std::int64_t{kHangSeconds} * 1'000'000'000;
    siginfo_t ended{};
    while (waitid(P_PID, static_cast<id_t>(client->pid()), &ended, WEXITED | WNOHANG | WNOWAIT) == 0 &&
           ended.si_pid == 0 && now_ns() < give_up)
      usleep(2000);
    if (ended.si_pid == 0 || client->wait() != 0) ++failed;
  }
  return failed;
}

}  // namespace uffdkit::test
