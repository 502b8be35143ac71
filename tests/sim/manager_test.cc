// The manager, unchanged, serves simulated clients: the userfaultfds are the model's (real_descriptors.h),
// all else is real, sockets, threads and the processes that connect. Threads of the machine are moved by the
// test's own thread, those of the manager by the kernel's scheduler: so a seed says what clients do, but not
// in which order it meets what the manager does. For runs that a seed repeats see manager_seeds_test.cc.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <span>
#include <thread>

#include "manager/manager.h"
#include "simulate/expected.h"
#include "simulate/real_descriptors.h"
#include "support/child.h"
#include "support/client.h"
#include "support/forwarding_calls.h"
#include "support/native_connection.h"
#include "support/temp_dir.h"

namespace uffdkit::sim::test {
namespace {

using simulate::ExpectedMemory;
using simulate::ExpectedPage;
using simulate::kPage;
using simulate::RealDescriptors;

constexpr std::uint64_t kImagePages = 600;
constexpr std::uint64_t kRegionPages = 200;
constexpr int kClients = 5;
constexpr int kThreads = 3;
constexpr std::chrono::seconds kHang{60};

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

void write_image(const std::string& path) {
  std::ofstream file(path, std::ios::binary);
  for (std::uint64_t at = 0; at < kImagePages * kPage; at += 512)
    file << std::string(512, static_cast<char>(simulate::image_byte(at / kPage, at % kPage)));
}

// A bug between the manager and the model, to see that it is found.
enum class Bug : std::uint8_t { none, wrong_byte, lost_faults };

class BuggyCalls final : public uffdkit::test::ForwardingCalls {
 public:
  BuggyCalls(SystemCalls& calls, Bug bug) : ForwardingCalls(calls), bug_(bug) {}
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override {
    if (bug_ == Bug::wrong_byte && request == abi::kIoctlCopy) {
      const auto& args = *reinterpret_cast<const abi::CopyArgs*>(argument);
      // The byte in the middle of a page.
      *reinterpret_cast<std::byte*>(args.src + kPage / 2) ^= std::byte{1};
    }
    return calls_.ioctl(fd, request, argument);
  }
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override {
    const std::ptrdiff_t got = calls_.read(fd, buffer, bytes);
    if (bug_ != Bug::lost_faults || got <= 0) return got;
    // No event among them: whoever caused that would never go on, and the manager could not end.
    const std::span messages(static_cast<const abi::Msg*>(buffer),
                             static_cast<std::size_t>(got) / sizeof(abi::Msg));
    if (!std::ranges::all_of(messages,
                             [](const abi::Msg& each) { return each.event == abi::kEventPagefault; }))
      return got;
    // All of one client: a single one may be answered by what comes for a neighbour.
    int none = -1;
    return loses_of_.compare_exchange_strong(none, fd) || none == fd ? -EAGAIN : got;
  }

 private:
  const Bug bug_;
  std::atomic<int> loses_of_ = -1;
};

// What a thread of a client is doing.
struct Doing {
  enum class Kind : std::uint8_t { nothing, access, advise, unmap };
  Kind kind = Kind::nothing;
  Access access{};
  AddressRange range{};
  bool begun = false;
};

struct Worker {
  Thread* thread;
  Doing doing{};
};

struct Client {
  explicit Client(Process& its_process)
      : process(its_process),
        uffd(Uffd::create({.required = Features(abi::kFeatureEventRemove | abi::kFeatureEventUnmap)},
                          process.system_calls())
                 .value()) {}

  Process& process;
  Uffd uffd;
  ExpectedMemory memory;
  std::vector<Worker> workers;
  std::uint64_t first_page = 0;  // of the image
  // Of one that speaks as Firecracker does: the process that connects and is watched, and killed with it.
  std::unique_ptr<uffdkit::test::Child> real;
  // Of one that speaks the native protocol: its connection is this process's.
  std::unique_ptr<uffdkit::test::NativeConnection> connection;
  native::SessionId session{};
  UniqueFd state_file;
};

enum class Speaks : bool { firecracker, native };

class World {
 public:
  explicit World(std::uint64_t seed, Bug bug = Bug::none, Speaks speaks = Speaks::firecracker)
      : speaks_(speaks),
        random_(seed),
        kernel_({.seed = seed}),
        descriptors_(kernel_.spawn()),
        calls_(descriptors_, bug) {
    write_image(directory_ / "image");
    // Before there are threads: each may have a process that is forked from this one.
    for (int i = 0; i < kClients; ++i) add_client(draw(kImagePages - kRegionPages));
    start_manager();
    for (const auto& client : clients_)
      if (speaks == Speaks::native)
        attach(*client);
      else
        client->real->channel().send(1);
  }

