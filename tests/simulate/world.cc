#include "simulate/world.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/sim.h>
#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "simulate/client_process.h"
#include "simulate/engine_client.h"
#include "simulate/engine_seam.h"
#include "simulate/expected.h"
#include "simulate/story.h"

namespace uffdkit::simulate {
namespace {

constexpr std::uint64_t kImagePages = SeededStore::kPages;
constexpr std::uint64_t kRegionPages = 48;
constexpr std::uint64_t kHugeRegionPages = 2 * kHugePages;
constexpr std::size_t kClientsMax = 8;  // with their children
constexpr int kSteps = 600;
constexpr int kStepsToRest = 50'000;

class World {
 public:
  World(std::uint64_t seed, Bug bug) : bug_(bug), story_(seed), kernel_({.seed = seed}) {
    store_ = std::make_shared<SeededStore>(story_);
    lane_ = StoreLane::create(store_).value();
    new_manager();
    const std::uint64_t count = story_.draw(3);
    for (std::uint64_t i = 0; i < count; ++i) add_client(nullptr, story_.draw(kImagePages - kRegionPages));
    if (story_.one_in(6))
      add_client(nullptr, story_.draw(kImagePages - kHugeRegionPages), sim::Memory::hugetlb_private);
    if (story_.one_in(4)) add_clones();
    if (!clients_.empty() && story_.one_in(2)) return;
    // Two that share their memory: what is put there for one is there for the other, whose threads nobody
    // wakes by that.
    const sim::ObjectPtr object = kernel_.make_shmem(ByteCount(kRegionPages * kPage));
    const std::uint64_t first = story_.draw(kImagePages - kRegionPages);
    for (int i = 0; i < 2; ++i) add_client(object, first);
  }

  Found run() {
    for (int step = 0; step < kSteps && story_.is_right(); ++step) {
      act();
      check();
    }
    come_to_rest();
    look_at_everything();
    end_everything();
    return story_.tell();
  }

 private:
  void new_manager() {
    manager_ = &kernel_.spawn();
    calls_ = std::make_unique<ManagerCalls>(story_, bug_, *manager_,
                                            ManagerCalls::Meanwhile{
                                                .between_calls = [this] { move_between_calls(); },
                                                .before_ioctl = [this] { show_cloned_image(); },
                                            });
  }

  // Between two system calls of the manager.
  void move_between_calls() {
    for (std::uint64_t turns = story_.draw(4); turns > 0 && turn();) --turns;
    if (calls_to_live_ > 0 && --calls_to_live_ == 0) throw Killed{};
  }
  void show_cloned_image() {
    if (cloned_) cloned_->show();
  }

  std::unique_ptr<EngineClient> new_client() {
    auto client = std::make_unique<EngineClient>(story_, now_ns_, kernel_.spawn());
    client->uffd = Uffd::create({.required = Features(kAllEvents)}, client->process.system_calls()).value();
    return client;
  }

  void add_client(const sim::ObjectPtr& shared, std::uint64_t first,
                  std::optional<sim::Memory> memory = std::nullopt) {
    std::unique_ptr<EngineClient> client = new_client();
    client->shares = shared != nullptr;
    client->huge = memory.has_value();
    const sim::Memory kind = memory             ? *memory
                             : shared           ? sim::Memory::shmem_shared
                             : story_.one_in(2) ? sim::Memory::anonymous
                                                : sim::Memory::shmem_private;
    client->grows = kind == sim::Memory::anonymous;
    if (client->huge) story_.note(fmt::format("process {} has huge pages", client->process.pid()));
    const ByteCount length((client->huge ? kHugeRegionPages : kRegionPages) * kPage);
    const AddressRange range =
        client->begin_with({.memory = kind, .length = length, .object = shared}, kMissing, first);
    serve(*client, SessionState::create("image").value());
    client->session->add_region(range, StoreOffset(first * kPage), client->huge ? kPage2M : kPage4K, lane_)
        .value();
    clients_.push_back(std::move(client));
  }

  // Clients that map the memory of one image privately.
  void add_clones() {
    cloned_ = std::make_unique<ClonedImage>(story_, kernel_);
    for (std::uint64_t clones = 2 + story_.draw(2); clones > 0; --clones) {
      std::unique_ptr<EngineClient> client = new_client();
      client->sharing = story_.one_in(2) ? SharingMode::resolve : SharingMode::page_cache;
      const std::uint64_t first = story_.draw(kImagePages - kRegionPages);
      const bool resolve = client->sharing == SharingMode::resolve;
      const AddressRange range = client->begin_with({.memory = sim::Memory::shmem_private,
                                                     .length = ByteCount(kRegionPages * kPage),
                                                     .object = cloned_->object(),
                                                     .offset = first * kPage},
                                                    resolve ? kMissing | kMinor : kMissing, first);
      story_.note(fmt::format("process {} shares the image", client->process.pid()));
      serve(*client, SessionState::create("image").value());
      client->session
          ->add_region(range, StoreOffset(first * kPage), kPage4K, cloned_->image()->lane(), 0,
                       {.mode = client->sharing, .image = cloned_->image()})
          .value();
      clients_.push_back(std::move(client));
    }
  }

