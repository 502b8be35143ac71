#include "simulate/world.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <uffdkit/sim.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <memory>
#include <set>
#include <utility>

#include "engine/session.h"
#include "simulate/client_process.h"
#include "simulate/cut_copy.h"
#include "simulate/expected.h"
#include "simulate/story.h"

namespace uffdkit::simulate {
namespace {

constexpr std::uint64_t kHugePages = kPage2M.bytes().value / kPage;  // small ones of a huge one
constexpr std::uint64_t kImagePages = 3 * kHugePages;
constexpr std::uint64_t kRegionPages = 48;
constexpr std::uint64_t kHugeRegionPages = 2 * kHugePages;
constexpr std::size_t kClientsMax = 8;  // with their children
constexpr int kSteps = 600;
constexpr int kStepsToRest = 50'000;
constexpr std::uint64_t kFeatures =
    abi::kFeatureEventRemove | abi::kFeatureEventUnmap | abi::kFeatureEventRemap | abi::kFeatureEventFork;
// Thrown out of a system call: the manager is killed there.
struct Killed {};

std::size_t fill_number(unsigned long request) {
  return request == abi::kIoctlCopy ? offsetof(abi::CopyArgs, done) : offsetof(abi::FillArgs, done);
}

class World;

// The image. It answers at once, later or not at all, as the seed says; a prompt one always at once.
class SeededStore final : public Store {
 public:
  explicit SeededStore(World& world, bool prompt = false) : world_(world), prompt_(prompt) {}
  ByteCount size() const noexcept override { return ByteCount(kImagePages * kPage); }
  std::string name() const override { return "image"; }
  Extent extent_at(StoreOffset from) const noexcept override {
    // Holes are known by pairs of pages only, so that zero pages are also found by reading.
    const std::uint64_t page = from.value / kPage;
    return {.zero = page % 6 == 2, .end = StoreOffset((page + 1) * kPage)};
  }
  Result<ReadStatus> read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept override;

  std::set<std::uint64_t> failed;  // pages that could not be read

 private:
  World& world_;
  const bool prompt_;
};

// The seam: threads move between any two calls, the manager may be killed there, and bugs are planted.
class ManagerCalls final : public SystemCalls {
 public:
  ManagerCalls(World& world, sim::Process& process) : world_(world), calls_(process.system_calls()) {}
  int userfaultfd(int flags) override { return calls_.userfaultfd(flags); }
  int open(const char* path, int flags) override { return calls_.open(path, flags); }
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override;
  int poll_readable(int fd, int timeout_ms) override { return calls_.poll_readable(fd, timeout_ms); }
  int get_flags(int fd) override { return calls_.get_flags(fd); }
  int duplicate(int fd) override { return calls_.duplicate(fd); }
  int close(int fd) override;
  // Messages that a planted bug holds back.
  bool holds(int fd) const { return held_.contains(fd); }

 private:
  World& world_;
  SystemCalls& calls_;
  bool was_present_ = false;
  std::map<int, std::vector<abi::Msg>> held_;
};

// A client, and the session that serves it.
struct Client final : ClientProcess, SessionHost {
  Client(World& its_world, sim::Process& its_process) : ClientProcess(its_process), world(its_world) {}

  // SessionHost
  std::int64_t now_ns() override;
  std::span<std::byte> scratch() override { return scratch_memory; }
  bool gives_way() override;
  void start_fetch(StoreLane&, std::unique_ptr<Fetch> fetch) override { reading.push_back(std::move(fetch)); }
  bool kill_client() override {
    process.kill();
    return true;
  }
  bool client_has_exited() override { return !process.alive(); }
  bool stop_client() override { return false; }
  void continue_client() override {}
  Result<void> forked(std::unique_ptr<ForkedSession>& born) override {
    newborn = std::move(born);
    return {};
  }
  void page_failed(const Error&) override {}
  void detach_failed(const Error&) override {}
  void warn(const std::string&) override {}