  ~World() {
    if (!manager_) return;
    // Twice: it does not wait for whoever has been found to hang.
    manager_->stop();
    manager_->stop();
    running_.join();
    manager_.reset();
  }

  // Threads begin so many things, all at once.
  void act(int things) {
    for (int begun = 0; begun < things && wrong_.empty();) {
      descriptors_.alone([&] {
        for (int i = 0; i < 8; ++i) begun += begin_something(*clients_[draw(clients_.size())]) ? 1 : 0;
        for (std::uint64_t turns = draw(16); turns > 0 && turn(); --turns) continue;
        check();
      });
      // Else the manager would meet threads that are asleep only.
      if (draw(4) == 0) std::this_thread::yield();
      if (is_late()) return fail("the clients' threads do not get on");
    }
  }

  // The manager ends, while the clients go on; another comes, and they resume there.
  void succeed() {
    manager_->stop();
    running_.join();
    manager_.reset();
    if (descriptors_.held() != 0) fail("the manager has kept a userfaultfd");
    descriptors_.alone([&] {
      for (int i = 0; i < 30; ++i) {
        begin_something(*clients_[draw(clients_.size())]);
        turn();
      }
      check();
    });
    start_manager();
    for (const auto& client : clients_) resume(*client);
  }

  // Every client's memory is completed, and is its own from then on.
  void detach_all() {
    for (const auto& client : clients_) {
      const native::Answer answer =
          client->connection->ask(native::Detach{.mode = native::DetachMode::populate});
      if (!std::holds_alternative<native::Ok>(answer)) fail("a client could not be completed");
    }
    // The last answer goes out just before the session is forgotten.
    const auto until = std::chrono::steady_clock::now() + kHang;
    while (descriptors_.held() != 0 && std::chrono::steady_clock::now() < until) std::this_thread::yield();
    if (descriptors_.held() != 0) fail("the manager has kept a userfaultfd");
  }

  // All that is under way comes to its end.
  void rest(std::chrono::milliseconds limit = kHang) {
    const auto until = std::chrono::steady_clock::now() + limit;
    while (wrong_.empty()) {
      const std::string asleep = descriptors_.alone([&] {
        while (turn()) continue;
        check();
        return first_asleep();
      });
      if (asleep.empty()) return;
      if (std::chrono::steady_clock::now() > until) return fail(asleep);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  }

  void kill_one() {
    // One whose userfaultfd is on its way yet would take it along.
    wait_for_arrivals();
    Client& client = *clients_[draw(clients_.size())];
    descriptors_.alone([&] { client.process.kill(); });
    client.real->kill();
  }

  // The manager's end: it leaves when the clients' memory is complete. They go on meanwhile.
  void end_manager() {
    // A client that comes later is not its any more.
    wait_for_arrivals();
    manager_->stop();
    while (!ended_) {
      descriptors_.alone([&] {
        turn();
        check();
      });
      std::this_thread::yield();
    }
    running_.join();
    manager_.reset();
    if (!ended_well_) fail("the manager says that a client could not be completed");
    if (descriptors_.held() != 0) fail("the manager has kept a userfaultfd");
  }

  // Every byte that can be looked at by those who are left.
  void look_at_everything() {
    for (const auto& client : clients_) {
      if (!client->process.alive()) continue;
      for (const auto& [address, page] : client->memory.pages())
        for (const std::uint64_t offset : {std::uint64_t{1}, kPage / 2, kPage - 1}) {
          if (!wrong_.empty()) return;
          descriptors_.alone([&, start = Address(address)] {
            begin_access(client->workers.front(), {.address = start + ByteCount(offset)});
          });
          rest();
        }
    }
  }

  const std::string& wrong() const { return wrong_; }
  std::size_t bytes_checked() const { return bytes_checked_; }

 private:
  std::uint64_t draw(std::uint64_t below) { return random_() % below; }
  void fail(std::string text) {
    if (wrong_.empty()) wrong_ = std::move(text);
  }
  void wait_for_arrivals() {
    while (wrong_.empty() && descriptors_.not_arrived() > 0) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      if (is_late()) fail("a client's userfaultfd has not arrived");
    }
  }
  bool is_late() const { return std::chrono::steady_clock::now() - began_ > kHang; }

