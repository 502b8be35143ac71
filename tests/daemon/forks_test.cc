// Clients that fork with EVENT_FORK: each child is a session of its own, which begins with what its parent's
// memory held at the fork, and whose end, whichever, leaves nothing behind.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "daemon/fixture.h"
#include "support/program.h"
#include "support/sigbus.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPages = 512;
const Features kEvents(abi::kFeatureEventFork | abi::kFeatureEventRemap | abi::kFeatureEventRemove |
                       abi::kFeatureEventUnmap);

// Why no client can follow forks here; empty if one can.
std::string forks_lack() {
  const Result<Uffd> uffd = Uffd::create({.kernel_faults = true, .required = kEvents});
  return uffd ? "" : "needs a userfaultfd that follows forks: " + uffd.error().text();
}

// Hands the memory over with a userfaultfd that tells of all events, in place of the memory's own.
void hand_over_with_events(const ClientMemory& memory, const std::string& socket) {
  const AddressRange range{Address(reinterpret_cast<std::uintptr_t>(memory.bytes(0).data())),
                           ByteCount(memory.pages() * 4096)};
  const auto unregistered = memory.uffd().unregister_range(range);
  if (!unregistered) throw std::runtime_error(unregistered.error().text());
  const Result<Uffd> uffd = Uffd::create({.kernel_faults = true, .required = kEvents});
  if (!uffd) throw std::runtime_error(uffd.error().text());
  const auto registered = uffd->register_range(range, kMissing);
  if (!registered) throw std::runtime_error(registered.error().text());
  const UniqueFd connection = connect_to(socket);
  const int fd = uffd->fd();
  send_with_fds(connection.get(), memory.handshake().dump(), {&fd, 1});
}

// A client's memory, and what each of its pages must hold. Copied by fork, as the memory is.
class Known {
 public:
  explicit Known(const ClientMemory& memory) : memory_(memory), contents_(memory.pages()) {}

  void write(std::size_t page, unsigned char value) {
    std::memset(memory_.bytes(page).data(), value, 4096);
    contents_[page] = value;
  }
  void give_back(std::size_t first, std::size_t count) {
    memory_.give_back(first, count, MADV_DONTNEED);
    for (std::size_t page = first; page < first + count; ++page) contents_[page] = 0;
  }
  void check(std::size_t page) const {
    if (!contents_[page]) return memory_.check(page);
    const auto bytes = memory_.bytes(page);
    require(std::all_of(bytes.begin(), bytes.end(),
                        [&](std::byte byte) { return byte == std::byte{*contents_[page]}; }),
            "page " + std::to_string(page) + " does not hold what was put there");
  }
  // From the end, so that pages which an earlier process wanted come late.
  void check_all() const {
    for (std::size_t page = contents_.size(); page-- > 0;) check(page);
  }

 private:
  const ClientMemory& memory_;
  std::vector<std::optional<unsigned char>> contents_;  // nothing: the image's
};