  // What a manager does with a client that arrives or comes back.
  void serve(EngineClient& client, SessionState state) {
    const int fd = client.process.pass_descriptor(client.uffd->fd(), *manager_);
    std::vector<std::shared_ptr<StoreLane>> lanes;
    for (const RegionRecord& region : state.regions()) lanes.push_back(region.live ? lane_ : nullptr);
    client.begin_session(Uffd::receive(fd, *calls_).value(), std::move(state), std::move(lanes), lane_);
  }

  // ---- what happens

  void act() {
    EngineClient& client = *clients_[story_.draw(clients_.size())];
    switch (story_.draw(16)) {
      case 0:
        now_ns_ += static_cast<std::int64_t>(story_.draw(1'000'000));
        break;
      case 1:
      case 2:
        client.give_back_a_fetch(bug_);
        break;
      case 3:
        if (calls_to_live_ == 0 && story_.one_in(20)) calls_to_live_ = 1 + static_cast<int>(story_.draw(12));
        break;
      case 4:
        if (story_.one_in(100)) kill(client);
        if (story_.one_in(60)) end_session(client);
        break;
      case 5:
      case 6:
      case 7:
      case 8:
        if (client.is_due(*calls_)) step(client);
        break;
      case 9:
      case 10:
        turn();
        break;
      default:
        begin_something(client);
    }
  }

  void kill(EngineClient& client) {
    story_.note(fmt::format("process {} is killed", client.process.pid()));
    client.process.kill();
  }

  void begin_something(EngineClient& client) {
    Worker& worker = client.workers[story_.draw(client.workers.size())];
    if (!worker.is_idle() || client.memory.pages().empty()) return;
    const Address address = client.some_page(story_);
    Doing doing{};
    // Of what clients share, one session would not hear what the other's client changes.
    // What a client of the page cache gives back is the image again, and so it is for all who share the image
    // when they are not served any more.
    const bool keeps_all = client.sharing == SharingMode::page_cache ||
                           (client.sharing == SharingMode::resolve && (!client.session || client.is_ending));
    const std::uint64_t what = client.shares ? 8 + story_.draw(25)
                               : keeps_all   ? story_.draw(33)
                               : client.huge ? story_.draw(37)
                                             : story_.draw(44);
    if (what < 33) {
      doing = ClientProcess::some_access(story_, address, what < 8);
    } else if (what == 33) {
      if (!may_fork(client)) return;
      doing.kind = Doing::Kind::fork;
    } else {
      doing.range = client.huge ? AddressRange{Address(kPage2M.round_down(address.value)), kPage2M.bytes()}
                                : AddressRange{address, ByteCount((1 + story_.draw(6)) * kPage)};
      if (client.is_changing(doing.range)) return;
      doing.kind = what < 39 ? Doing::Kind::advise : what == 39 ? Doing::Kind::unmap : Doing::Kind::remap;
      // What a mapping of the image's memory leaves behind is zero only as long as it is served.
      if (doing.kind == Doing::Kind::remap)
        doing = client.some_move(story_, doing.range, places_.next(), client.sharing == SharingMode::none);
    }
    story_.note(fmt::format("process {}, thread {}: {} {:#x}+{:#x}{}", client.process.pid(),
                            worker.thread->tid(), to_string(doing.kind), address.value,
                            doing.range.length.value,
                            doing.remap.to ? fmt::format(" to {:#x}", doing.remap.to->value) : ""));
    client.begin(worker, std::move(doing));
  }

  // One at a time, so that it is known whose child a session is of.
  bool may_fork(const EngineClient& client) const {
    // A private mapping of a file shares the file with the child: once nobody serves that one, the zeros that
    // it reads are there for its parent too.
    if (!client.grows && !client.huge) return false;
    if (clients_.size() >= kClientsMax || client.newborn) return false;
    for (const auto& other : clients_)
      if (other->awaits_session_of == &client) return false;
    return !client.is_forking();
  }