  void start_manager() {
    manager_ =
        Manager::create({.workers = 3, .fault_around = PageCount(4), .drain_ms = 10'000, .system = calls_})
            .value();
    if (speaks_ == Speaks::native) {
      manager_->add_image("guest", directory_ / "image").value();
      manager_->listen_native(directory_ / "socket").value();
    } else {
      manager_->listen_firecracker(directory_ / "socket", directory_ / "image").value();
    }
    running_ = std::jthread([this] {
      ended_well_ = manager_->run();
      ended_ = true;
    });
  }

  void attach(Client& client) {
    const AddressRange range{Address(client.memory.pages().begin()->first), ByteCount(kRegionPages * kPage)};
    client.connection = std::make_unique<uffdkit::test::NativeConnection>(directory_ / "socket");
    const RequestedRegion region{
        .memory = range, .offset = StoreOffset(client.first_page * kPage), .page_size = kPage4K};
    take_up(client, client.connection->ask(native::Attach{.request = {.image = "guest", .regions = {region}},
                                                          .uffd = handed_over(client)}));
  }
  void resume(Client& client) {
    client.connection = std::make_unique<uffdkit::test::NativeConnection>(directory_ / "socket");
    take_up(client, client.connection->ask(native::Resume{.session = client.session,
                                                          .uffd = handed_over(client),
                                                          .state_file = std::move(client.state_file)}));
  }
  UniqueFd handed_over(const Client& client) {
    return uffdkit::test::duplicate(descriptors_.pass(client.process, client.uffd.fd()));
  }
  void take_up(Client& client, native::Answer answer) {
    auto* attached = std::get_if<native::Attached>(&answer);
    if (attached == nullptr) return fail("a client was refused");
    client.session = attached->session;
    client.state_file = std::move(attached->state_file);
  }

  void add_client(std::uint64_t first) {
    auto client = std::make_unique<Client>(kernel_.spawn());
    client->first_page = first;
    const ByteCount length(kRegionPages * kPage);
    const Memory kind = draw(2) == 0 ? Memory::anonymous : Memory::shmem_private;
    const AddressRange range{client->process.map({.memory = kind, .length = length}).value(), length};
    client->uffd.register_range(range, kMissing).value();
    client->memory.add(range, first);
    for (int i = 0; i < kThreads; ++i) client->workers.push_back({.thread = &client->process.spawn_thread()});
    if (speaks_ == Speaks::native) {
      clients_.push_back(std::move(client));
      return;
    }
    const int fd = descriptors_.pass(client->process, client->uffd.fd());
    const nlohmann::json handshake = {{{"base_host_virt_addr", range.start.value},
                                       {"size", length.value},
                                       {"offset", first * kPage},
                                       {"page_size", kPage}}};
    client->real = std::make_unique<uffdkit::test::Child>(
        [fd, text = handshake.dump(), socket = directory_ / "socket"](const uffdkit::test::Channel& test) {
          (void)test.receive();
          const UniqueFd connection = uffdkit::test::connect_to(socket);
          uffdkit::test::send_with_fds(connection.get(), text, std::array{fd});
          test.wait_closed();
          return 0;
        });
    clients_.push_back(std::move(client));
  }

  static void begin_access(Worker& worker, Access access) {
    worker.doing = {.kind = Doing::Kind::access, .access = access};
    worker.thread->access(access);
  }

  bool begin_something(Client& client) {
    Worker& worker = client.workers[draw(client.workers.size())];
    if (worker.thread->state() != Thread::State::idle || client.memory.pages().empty()) return false;
    auto page = client.memory.pages().begin();
    std::advance(page, static_cast<std::ptrdiff_t>(draw(client.memory.pages().size())));
    const Address address(page->first);
    const std::uint64_t what = draw(100);
    if (what < 85) {
      begin_access(worker, {.address = address + ByteCount(draw(kPage)),
                            .write = what < 20,
                            .kernel_mode = draw(6) == 0,
                            .value = static_cast<std::byte>(draw(256))});
      return true;
    }
    Doing doing{.kind = what == 99 ? Doing::Kind::unmap : Doing::Kind::advise,
                .range = {address, ByteCount((1 + draw(12)) * kPage)}};
    // Threads of one process that change the same memory at once get what they get.
    for (const Worker& other : client.workers)
      if (other.doing.kind > Doing::Kind::access && other.doing.range.overlaps(doing.range)) return false;
    if (doing.kind == Doing::Kind::unmap) {
      worker.thread->unmap(doing.range);
    } else {
      client.memory.begin_leaving(doing.range);
      worker.thread->advise(doing.range, Advice::dont_need);
    }
    worker.doing = doing;
    return true;
  }

  // One turn of one thread; what it has done is looked at at once, so that all is in a known order.
  bool turn() {
    if (!kernel_.step()) return false;
    for (const auto& client : clients_)
      for (Worker& worker : client->workers) look_at(*client, worker);
    return true;
  }

  void look_at(Client& client, Worker& worker) {
    Doing& doing = worker.doing;
    const Thread::State state = worker.thread->state();
    if (doing.kind == Doing::Kind::nothing || state == Thread::State::dead) return;
    if (state != Thread::State::runnable && !std::exchange(doing.begun, true) &&
        doing.kind == Doing::Kind::unmap)
      client.memory.forget(doing.range);
    if (state != Thread::State::idle) return;
    const Completion ended = worker.thread->last().value();
    const Doing done = std::exchange(doing, {});
    if (done.kind == Doing::Kind::advise)
      client.memory.end_leaving(done.range, ended.result == 0);
    else if (done.kind == Doing::Kind::access)
      look_at_access(client, done.access, ended);
  }

  void look_at_access(Client& client, const Access& access, const Completion& ended) {
    const ExpectedPage* page = client.memory.find(access.address);
    if (ended.kind != Completion::Kind::value) {
      if (page != nullptr)
        fail(fmt::format("{:#x} of process {}: {}", access.address.value, client.process.pid(),
                         to_string(ended)));
      return;
    }
    const ExpectedMemory::Looked looked = client.memory.look_at(access, ended);
    bytes_checked_ += looked.compared ? 1 : 0;
    if (!looked.wrong.empty()) fail(fmt::format("process {}: {}", client.process.pid(), looked.wrong));
  }

  void check() {
    for (const std::string& text : kernel_.violations()) fail(text);
  }

  std::string first_asleep() const {
    for (const auto& client : clients_)
      for (const Worker& worker : client->workers)
        if (worker.thread->state() != Thread::State::idle && worker.thread->state() != Thread::State::dead)
          return fmt::format("thread {} is {}, and nobody comes for it", worker.thread->tid(),
                             to_string(worker.thread->state()));
    return "";
  }

  const std::chrono::steady_clock::time_point began_ = std::chrono::steady_clock::now();
  const Speaks speaks_;
  uffdkit::test::TempDir directory_;
  std::mt19937_64 random_;
  Kernel kernel_;
  RealDescriptors descriptors_;
  BuggyCalls calls_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::unique_ptr<Manager> manager_;
  std::atomic<bool> ended_ = false;
  bool ended_well_ = false;
  std::string wrong_;
  std::size_t bytes_checked_ = 0;
  std::jthread running_;
};

TEST(SimManager, ServesEveryByteAndLeavesNoThreadAsleep) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    World world(seed);
    world.act(3000);
    world.rest();
    world.look_at_everything();
    EXPECT_GT(world.bytes_checked(), 1000u);
    ASSERT_EQ(world.wrong(), "") << "seed " << seed;
  }
}

TEST(SimManager, LeavesWhenTheMemoryOfAllClientsIsComplete) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    World world(seed);
    world.act(200);
    world.end_manager();
    world.rest();
    world.look_at_everything();
    ASSERT_EQ(world.wrong(), "") << "seed " << seed;
  }
}