void move_pages(std::byte* from, std::byte* to, std::size_t count) {
  if (mremap(from, count * 4096, count * 4096, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to)
    throw std::system_error(errno, std::generic_category(), "mremap");
}

void move_and_move_back(const ClientMemory& memory, std::size_t first, std::size_t count) {
  std::byte* const home = memory.bytes(first).data();
  const Mapping other = Mapping::map(nullptr, count * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  move_pages(home, other.data(), count);
  move_pages(other.data(), home, count);
}

// Forks; the child ends by itself or is killed when this process ends.
void fork_and_wait(const std::function<void(const Channel&)>& work) {
  Child child = program(work);
  require(child.wait() == 0, "a child failed");
}

class Forks : public ManagerTest {
 protected:
  void SetUp() override {
    if (const std::string lacking = forks_lack(); !lacking.empty()) GTEST_SKIP() << lacking;
  }
  Child forking_client(const std::function<void(const ClientMemory&, const Channel&)>& work) const {
    return program([&](const Channel& channel) {
      const ClientMemory memory(image_, whole(image_));
      hand_over_with_events(memory, socket_);
      work(memory, channel);
    });
  }
  // What the manager has before any client; the first one may make it start what stays.
  Footprint footprint_before() const {
    Child first = forking_client([](const ClientMemory& memory, const Channel&) {
      fork_and_wait([&](const Channel&) { memory.check_all(2, 1); });
    });
    EXPECT_EQ(first.wait(), 0) << manager_.log();
    EXPECT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
    return manager_.footprint();
  }
  bool nothing_is_left(const Footprint& before) const {
    return eventually([&] { return manager_.sessions() == 0 && manager_.footprint().within(before); });
  }

  const Image image_{directory_ / "image", kPages};
  const std::string socket_ = directory_ / "fc.sock";
  ManagerProcess manager_{directory_, firecracker(socket_, image_)};
};

TEST_F(Forks, ChildrenAndGrandchildrenReadWhatTheMemoryHeldAtTheirFork) {
  Child process = forking_client([](const ClientMemory& memory, const Channel&) {
    Known known(memory);
    for (std::size_t page = 0; page < 40; ++page) known.check(page);
    known.write(20, 1);
    known.write(100, 2);
    known.give_back(30, 21);
    known.give_back(201, 55);
    known.check(203);
    known.give_back(300, 1);
    known.write(300, 3);
    Child child = program([&](const Channel& channel) {
      // A copy, like the memory: what the parent does from here on must not be seen.
      known.write(21, 4);
      known.give_back(97, 5);
      Child grandchild = program([&](const Channel& below) {
        below.receive();
        known.check_all();
      });
      known.give_back(0, 19);
      known.write(400, 5);
      known.write(210, 6);
      move_and_move_back(memory, 128, 77);
      channel.send(1);
      channel.receive();
      grandchild.channel().send(1);
      known.check_all();
      require(grandchild.wait() == 0, "the grandchild failed");
    });
    child.channel().receive();
    known.give_back(0, 128);
    known.give_back(129, 17);
    known.write(401, 7);
    move_and_move_back(memory, 0, 511);
    child.channel().send(1);
    known.check_all();
    require(child.wait() == 0, "the child failed");
  });
  EXPECT_EQ(process.wait(), 0) << manager_.log();
  EXPECT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
  EXPECT_EQ(manager_.count("sessions_ended"), 3u);
}

TEST_F(Forks, ChildrenForkedWhileTheMemoryIsMovedReadTheImageWhereverItIs) {
  Child process = forking_client([this](const ClientMemory& memory, const Channel&) {
    constexpr std::size_t kFirst = 128;
    constexpr std::size_t kCount = 64;
    std::byte* const home = memory.bytes(kFirst).data();
    const Mapping other = Mapping::map(nullptr, kCount * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    // Nothing else may be mapped where the memory has just been: threads and heaps are there before it moves.
    std::atomic<bool> started = false;
    std::atomic<bool> done = false;
    const auto move_it = [&] {
      while (!started) std::this_thread::yield();
      while (!done) {
        move_pages(home, other.data(), kCount);
        move_pages(other.data(), home, kCount);
      }
    };
    const auto check_some = [&](std::size_t seed) {
      unsigned char vector;
      const bool is_home = mincore(home, 4096, &vector) == 0;
      for (std::size_t i = 0; i < 20; ++i) {
        const std::size_t page = (seed + i * 3) % kCount;
        const std::byte* const bytes = (is_home ? home : other.data()) + page * 4096;
        require(image_.holds(kFirst + page, std::span<const std::byte, 4096>(bytes, 4096)),
                "moved page " + std::to_string(page) + " is wrong");
        memory.check((seed * 17 + i) % kFirst);
        memory.check(kFirst + kCount + (seed * 31 + i) % (kPages - kFirst - kCount));
      }
    };
    const auto fork_on = [&] {
      for (std::size_t times = 0; times < 30; ++times) {
        fork_and_wait([&](const Channel&) { check_some(times); });
        started = true;
      }
    };
    at_once({move_it, [&] {
               try {
                 fork_on();
               } catch (...) {
                 started = done = true;
                 throw;
               }
               done = true;
             }});
    memory.check_all(1, 3);
  });
  EXPECT_EQ(process.wait(), 0) << manager_.log();
  EXPECT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
}

TEST_F(Forks, AChildOutlivesItsParentAndIsServedOn) {
  Child process = forking_client([](const ClientMemory& memory, const Channel& channel) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);
      try {
        channel.receive();
        memory.check_all(2, 5);
        channel.send(1);
      } catch (const std::exception&) {
        channel.send(0);
      }
      _exit(0);
    }
    require(child > 0, "fork failed");
  });
  ASSERT_EQ(process.wait(), 0) << manager_.log();
  ASSERT_TRUE(eventually([&] { return manager_.sessions() == 1; })) << manager_.log();
  process.channel().send(1);
  EXPECT_EQ(process.channel().receive(), 1u) << manager_.log();
  EXPECT_TRUE(eventually([&] { return manager_.sessions() == 0; })) << manager_.log();
}