  // The manager completes the client's memory, or the client wants no more of it.
  void end_session(EngineClient& client) {
    if (!client.session) return;
    const bool gives_back = std::ranges::any_of(
        client.workers, [](const Worker& worker) { return worker.doing.changes_memory(); });
    if (client.sharing != SharingMode::none && gives_back) return;
    client.is_ending = true;
    // What one of those that share their memory gives up is zero for the other too.
    if (!client.shares && story_.one_in(3)) {
      story_.note(fmt::format("process {} is released", client.process.pid()));
      client.memory.release();
      act_on(client, [&] { client.session->release(); });
    } else {
      story_.note(fmt::format("process {} is to be completed", client.process.pid()));
      act_on(client, [&] {
        client.session->begin_detach(story_.one_in(2) ? Unreadable::keep_serving : Unreadable::poison);
      });
    }
    client.mail = true;
  }

  // Something that the manager does, which may be killed in it.
  template <class Do>
  void act_on(EngineClient& client, const Do& act) {
    try {
      act();
      client.look_at_end();
      welcome();
      take_newborn(client);
    } catch (const Killed&) {
      succeed();
    }
  }

  void step(EngineClient& client) {
    act_on(client, [&] {
      client.mail = false;
      if (client.process.alive() != client.was_alive) client.session->check_target();
      client.was_alive = client.process.alive();
      client.next = client.session->step();
    });
  }

  // The child of a fork is there, and so is its session: they come in either order.
  void take_newborn(EngineClient& parent) {
    if (!parent.newborn) return;
    for (const auto& child : clients_) {
      if (child->awaits_session_of != &parent) continue;
      child->awaits_session_of = nullptr;
      const std::unique_ptr<ForkedSession> born = std::move(parent.newborn);
      child->begin_session(std::move(born->uffd), std::move(born->state), std::move(born->lanes), lane_);
      return;
    }
    // A parent that died before it returned from fork has no child.
    if (!parent.process.alive()) parent.newborn.reset();
  }

  void add_child(EngineClient& parent, sim::Process& process, const Doing& fork) {
    auto child = std::make_unique<EngineClient>(story_, now_ns_, process);
    child->next = {};
    child->huge = parent.huge;
    child->grows = parent.grows;
    child->begin_as_child(*fork.of_child);
    story_.note(fmt::format("process {} has a child, {}", parent.process.pid(), process.pid()));
    if ((parent.session || parent.newborn) && !fork.unserved)
      child->awaits_session_of = &parent;
    else
      child->memory.release();
    newcomers_.push_back(std::move(child));
  }

  // Clients that were born during a turn join the others when nobody goes through those.
  void welcome() {
    for (auto& child : std::exchange(newcomers_, {})) {
      EngineClient* parent = child->awaits_session_of;
      clients_.push_back(std::move(child));
      if (parent != nullptr) take_newborn(*parent);
    }
  }

  // The manager is dead. Another takes up what it left.
  void succeed() {
    story_.note("the manager is killed, and another takes up");
    calls_to_live_ = 0;
    std::vector<std::pair<EngineClient*, UniqueFd>> left;
    welcome();
    for (const auto& client : clients_) {
      // A child's userfaultfd dies with the manager: nobody else has a descriptor of it.
      const bool is_left = client->session && client->uffd;
      if (is_left)
        left.emplace_back(client.get(), UniqueFd(::fcntl(client->session->state().fd(), F_DUPFD_CLOEXEC, 0)));
      if ((client->session && !is_left) || client->awaits_session_of != nullptr) client->memory.release();
      for (Worker& worker : client->workers)
        worker.doing.unserved |= worker.thread->state() == sim::Thread::State::runnable && worker.doing.begun;
      client->session.reset();
      client->newborn.reset();
      client->awaits_session_of = nullptr;
      client->reading.clear();
    }
    manager_->kill();
    new_manager();
    for (auto& [client, file] : left) {
      if (!client->process.alive()) continue;
      serve(*client, SessionState::open(std::move(file)).value());
      client->session->apply_inbox([](int) { return false; });
      client->session->wake_all();
    }
  }

  // ---- what must come of it

  // One turn of one thread; what it has done is looked at at once, so that all is in a known order.
  bool turn() {
    if (!kernel_.step()) return false;
    for (const auto& client : clients_)
      for (Worker& worker : client->workers) look_at(*client, worker);
    for (const auto& client : newcomers_)
      for (Worker& worker : client->workers) look_at(*client, worker);
    return true;
  }

  void look_at(EngineClient& client, Worker& worker) {
    const std::optional<Done> done = client.look_at(worker);
    if (!done) return;
    if (done->doing.kind == Doing::Kind::fork) add_child(client, *done->ended.child, done->doing);
    if (done->doing.kind != Doing::Kind::access) return;
    const ExpectedPage* page = client.memory.find(done->doing.access.address);
    const bool may_fail = page == nullptr || (page->image && store_->has_failed(*page->image));
    client.check(story_, done->doing.access, done->ended, may_fail);
  }