TEST(SimManager, ServesTheOthersWhenClientsAreKilled) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    World world(seed);
    for (int i = 0; i < 3; ++i) {
      world.act(300);
      world.kill_one();
    }
    world.rest();
    world.end_manager();
    world.look_at_everything();
    ASSERT_EQ(world.wrong(), "") << "seed " << seed;
  }
}

TEST(SimManager, NativeClientsGoOnAtASuccessor) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    World world(seed, Bug::none, Speaks::native);
    world.act(300);
    for (int i = 0; i < 3; ++i) {
      world.succeed();
      world.act(200);
    }
    world.rest();
    world.look_at_everything();
    ASSERT_EQ(world.wrong(), "") << "seed " << seed;
  }
}

TEST(SimManager, NativeClientsThatDetachHaveAllOfTheirMemory) {
  for (std::uint64_t seed = 1; seed <= 3; ++seed) {
    World world(seed, Bug::none, Speaks::native);
    world.act(200);
    world.rest();
    world.detach_all();
    world.look_at_everything();
    ASSERT_EQ(world.wrong(), "") << "seed " << seed;
  }
}

TEST(SimManager, LeavesNoDescriptorOpen) {
  const std::size_t before = open_descriptors();
  {
    World world(1);
    world.act(300);
    world.kill_one();
    world.rest();
    world.end_manager();
    ASSERT_EQ(world.wrong(), "");
  }
  EXPECT_EQ(open_descriptors(), before);
}

TEST(SimManager, AWrongByteOfAPageIsFound) {
  World world(1, Bug::wrong_byte);
  world.look_at_everything();
  EXPECT_NE(world.wrong(), "");
}

TEST(SimManager, FaultsThatAreForgottenAreFound) {
  World world(1, Bug::lost_faults);
  world.act(50);
  world.rest(std::chrono::milliseconds(500));
  EXPECT_NE(world.wrong(), "");
}

}  // namespace
}  // namespace uffdkit::sim::test