// Its userfaultfd has no other holder: closed, it would leave zeros.
TEST_F(Forks, AChildWhoseImageIsGoneWhenAWorkerTakesOverGetsSigbusAndNoZeros) {
  Child process = forking_client([](const ClientMemory& memory, const Channel& channel) {
    memory.check(0);
    fork_and_wait([&](const Channel&) {
      memory.check(0);
      channel.send(1);
      channel.receive();
      memory.check(0);
      require(raises_sigbus(memory.bytes(100).data()), "a page that cannot be had raises no SIGBUS");
    });
  });
  process.channel().receive();
  image_.cut(0);
  ::kill(manager_.worker_pid(), SIGKILL);
  ASSERT_TRUE(eventually([&] { return manager_.count("takeovers") == 1; }));
  EXPECT_EQ(manager_.sessions(), 2u) << manager_.log();
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

// The kernel copies no markers of shared memory.
TEST_F(Forks, APageThatRaisesSigbusDoesSoInAChildToo) {
  const Image lost(directory_ / "lost", kPages);
  const std::string socket = directory_ / "lost.sock";
  const TempDir directory;
  ManagerProcess manager(directory, {"--firecracker", socket + "=" + lost.path(), "--fault-around", "1",
                                     "--read-retries", "0", "--store-fault", "error,from=64K,to=128K"});
  for (const auto shape : {ClientShape::Memory::anonymous, ClientShape::Memory::shared}) {
    Child process = program([&](const Channel& channel) {
      const ClientMemory memory(lost, {.regions = {{.pages = kPages}}, .memory = shape});
      hand_over_with_events(memory, socket);
      require(raises_sigbus(memory.bytes(17).data()), "page 17 can be read");
      // Nothing of it was asked for when the child's memory is completed.
      fork_and_wait([&](const Channel&) {
        require(raises_sigbus(memory.bytes(16).data()), "page 16 can be read");
        channel.send(1);
        channel.receive();
        require(raises_sigbus(memory.bytes(17).data()), "page 17 can be read in a child");
        memory.check(0);
      });
    });
    process.channel().receive();
    // A drain is given up over a page that cannot be read; an end is not.
    if (shape == ClientShape::Memory::shared) {
      EXPECT_EQ(manager.stop(), 0) << manager.log();
    }
    process.channel().send(1);
    EXPECT_EQ(process.wait(), 0) << manager.log();
  }
}

TEST_F(Forks, ChildrenThatExitAreKilledOrExecuteAtAnyStageLeaveNothingBehind) {
  const Footprint before = footprint_before();
  const std::vector<std::function<void()>> ends = {[] { _exit(0); }, [] { raise(SIGKILL); },
                                                   [] { execlp("true", "true", nullptr); }};
  Child process = forking_client([&](const ClientMemory& memory, const Channel& channel) {
    memory.check(7);
    for (const std::function<void()>& end : ends) {
      // Before it touches anything; after a page; while it touches pages and gives them back; after a child.
      const std::vector<std::function<void()>> stages = {
          [] {},
          [&] { memory.check(100); },
          [&] {
            std::thread([&] {
              for (std::size_t page = 0;; page = (page + 1) % kPages) {
                (void)*static_cast<volatile std::byte*>(memory.bytes(page).data());
                if (page % 4 == 0) memory.give_back(page, 1, MADV_DONTNEED);
              }
            }).detach();
            std::this_thread::sleep_for(std::chrono::milliseconds(3));
          },
          [&] { fork_and_wait([&](const Channel&) { memory.check(50); }); },
      };
      for (const std::function<void()>& stage : stages) {
        Child child([&](const Channel&) {
          alarm(60);
          stage();
          end();
          return 1;
        });
        const int code = child.wait();
        require(code == 0 || code == -SIGKILL, "a child failed");
      }
    }
    channel.send(1);
    channel.receive();
    memory.check_all(2, 9);
  });
  ASSERT_EQ(process.channel().receive(), 1u) << manager_.log();
  // Its children are gone while it is still there.
  EXPECT_TRUE(eventually([&] { return manager_.sessions() == 1; })) << manager_.log();
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager_.log();
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
}

TEST_F(Forks, ATreeThatIsKilledWhileItForksLeavesNothingBehind) {
  const Footprint before = footprint_before();
  for (int delay_us = 0; delay_us < 4000; delay_us += 500) {
    Child process = forking_client([](const ClientMemory& memory, const Channel& channel) {
      channel.send(1);
      for (std::size_t times = 0;; ++times) {
        Child child = program([&](const Channel&) {
          memory.check(times % kPages);
          fork_and_wait([&](const Channel&) { memory.check((times + 64) % kPages); });
        });
        // The next fork kills it, wherever it is.
        std::this_thread::sleep_for(std::chrono::microseconds(times * 100 % 700));
      }
    });
    process.channel().receive();
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
    process.kill();
  }
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
}

TEST_F(Forks, ChildrenThatNothingWasReadForWhenTheirParentWasKilledLeaveNothingBehind) {
  const Footprint before = footprint_before();
  for (int times = 0; times < 5; ++times) {
    Child process = forking_client([](const ClientMemory& memory, const Channel& channel) {
      memory.check(1);
      channel.send(1);
      channel.receive();
      fork_and_wait([&](const Channel&) { memory.check(2); });
    });
    process.channel().receive();
    // The fork waits for the manager, which reads it, if ever, when nobody is there any more.
    manager_.signal(SIGSTOP);
    process.channel().send(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    process.kill();
    manager_.signal(SIGCONT);
  }
  EXPECT_TRUE(nothing_is_left(before)) << before << " became " << manager_.footprint();
}

TEST_F(Forks, StatusShowsTheTree) {
  Child process = forking_client([](const ClientMemory&, const Channel& channel) {
    const auto hold = [&](const Channel& own) { own.receive(); };
    Child first = program([&](const Channel& own) {
      Child grandchild = program(hold);
      own.send(1);
      own.receive();
      grandchild.channel().send(1);
      require(grandchild.wait() == 0, "the grandchild failed");
    });
    first.channel().receive();
    Child second = program(hold);
    channel.send(1);
    channel.receive();
    first.channel().send(1);
    second.channel().send(1);
    require(first.wait() == 0 && second.wait() == 0, "a child failed");
  });
  process.channel().receive();
  ASSERT_TRUE(eventually([&] { return manager_.sessions() == 4; })) << manager_.log();

  std::map<std::uint64_t, std::vector<std::uint64_t>> children;
  const nlohmann::json status = manager_.status();
  for (const auto& session : status.at("sessions"))
    children[session.value("parent", std::uint64_t{0})].push_back(session.at("id"));
  ASSERT_EQ(children[0].size(), 1u);
  const std::uint64_t root = children[0].front();
  ASSERT_EQ(children[root].size(), 2u);
  const std::uint64_t first = std::ranges::min(children[root]);
  const std::uint64_t second = std::ranges::max(children[root]);
  ASSERT_EQ(children[first].size(), 1u);
  const std::uint64_t grandchild = children[first].front();

  const Finished run = run_program("uffdkit", {"status", "--control", manager_.control()});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  std::size_t from = 0;
  for (const std::string& line :
       {"\n" + std::to_string(root) + " ", "\n  " + std::to_string(first) + " ",
        "\n    " + std::to_string(grandchild) + " ", "\n  " + std::to_string(second) + " "}) {
    const std::size_t at = run.out.find(line, from);
    ASSERT_NE(at, std::string::npos) << line << " is not in its place:\n" << run.out;
    from = at + 1;
  }
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

}  // namespace
}  // namespace uffdkit::test