  World& world;
  std::unique_ptr<Session> session;
  Session::Next next{.again = true};
  bool shares = false;                      // its memory, with another client
  bool is_ending = false;                   // its session was told to end
  SharingMode sharing = SharingMode::none;  // of the image's memory, which the manager fills for all
  bool huge = false;                        // hugetlbfs
  // Between a fork and what the manager makes of it: the parent has the child's session, or the child knows
  // that one will come.
  std::unique_ptr<ForkedSession> newborn;
  Client* awaits_session_of = nullptr;
  bool mail = false;
  bool was_alive = true;
  std::vector<std::unique_ptr<Fetch>> reading;
  std::vector<std::byte> scratch_memory = std::vector<std::byte>(kFetchGranulesMax * kPage);
};

class World {
 public:
  World(std::uint64_t seed, Bug planted) : bug(planted), story_(seed), kernel_({.seed = seed}) {
    store_ = std::make_shared<SeededStore>(*this);
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

  Story& story() { return story_; }
  std::int64_t now_ns() const { return now_ns_; }
  bool at_rest() const { return at_rest_; }

  // Between two system calls of the manager.
  void between_calls() {
    for (std::uint64_t turns = story_.draw(4); turns > 0 && turn();) --turns;
    if (calls_to_live_ > 0 && --calls_to_live_ == 0) throw Killed{};
  }

  // The pages of the shared image that the manager has written are in the page cache that clients map.
  void show_shared_pages() {
    if (!image_ || image_->filled_pages() == shown_pages_) return;
    shown_pages_ = image_->filled_pages();
    std::array<std::byte, kPage> page;
    for (std::uint64_t index = 0; index < kImagePages; ++index) {
      if (!image_->has(PageIndex(index)) || image_object_->cached(index * kPage)) continue;
      if (::pread(image_file_.get(), page.data(), kPage, static_cast<off_t>(index * kPage)) != kPage)
        story_.fail("the shared image cannot be read");
      image_object_->write(index * kPage, page);
    }
  }

  const Bug bug;

 private:
  void new_manager() {
    manager_ = &kernel_.spawn();
    calls_ = std::make_unique<ManagerCalls>(*this, *manager_);
  }

  void add_client(const sim::ObjectPtr& shared, std::uint64_t first,
                  std::optional<sim::Memory> memory = std::nullopt) {
    sim::Process& process = kernel_.spawn();
    auto client = std::make_unique<Client>(*this, process);
    client->uffd = Uffd::create({.required = Features(kFeatures)}, process.system_calls()).value();
    client->shares = shared != nullptr;
    client->huge = memory.has_value();
    const sim::Memory kind = memory             ? *memory
                             : shared           ? sim::Memory::shmem_shared
                             : story_.one_in(2) ? sim::Memory::anonymous
                                                : sim::Memory::shmem_private;
    client->grows = kind == sim::Memory::anonymous;
    if (client->huge) story_.note(fmt::format("process {} has huge pages", process.pid()));
    const ByteCount length((client->huge ? kHugeRegionPages : kRegionPages) * kPage);
    const AddressRange range =
        client->begin_with({.memory = kind, .length = length, .object = shared}, kMissing, first);
    serve(*client, SessionState::create("image").value());
    client->session->add_region(range, StoreOffset(first * kPage), client->huge ? kPage2M : kPage4K, lane_)
        .value();
    clients_.push_back(std::move(client));
  }

  // Clients that map the memory of one image privately. What the manager writes there, into a real file, is
  // shown to them by show_shared_pages().
  void add_clones() {
    image_ =
        SharedImage::create(StoreLane::create(std::make_shared<SeededStore>(*this, true)).value()).value();
    image_file_ = image_->open_for_client().value();
    image_object_ = kernel_.make_shmem(ByteCount(kImagePages * kPage));
    for (std::uint64_t clones = 2 + story_.draw(2); clones > 0; --clones) {
      sim::Process& process = kernel_.spawn();
      auto client = std::make_unique<Client>(*this, process);
      client->sharing = story_.one_in(2) ? SharingMode::resolve : SharingMode::page_cache;
      client->uffd = Uffd::create({.required = Features(kFeatures)}, process.system_calls()).value();
      const std::uint64_t first = story_.draw(kImagePages - kRegionPages);
      const bool resolve = client->sharing == SharingMode::resolve;
      const AddressRange range = client->begin_with({.memory = sim::Memory::shmem_private,
                                                     .length = ByteCount(kRegionPages * kPage),
                                                     .object = image_object_,
                                                     .offset = first * kPage},
                                                    resolve ? kMissing | kMinor : kMissing, first);
      story_.note(fmt::format("process {} shares the image", process.pid()));
      serve(*client, SessionState::create("image").value());
      client->session
          ->add_region(range, StoreOffset(first * kPage), kPage4K, image_->lane(), 0,
                       {.mode = client->sharing, .image = image_})
          .value();
      clients_.push_back(std::move(client));
    }
  }

  // What a manager does with a client that arrives or comes back.
  void serve(Client& client, SessionState state) {
    const int fd = client.process.pass_descriptor(client.uffd->fd(), *manager_);
    std::vector<std::shared_ptr<StoreLane>> lanes;
    for (const RegionRecord& region : state.regions()) lanes.push_back(region.live ? lane_ : nullptr);
    serve(client, Uffd::receive(fd, *calls_).value(), std::move(state), std::move(lanes));
  }
  void serve(Client& client, Uffd uffd, SessionState state, std::vector<std::shared_ptr<StoreLane>> lanes) {
    client.session = std::make_unique<Session>(
        std::move(uffd), std::move(state), std::move(lanes),
        SessionOptions{.fault_around = PageCount(std::uint64_t{1} << story_.draw(5)),
                       .background = story_.one_in(4) ? Background::full : Background::off,
                       .follow_streams = story_.one_in(2)},
        client);
    if (story_.one_in(2)) prefetch(client);
    client.next = {.again = true};
  }

  // Pages of the image in any order are brought before they are asked for.
  void prefetch(Client& client) {
    std::vector<std::uint32_t> order;
    for (std::uint64_t page = story_.draw(4); page < kImagePages; page += 1 + story_.draw(4))
      order.push_back(static_cast<std::uint32_t>(page));
    story_.shuffle(order);
    story_.note(fmt::format("process {} is brought {} pages", client.process.pid(), order.size()));
    client.session->prefetch(std::make_shared<PrefetchOrder>(std::move(order)), lane_, story_.draw(1000));
  }

  // ---- what happens

  void act() {
    Client& client = *clients_[story_.draw(clients_.size())];
    switch (story_.draw(16)) {
      case 0:
        now_ns_ += static_cast<std::int64_t>(story_.draw(1'000'000));
        break;
      case 1:
      case 2:
        give_back_a_fetch(client);
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
        if (is_due(client)) step(client);
        break;
      case 9:
      case 10:
        turn();
        break;
      default:
        begin_something(client);
    }
  }

  void kill(Client& client) {
    story_.note(fmt::format("process {} is killed", client.process.pid()));
    client.process.kill();
  }

  void begin_something(Client& client) {
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
  bool may_fork(const Client& client) const {
    // A private mapping of a file shares the file with the child: once nobody serves that one, the zeros that
    // it reads are there for its parent too.
    if (!client.grows && !client.huge) return false;
    if (clients_.size() >= kClientsMax || client.newborn) return false;
    for (const auto& other : clients_)
      if (other->awaits_session_of == &client) return false;
    return !client.is_forking();
  }

  // The manager completes the client's memory, or the client wants no more of it.
  void end_session(Client& client) {
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

  bool is_readable(const Client& client) {
    const int fd = client.session->uffd().fd();
    return calls_->holds(fd) || manager_->system_calls().poll_readable(fd, 0) != 0;
  }
  bool is_due(const Client& client) {
    if (!client.session) return false;
    return client.next.again || client.mail || client.process.alive() != client.was_alive ||
           (client.next.wake_at_ns != 0 && client.next.wake_at_ns <= now_ns_) || is_readable(client);
  }

  // Something that the manager does, which may be killed in it.
  template <class Do>
  void act_on(Client& client, const Do& act) {
    try {
      act();
      if (client.session && client.session->end()) {
        constexpr std::array kNames = {"gone", "detached", "released", "abandoned", "failed"};
        story_.note(fmt::format("the session of process {} has ended: {}", client.process.pid(),
                                kNames[static_cast<std::size_t>(*client.session->end())]));
        client.session.reset();
        // Nothing is registered any more when the client has closed its own descriptor, too: what it has
        // added by mremap(2) is known to nobody else.
        client.uffd.reset();
        client.reading.clear();
        client.next = {};
      }
      welcome();
      take_newborn(client);
    } catch (const Killed&) {
      succeed();
    }
  }

  void step(Client& client) {
    act_on(client, [&] {
      client.mail = false;
      if (client.process.alive() != client.was_alive) client.session->check_target();
      client.was_alive = client.process.alive();
      client.next = client.session->step();
    });
  }

  // The child of a fork is there, and so is its session: they come in either order.
  void take_newborn(Client& parent) {
    if (!parent.newborn) return;
    for (const auto& child : clients_) {
      if (child->awaits_session_of != &parent) continue;
      child->awaits_session_of = nullptr;
      const std::unique_ptr<ForkedSession> born = std::move(parent.newborn);
      serve(*child, std::move(born->uffd), std::move(born->state), std::move(born->lanes));
      return;
    }
    // A parent that died before it returned from fork has no child.
    if (!parent.process.alive()) parent.newborn.reset();
  }

  void add_child(Client& parent, sim::Process& process, const Doing& fork) {
    auto child = std::make_unique<Client>(*this, process);
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
      Client* parent = child->awaits_session_of;
      clients_.push_back(std::move(child));
      if (parent != nullptr) take_newborn(*parent);
    }
  }

  void give_back_a_fetch(Client& client) {
    if (!client.session) client.reading.clear();
    if (client.reading.empty()) return;
    const auto chosen =
        client.reading.begin() + static_cast<std::ptrdiff_t>(story_.draw(client.reading.size()));
    std::unique_ptr<Fetch> fetch = std::move(*chosen);
    client.reading.erase(chosen);
    read_fetch(*fetch);
    if (bug == Bug::stale_fetch) forget_removals(client, *fetch);
    client.session->fetched(std::move(fetch));
    client.mail = true;
  }

  // As an engine would that does not know what was removed while it read.
  static void forget_removals(Client& client, const Fetch& fetch) {
    auto& state = const_cast<SessionState&>(client.session->state());
    for (RegionId id = 0; id < state.regions().size(); ++id) {
      if (!state.regions()[id].live) continue;
      const PageIndex first((fetch.from - state.regions()[id].offset).value / kPage);
      state.table(id).set({first, fetch.granules}, PageState::fetching);
    }
  }

  // The manager is dead. Another takes up what it left.
  void succeed() {
    story_.note("the manager is killed, and another takes up");
    calls_to_live_ = 0;
    std::vector<std::pair<Client*, UniqueFd>> left;
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

  void look_at(Client& client, Worker& worker) {
    const std::optional<Done> done = client.look_at(worker);
    if (!done) return;
    if (done->doing.kind == Doing::Kind::fork) add_child(client, *done->ended.child, done->doing);
    if (done->doing.kind != Doing::Kind::access) return;
    const ExpectedPage* page = client.memory.find(done->doing.access.address);
    const bool may_fail = page == nullptr || (page->image && store_->failed.contains(*page->image));
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
        if (!asleep || is_due(*client) || client->next.wake_at_ns != 0 || !client->reading.empty()) continue;
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
    at_rest_ = true;
    calls_to_live_ = 0;
    for (int steps = 0; steps < kStepsToRest && story_.is_right(); ++steps) {
      bool moved = turn();
      welcome();
      // By number: clients are born meanwhile.
      for (std::size_t i = 0; i < clients_.size(); ++i) {
        Client* client = clients_[i].get();
        if (!client->reading.empty()) {
          give_back_a_fetch(*client);
          moved = true;
        }
        if (is_due(*client)) {
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
      Client& client = **served;
      if (!is_due(client)) {
        if (client.next.wake_at_ns == 0 && client.reading.empty())
          return story_.fail(fmt::format("the session of process {} outlives it", client.process.pid()));
        now_ns_ = std::max(now_ns_, client.next.wake_at_ns);
      }
      give_back_a_fetch(client);
      if (client.session) step(client);
    }
    check_descriptors();
    if (story_.is_right() && kernel_.spare_huge_pages() != sim::KernelOptions{}.huge_pages)
      story_.fail(fmt::format("{} huge pages are spare in the end", kernel_.spare_huge_pages()));
  }

  Story story_;
  sim::Kernel kernel_;
  std::shared_ptr<SeededStore> store_;
  std::shared_ptr<StoreLane> lane_;
  sim::Process* manager_ = nullptr;
  std::unique_ptr<ManagerCalls> calls_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::shared_ptr<SharedImage> image_;
  UniqueFd image_file_;
  sim::ObjectPtr image_object_;
  std::uint64_t shown_pages_ = 0;
  std::vector<std::unique_ptr<Client>> newcomers_;  // born in this turn
  Places places_;
  std::int64_t now_ns_ = 1;
  int calls_to_live_ = 0;
  bool at_rest_ = false;
};

std::int64_t Client::now_ns() {
  return world.now_ns();
}

bool Client::gives_way() {
  return world.story().draw(4) == 0;
}

Result<ReadStatus> SeededStore::read(StoreOffset from, std::span<std::byte> to, Wait wait) noexcept {
  if (wait == Wait::no && !prompt_ && world_.story().one_in(2)) return ReadStatus::would_block;
  const std::uint64_t first = from.value / kPage;
  if (wait == Wait::yes && !world_.at_rest() && world_.story().one_in(20)) {
    for (std::uint64_t i = 0; i < to.size() / kPage; ++i) failed.insert(first + i);
    return Failure(Error("the seed says so", EIO));
  }
  for (std::size_t at = 0; at < to.size(); at += 512)
    std::memset(to.data() + at, image_byte(first + at / kPage, at % kPage), 512);
  return ReadStatus::done;
}

int ManagerCalls::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  world_.between_calls();
  world_.show_shared_pages();
  if (world_.bug == Bug::no_wake_after_present && request == abi::kIoctlWake && was_present_) return 0;
  int result = request == abi::kIoctlCopy ? cut_copy(calls_, world_.story(), fd, argument)
                                          : calls_.ioctl(fd, request, argument);
  was_present_ = result == -EEXIST;
  if (result == -EAGAIN && (request == abi::kIoctlCopy || request == abi::kIoctlZeropage)) {
    std::int64_t done = 0;
    std::memcpy(&done, reinterpret_cast<void*>(argument + fill_number(request)), sizeof done);
    if (world_.bug == Bug::short_copy_taken_for_whole && done > 0) result = 0;
    if (world_.bug == Bug::refused_fault_forgotten && done < 0) result = 0;
  }
  world_.between_calls();
  return result;
}

int ManagerCalls::close(int fd) {
  if (world_.bug == Bug::leaked_descriptor && world_.story().one_in(4)) return 0;
  return calls_.close(fd);
}

std::ptrdiff_t ManagerCalls::read(int fd, void* buffer, std::size_t bytes) {
  world_.between_calls();
  if (world_.bug != Bug::fault_before_older_remove) {
    const std::ptrdiff_t got = calls_.read(fd, buffer, bytes);
    world_.between_calls();
    return got;
  }
  // Removes are handed over by the read after the next.
  auto* messages = static_cast<abi::Msg*>(buffer);
  const std::vector<abi::Msg> late = std::exchange(held_[fd], {});
  held_.erase(fd);
  if (!late.empty()) {
    std::ranges::copy(late, messages);
    return static_cast<std::ptrdiff_t>(late.size() * sizeof(abi::Msg));
  }
  const std::ptrdiff_t got = calls_.read(fd, buffer, bytes);
  if (got <= 0 || bytes < sizeof(abi::Msg) || got % static_cast<std::ptrdiff_t>(sizeof(abi::Msg)) != 0)
    return got;
  std::size_t kept = 0;
  for (std::size_t i = 0; i < static_cast<std::size_t>(got) / sizeof(abi::Msg); ++i) {
    if (messages[i].event == abi::kEventRemove)
      held_[fd].push_back(messages[i]);
    else
      messages[kept++] = messages[i];
  }
  return kept == 0 ? -EAGAIN : static_cast<std::ptrdiff_t>(kept * sizeof(abi::Msg));
}

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