  void check() {
    for (const std::string& text : kernel_.violations()) story_.fail(text);
    welcome();
    check_descriptors();
    for (const auto& client : clients_) {
      if (!client->process.alive() || client->awaits_session_of != nullptr) continue;
      for (const Worker& worker : client->workers) {
        const sim::Thread::State state = worker.thread->state();
        const bool asleep =
            state == sim::Thread::State::fault_sleep || state == sim::Thread::State::event_sleep;
        if (!asleep || client->is_due(*calls_) || client->waits()) continue;
        story_.fail(fmt::format("thread {} is {}, and nothing is under way for it", worker.thread->tid(),
                                sim::to_string(state)));
      }
    }
  }

  // The manager has one descriptor of each userfaultfd that it serves, and no other.
  void check_descriptors() {
    std::size_t served = 0;
    for (const auto& client : clients_)
      served += std::size_t{client->session != nullptr} + std::size_t{client->newborn != nullptr};
    if (manager_->open_descriptors() != served)
      story_.fail(fmt::format("the manager has {} descriptors, and serves {} userfaultfds",
                              manager_->open_descriptors(), served));
  }

  // Nothing new is begun; all that is under way comes to its end.
  void come_to_rest() {
    store_->fail_no_more();
    if (cloned_) cloned_->fail_no_more();
    calls_to_live_ = 0;
    for (int steps = 0; steps < kStepsToRest && story_.is_right(); ++steps) {
      bool moved = turn();
      welcome();
      // By number: clients are born meanwhile.
      for (std::size_t i = 0; i < clients_.size(); ++i) {
        EngineClient* client = clients_[i].get();
        if (!client->reading.empty()) {
          client->give_back_a_fetch(bug_);
          moved = true;
        }
        if (client->is_due(*calls_)) {
          step(*client);
          moved = true;
        }
      }
      check();
      if (moved) continue;
      std::int64_t soonest = 0;
      for (const auto& client : clients_)
        if (client->session && client->next.wake_at_ns > now_ns_ &&
            (soonest == 0 || client->next.wake_at_ns < soonest))
          soonest = client->next.wake_at_ns;
      if (soonest == 0) return;
      now_ns_ = soonest;
    }
    story_.fail("it does not come to rest");
  }

  void look_at_everything() {
    for (const auto& client : clients_) {
      if (!client->process.alive()) continue;
      std::vector<Address> addresses;
      std::size_t seen = 0;
      for (const auto& [address, page] : client->memory.pages())
        if (!client->huge || seen++ % 61 == 0) addresses.emplace_back(address);
      Worker& worker = client->workers.front();
      for (const Address address : addresses) {
        if (!story_.is_right() || !worker.is_idle()) break;
        client->begin(worker, {.kind = Doing::Kind::access, .access = {.address = address + ByteCount(7)}});
        come_to_rest();
      }
    }
  }

  // When all processes have ended, nothing of them is left.
  void end_everything() {
    for (const auto& client : clients_) client->process.kill();
    for (int steps = 0; steps < kStepsToRest && story_.is_right(); ++steps) {
      const auto served =
          std::ranges::find_if(clients_, [](const auto& client) { return !!client->session; });
      if (served == clients_.end()) break;
      EngineClient& client = **served;
      if (!client.is_due(*calls_)) {
        if (!client.waits())
          return story_.fail(fmt::format("the session of process {} outlives it", client.process.pid()));
        now_ns_ = std::max(now_ns_, client.next.wake_at_ns);
      }
      client.give_back_a_fetch(bug_);
      if (client.session) step(client);
    }
    check_descriptors();
    if (story_.is_right() && kernel_.spare_huge_pages() != sim::KernelOptions{}.huge_pages)
      story_.fail(fmt::format("{} huge pages are spare in the end", kernel_.spare_huge_pages()));
  }

  const Bug bug_;
  Story story_;
  sim::Kernel kernel_;
  std::shared_ptr<SeededStore> store_;
  std::shared_ptr<StoreLane> lane_;
  std::unique_ptr<ClonedImage> cloned_;  // if there are clones
  std::int64_t now_ns_ = 1;
  sim::Process* manager_ = nullptr;
  std::unique_ptr<ManagerCalls> calls_;
  std::vector<std::unique_ptr<EngineClient>> clients_;
  std::vector<std::unique_ptr<EngineClient>> newcomers_;  // born in this turn
  Places places_;
  int calls_to_live_ = 0;
};

}  // namespace

Found run(std::uint64_t seed, Bug bug) {
  World world(seed, bug);
  return world.run();
}

std::uint64_t first_seed_that_finds(Bug bug, std::uint64_t most) {
  for (std::uint64_t seed = 1; seed <= most; ++seed)
    if (!run(seed, bug).wrong.empty()) return seed;
  return 0;
}

}  // namespace uffdkit::simulate
