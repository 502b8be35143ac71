#include "simulate/manager_world.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <uffdkit/sim.h>
#include <uffdkit/store.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "base/check.h"
#include "image/memory_source.h"
#include "image/write_image.h"
#include "manager/manager.h"
#include "simulate/client_process.h"
#include "simulate/manager_seam.h"
#include "simulate/real_descriptors.h"
#include "simulate/story.h"
#include "support/child.h"
#include "support/client.h"
#include "support/mapping.h"
#include "support/temp_dir.h"
#include "wire/control.h"
#include "wire/native.h"
#include "wire/unix_socket.h"

namespace uffdkit::simulate {
namespace {

constexpr std::uint64_t kImagePages = 300;
constexpr std::uint64_t kRegionPages = 60;
constexpr std::size_t kClients = 5;
constexpr std::size_t kClientsMax = 9;  // with children of fork
constexpr int kSteps = 1500;
// Nothing that is on its way takes longer: a stranger is shown out after 5 s.
constexpr std::int64_t kPatienceNs = 6'000'000'000;
// Completing a client's memory, and noticing the end of a process that nobody knows.
constexpr std::int64_t kEndNs = 60'000'000'000;
constexpr std::uint64_t kNativeFeatures =
    abi::kFeatureEventRemove | abi::kFeatureEventUnmap | abi::kFeatureEventRemap | abi::kFeatureEventFork;

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

enum class Compressed : bool { no, yes };

void write_image(const std::string& path, Compressed compressed) {
  std::vector<std::byte> memory(kImagePages * kPage);
  for (std::uint64_t at = 0; at < memory.size(); ++at)
    memory[at] = static_cast<std::byte>(image_byte(at / kPage, at % kPage));
  if (compressed == Compressed::no) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(memory.data()), static_cast<std::streamsize>(memory.size()));
    return;
  }
  const auto source = image::memory_of(make_memory_store(memory), memory.size());
  (void)image::write_image(*source, path, std::nullopt, {},
                           {.frame_bytes = image::kFrameBytesMin, .threads = 1})
      .value();
}

// Keeps the image in the page cache: what of it is there decides who reads it, and the kernel may drop it at
// any time.
test::Mapping locked(const std::filesystem::path& path) {
  const UniqueFd file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  test::Mapping mapping =
      test::Mapping::map(nullptr, std::filesystem::file_size(path), PROT_READ, MAP_SHARED, file.get());
  // Not by mlock(3), of which sanitizers make nothing.
  CHECK(::syscall(SYS_mlock, mapping.data(), mapping.size()) == 0);
  return mapping;
}

enum class Speaks : std::uint8_t {
  firecracker,
  native,
  nothing,  // a child of fork: its parent's manager hears of it
};

enum class Stage : std::uint8_t {
  outside,   // nobody serves it
  asking,    // it has connected, and wants to be served
  served,    //
  complete,  // nobody needs to serve it any more
};

struct Client : ClientProcess {
  Client(sim::Process& its_process, Speaks how) : ClientProcess(its_process), speaks(how) {}
  bool may_run() const {
    // One that speaks the native protocol touches its memory when it has been told that it may.
    return process.alive() && (speaks != Speaks::native || has_session);
  }

  const Speaks speaks;
  Stage stage = Stage::outside;
  AddressRange region{};
  std::uint64_t first_page = 0;  // of the image, which the region shows
  // The process that connects and is watched.
  std::unique_ptr<test::Child> real;

  UniqueFd socket;
  int handed_over = -1;  // what goes through it
  native::FrameReader reader{native::FrameReader::Reads::answers};
  std::uint32_t last_request = 0;
  std::map<std::uint32_t, std::function<void(native::Answer&)>> asked;  // by request
  std::vector<AddressRange> dropping;                                   // and not answered yet
  std::vector<AddressRange> dropped;  // where mappings begin and end that mremap(2) takes for several
  std::vector<AddressRange> unknown;  // what it shows
  bool has_session = false;
  bool detaching = false;
  bool releasing = false;  // it wants no more of what it has not got, from then on
  native::SessionId session{};
  UniqueFd state_file;
};

class ManagerWorld {
 public:
  ManagerWorld(std::uint64_t seed, ManagerBug bug)
      : story_(seed),
        threads_(seed, bug),
        kernel_({.seed = seed}),
        descriptors_(kernel_.spawn()),
        calls_(threads_, descriptors_, seed, bug) {
    write_image(directory_ / "image", compressed_);
    image_.emplace(locked(directory_ / "image"));
    if (compressed_ == Compressed::yes) story_.note("the image is compressed");
    // Before there are threads: each has a process that is forked from this one.
    for (std::size_t i = 0; i < kClients; ++i) add_client();
    start_manager();
  }

  ~ManagerWorld() {
    if (manager_) give_up();
    run_to_the_end_of_all();
  }

  Found run() {
    for (int step = 0; step < kSteps && story_.is_right(); ++step) {
      act();
      go_on();
    }
    rest();
    look_at_everything();
    end();
    Found found = story_.tell();
    found.trace = threads_.trace() ^ story_.trace();
    return found;
  }

 private:
  // ---- the manager

  void start_manager() {
    ManagerOptions options{.workers = 1 + static_cast<unsigned>(story_.draw(3)),
                           .fault_around = PageCount(std::uint64_t{1} << story_.draw(5)),
                           .spin_ns = story_.one_in(2) ? 20'000 : 0,
                           .drain_ms = kEndNs / 1'000'000,
                           .record = story_.one_in(4),
                           .background = story_.one_in(4) ? Background::full : Background::off,
                           .system = calls_,
                           .threads = Threads(threads_)};
    // Part of the image is read by its lane only, and there a page may fail once; but not when an image is
    // opened, for which one that is compressed is read.
    const std::uint64_t border = story_.draw(std::filesystem::file_size(directory_ / "image"));
    if (border > 0)
      options.store_faults.push_back({.kind = StoreFault::Kind::error,
                                      .rate = compressed_ == Compressed::yes ? 0 : 0.1,
                                      .to = StoreOffset(border),
                                      .times = 1,
                                      .seed = story_.draw(1000)});
    manager_ = Manager::create(options).value();
    manager_->add_image("guest", directory_ / "image").value();
    manager_->listen_native(directory_ / "native").value();
    manager_->listen_control(directory_ / "control").value();
    manager_->listen_firecracker(directory_ / "firecracker", directory_ / "image").value();
    ending_ = false;
    ended_ = false;
    running_ = Threads(threads_)
                   .start("run the manager",
                          [this] {
                            ended_well_ = manager_->run();
                            ended_ = true;
                          })
                   .value();
    story_.note(fmt::format("a manager with {} workers", options.workers));
  }

  void begin_end() {
    if (std::exchange(ending_, true)) return;
    story_.note("the manager is to end");
    // Whom it cannot complete it kills, and has to wait for that.
    ends_by_ns_ = threads_.clock_ns() + 2 * kEndNs;
    manager_->stop();
  }

  // The manager has come to its end; nothing of it may be left.
  void bury() {
    running_.join();
    manager_.reset();
    story_.note("the manager has ended");
    hear_all();
    if (threads_.got_stuck()) story_.fail("the threads of a manager that ends wait for each other");
    if (!ended_well_) story_.fail("the manager says that a client could not be completed");
    if (descriptors_.held() != 0)
      story_.fail(fmt::format("the manager has kept {} userfaultfds", descriptors_.held()));
    // What a successor could not find is complete.
    for (const auto& client : clients_)
      if (client->stage == Stage::served) client->stage = Stage::complete;
  }

  // ---- clients

  void add_client() {
    const Speaks speaks = story_.one_in(2) ? Speaks::firecracker : Speaks::native;
    auto client = std::make_unique<Client>(kernel_.spawn(), speaks);
    const std::uint64_t features = speaks == Speaks::native ? kNativeFeatures
                                   : story_.one_in(2) ? abi::kFeatureEventRemove | abi::kFeatureEventUnmap
                                                      : abi::kFeatureEventRemove;
    client->uffd = Uffd::create({.required = Features(features)}, client->process.system_calls()).value();
    client->grows = story_.one_in(2);
    client->first_page = story_.draw(kImagePages - kRegionPages);
    client->region =
        client->begin_with({.memory = client->grows ? sim::Memory::anonymous : sim::Memory::shmem_private,
                            .length = ByteCount(kRegionPages * kPage)},
                           kMissing, client->first_page);
    const std::string socket = directory_ / (speaks == Speaks::native ? "native" : "firecracker");
    client->real = std::make_unique<test::Child>([socket](const test::Channel& test) {
      while (test.receive() != 0) test.send_fd(0, test::connect_to(socket).get());
      return 0;
    });
    clients_.push_back(std::move(client));
  }

  // It says what it wants; what comes of that is heard later.
  void connect(Client& client) {
    if (client.stage != Stage::outside || !client.process.alive() || ending_) return;
    story_.note(fmt::format("process {} connects", client.process.pid()));
    client.real->channel().send(1);
    std::uint64_t ignored = 0;
    client.socket = client.real->channel().receive_fd(ignored);
    client.handed_over = descriptors_.pass(client.process, client.uffd->fd());
    client.stage = Stage::asking;
    if (client.speaks == Speaks::firecracker) {
      const nlohmann::json handshake = {{{"base_host_virt_addr", client.region.start.value},
                                         {"size", client.region.length.value},
                                         {"offset", client.first_page * kPage},
                                         {"page_size", kPage}}};
      return test::send_with_fds(client.socket.get(), handshake.dump(), std::array{client.handed_over});
    }
    client.reader = native::FrameReader(native::FrameReader::Reads::answers);
    ask(client, native::Hello{}, [](native::Answer&) {});
    UniqueFd uffd = duplicate(client.handed_over);
    const auto attached = [this, &client](native::Answer& answer) { hear_attached(client, answer); };
    if (client.has_session)
      return ask(client,
                 native::Resume{.session = client.session,
                                .uffd = std::move(uffd),
                                .state_file = duplicate(client.state_file.get())},
                 attached);
    ask(client,
        native::Attach{.request = {.image = "guest",
                                   .regions = {{.memory = client.region,
                                                .offset = StoreOffset(client.first_page * kPage),
                                                .page_size = kPage4K}}},
                       .uffd = std::move(uffd)},
        attached);
  }

  static UniqueFd duplicate(int fd) { return UniqueFd(linux_system_calls().duplicate(fd)); }

  static void ask(Client& client, native::Request request, std::function<void(native::Answer&)> hear) {
    const native::OutgoingFrame frame = native::encode_request(++client.last_request, std::move(request));
    client.asked[client.last_request] = std::move(hear);
    const auto sent = send_all(client.socket.get(), frame.bytes, frame.fd_numbers(), std::chrono::seconds(1));
    // A manager that has ended is heard of next.
    if (!sent) CHECK(sent.error().os_error() == EPIPE || sent.error().os_error() == ECONNRESET);
  }

  void hear_attached(Client& client, native::Answer& answer) {
    // One that serves it already needs no other descriptor.
    (void)descriptors_.lost(std::exchange(client.handed_over, -1));
    if (auto* attached = std::get_if<native::Attached>(&answer)) {
      client.session = attached->session;
      client.state_file = std::move(attached->state_file);
      client.has_session = true;
      client.stage = Stage::served;
      story_.note(fmt::format("process {} is served", client.process.pid()));
      // What was not answered is asked again.
      for (const AddressRange range : client.dropping) ask_to_drop(client, range);
      return;
    }
    if (!client.process.alive()) return;
    const auto* refused = std::get_if<native::Refused>(&answer);
    if (refused == nullptr) return story_.fail("ATTACH or RESUME was answered with something else");
    story_.note(fmt::format("process {} is refused: {}", client.process.pid(), to_string(refused->code)));
    const bool may_try_again = refused->code == native::ErrorCode::busy ||
                               refused->code == native::ErrorCode::shutting_down ||
                               refused->code == native::ErrorCode::no_such_session;
    if (!may_try_again) return story_.fail("refused: " + refused->message);
    ::shutdown(client.socket.get(), SHUT_WR);
  }

  void hear_all() {
    hear_operator();
    hear_strangers();
    for (const auto& client : clients_) {
      // What the manager kills is the process that has connected.
      if (client->real && client->process.alive() && client->real->has_ended()) kill(*client);
      hear(*client);
    }
  }

  void hear(Client& client) {
    std::array<std::byte, 4096> buffer;
    while (client.socket) {
      Result<Piece> piece = receive_some(client.socket.get(), buffer);
      if (!piece) return lose_connection(client);
      if (piece->bytes.empty() && !piece->end) return;
      const bool end = piece->end;
      story_.hear(fmt::format("{}:{} ", client.process.pid(), piece->bytes.size()));
      if (client.speaks == Speaks::native) hear(client, std::move(*piece));
      if (end) return lose_connection(client);
    }
  }

  void hear(Client& client, Piece piece) {
    Result<std::vector<native::Frame>> frames = client.reader.feed(std::move(piece));
    if (!frames) return story_.fail("the manager says what it must not: " + frames.error().text());
    for (native::Frame& frame : *frames) {
      auto request = client.asked.extract(frame.request_id);
      Result<native::Answer> answer = native::decode_answer(std::move(frame));
      if (!answer || !request) return story_.fail("the manager answers what was not asked");
      request.mapped()(*answer);
    }
  }

  void lose_connection(Client& client) {
    story_.note(fmt::format("the connection of process {} has ended", client.process.pid()));
    client.socket.reset();
    client.asked.clear();
    const bool not_arrived = descriptors_.lost(std::exchange(client.handed_over, -1));
    client.detaching = false;
    if (client.stage == Stage::complete) return;
    client.stage = client.speaks == Speaks::firecracker && !not_arrived ? Stage::served : Stage::outside;
  }

  // ---- who wants nothing that it could have

  // Connects, and says nothing, half of something, or what nobody understands.
  void add_stranger() {
    if (ending_) return;
    constexpr std::array kWords = {"", "[{", "uffk", "uffkuffkuffkuffk"};
    const std::string word = kWords[story_.draw(kWords.size())];
    story_.note(fmt::format("a stranger connects, and says '{}'", word));
    strangers_.push_back(test::connect_to(directory_ / (story_.one_in(2) ? "native" : "firecracker")));
    if (!word.empty()) test::send_with_fds(strangers_.back().get(), word, {});
  }

  void hear_strangers() {
    std::array<std::byte, 4096> buffer;
    std::erase_if(strangers_, [&](const UniqueFd& stranger) {
      const Result<Piece> piece = receive_some(stranger.get(), buffer);
      return !piece || piece->end;
    });
  }

  // ---- who runs the manager

  void ask_operators(const control::Request& request, std::string what) {
    if (ending_) return;
    if (!operator_) operator_ = test::connect_to(directory_ / "control");
    story_.note("an operator asks: " + what);
    test::send_with_fds(operator_.get(), control::encode_request(request), {});
    operators_asked_.push_back(std::move(what));
  }

  void ask_as_operator() {
    const std::string more = directory_ / "more";
    switch (story_.draw(5)) {
      case 0:
        return ask_operators(control::Drain{}, "drain");
      case 1:
        return ask_operators(
            control::ListenAdd{
                .kind = control::ListenKind::firecracker, .socket = more, .image = directory_ / "image"},
            "listen");
      case 2:
        return ask_operators(control::ListenRemove{.socket = more}, "listen no more");
      default:
        return ask_operators(control::Status{}, "status");
    }
  }

  void hear_operator() {
    std::array<std::byte, 16'384> buffer;
    while (operator_) {
      Result<Piece> piece = receive_some(operator_.get(), buffer);
      const bool ended = !piece || piece->end;
      if (!ended && piece->bytes.empty()) return;
      Result<std::vector<std::string>> lines = std::vector<std::string>();
      if (piece) lines = operators_reader_.feed(*piece);
      if (!lines) return story_.fail("what an operator hears is no line: " + lines.error().text());
      for (const std::string& line : *lines) {
        if (operators_asked_.empty()) return story_.fail("an operator hears what was not asked");
        const std::string asked = std::exchange(operators_asked_.front(), "");
        operators_asked_.erase(operators_asked_.begin());
        const auto answer = control::decode_answer(line);
        // What is there cannot be added, and what is not cannot be removed.
        if (!answer && !asked.starts_with("listen")) return story_.fail(asked + ": " + answer.error().text());
      }
      if (!ended) continue;
      operator_.reset();
      operators_asked_.clear();
      operators_reader_ = control::LineReader(control::kAnswerBytesMax);
    }
  }

  // ---- what happens

  void act() {
    Client& client = *clients_[story_.draw(clients_.size())];
    const std::uint64_t what = story_.draw(200);
    if (what < 90) {
      begin_something(client);
    } else if (what < 150) {
      turn();
    } else if (what < 160) {
      if (client.speaks != Speaks::nothing) connect(client);
    } else if (what < 165) {
      ask_something(client);
    } else if (what == 165) {
      if (story_.one_in(3)) break_connection(client);
    } else if (what == 166) {
      if (story_.one_in(6)) kill(client);
    } else if (what == 167) {
      if (story_.one_in(4)) begin_end();
    } else if (what == 168) {
      ask_as_operator();
    } else if (what == 170) {
      add_stranger();
    } else if (what == 169) {
      // So what comes by the clock alone comes between other things, too.
      if (threads_.run_until_idle(100)) (void)threads_.let_time_pass();
    }
  }

  // All that follows by itself, and the turn of somebody else.
  void go_on() {
    hear_all();
    check();
    if (ended_) {
      bury();
      start_manager();
    }
    threads_.yield();
  }

  void break_connection(Client& client) {
    if (client.speaks != Speaks::native || client.stage != Stage::served) return;
    story_.note(fmt::format("process {} breaks its connection", client.process.pid()));
    lose_connection(client);
  }

  void kill(Client& client) {
    if (!client.process.alive()) return;
    story_.note(fmt::format("process {} is killed", client.process.pid()));
    descriptors_.alone([&] { client.process.kill(); });
    if (client.real) client.real->kill();
    // Its end stays with us until the manager's has gone, with what is on its way there.
    if (client.speaks == Speaks::native && client.socket) ::shutdown(client.socket.get(), SHUT_WR);
  }

  void ask_something(Client& client) {
    if (client.speaks != Speaks::native || client.stage != Stage::served || client.detaching) return;
    if (!client.process.alive()) return;
    const std::uint64_t what = story_.draw(10);
    if (what < 3) return ask(client, native::Query{}, [](native::Answer&) {});
    if (what < 6) return add_region(client);
    if (what < 9) return drop_region(client);
    if (!story_.one_in(3)) return;
    const bool populates = !story_.one_in(3);
    story_.note(
        fmt::format("process {} is to be {}", client.process.pid(), populates ? "completed" : "released"));
    client.detaching = true;
    client.releasing = client.releasing || !populates;
    if (client.releasing) client.memory.release();
    ask(client,
        native::Detach{.mode = populates ? native::DetachMode::populate : native::DetachMode::release},
        [this, &client](native::Answer& answer) {
          client.detaching = false;
          if (!std::holds_alternative<native::Ok>(answer)) return;
          story_.note(fmt::format("process {} is its own", client.process.pid()));
          client.stage = Stage::complete;
          // Which takes all of its memory out, also what it has added by mremap(2).
          descriptors_.alone([&] { client.uffd.reset(); });
          for (const AddressRange range : std::exchange(client.dropping, {}))
            client.memory.end_leaving(range, false);
        });
  }

  void add_region(Client& client) {
    const AddressRange range{places_.next(), ByteCount((1 + story_.draw(8)) * kPage)};
    const std::uint64_t first = story_.draw(kImagePages - 8);
    client.process.map({.length = range.length, .fixed = range.start}).value();
    client.uffd->register_range(range, kMissing).value();
    story_.note(fmt::format("process {} adds {:#x}+{:#x}", client.process.pid(), range.start.value,
                            range.length.value));
    ask(client,
        native::AddRegions{
            .regions = {{.memory = range, .offset = StoreOffset(first * kPage), .page_size = kPage4K}}},
        [&client, range, first](native::Answer& answer) {
          // From here on it may be touched.
          if (!std::holds_alternative<native::Ok>(answer)) return;
          client.memory.add(range, first);
          if (client.releasing) client.memory.release();
        });
  }

  void drop_region(Client& client) {
    if (client.memory.pages().empty()) return;
    const AddressRange range{client.some_page(story_), ByteCount((1 + story_.draw(4)) * kPage)};
    // It touches nothing there until it has taken it out. A child that is being born has what is dropped, or
    // has it not.
    if (is_in_use(client, range) || client.is_forking()) return;
    story_.note(fmt::format("process {} drops {:#x}+{:#x}", client.process.pid(), range.start.value,
                            range.length.value));
    client.memory.begin_leaving(range);
    client.dropping.push_back(range);
    ask_to_drop(client, range);
  }

  void ask_to_drop(Client& client, AddressRange range) {
    ask(client, native::DropRegions{.ranges = {range}}, [this, &client, range](native::Answer& answer) {
      if (!std::holds_alternative<native::Ok>(answer)) return;
      // Page by page: part of it may be unmapped.
      descriptors_.alone([&] {
        for (std::uint64_t at = 0; at < range.length.value; at += kPage)
          (void)client.uffd->unregister_range({range.start + ByteCount(at), ByteCount(kPage)});
      });
      client.memory.end_leaving(range, false);
      // A file that is mapped elsewhere, too, would show there the zeros that are read here.
      if (!client.grows) forget(client, range);
      client.dropping.erase(std::ranges::find(client.dropping, range));
      client.dropped.push_back(range);
    });
  }

  // Nobody knows what it shows: it is not looked at any more.
  static void forget(Client& client, AddressRange range) {
    client.memory.forget(range);
    client.unknown.push_back(range);
  }

  // Whether something is under way there.
  static bool is_in_use(const Client& client, AddressRange range) {
    const auto touches = [&](const Worker& worker) {
      const Doing& doing = worker.doing;
      if (doing.kind == Doing::Kind::access) return range.contains(doing.access.address);
      const bool moves = doing.kind == Doing::Kind::remap;
      return doing.kind > Doing::Kind::fork &&
             (doing.range.overlaps(range) ||
              (moves && AddressRange{*doing.remap.to, doing.remap.new_length}.overlaps(range)));
    };
    return std::ranges::any_of(client.workers, touches) || overlaps_any(client.dropping, range);
  }
  static bool overlaps_any(const std::vector<AddressRange>& ranges, AddressRange range) {
    return std::ranges::any_of(ranges, [&](AddressRange other) { return other.overlaps(range); });
  }

  void begin_something(Client& client) {
    Worker& worker = client.workers[story_.draw(client.workers.size())];
    if (!client.may_run() || !worker.is_idle() || client.memory.pages().empty()) return;
    const Address address = client.some_page(story_);
    Doing doing{};
    const std::uint64_t what = story_.draw(client.speaks == Speaks::firecracker ? 39 : 44);
    if (what < 33) {
      doing = ClientProcess::some_access(story_, address, what < 8);
    } else if (what == 43) {
      if (!may_fork(client)) return;
      doing.kind = Doing::Kind::fork;
    } else {
      doing.range = {address, ByteCount((1 + story_.draw(6)) * kPage)};
      if (client.is_changing(doing.range)) return;
      doing.kind = what < 38 ? Doing::Kind::advise : what == 38 ? Doing::Kind::unmap : Doing::Kind::remap;
      if (doing.kind == Doing::Kind::remap)
        doing = client.some_move(story_, doing.range, places_.next(), true);
    }
    if (doing.kind == Doing::Kind::remap && overlaps_any(client.dropped, doing.range)) return;
    if (overlaps_any(client.dropping, doing.kind == Doing::Kind::access
                                          ? AddressRange{address, ByteCount(kPage)}
                                          : doing.range))
      return;
    descriptors_.alone([&] { begin(client, worker, std::move(doing)); });
  }

  bool may_fork(const Client& client) const {
    // A private mapping of a file shares that file with the child, whose zeros it would read when nobody
    // serves the child any more.
    if (!client.grows || clients_.size() + newcomers_.size() >= kClientsMax) return false;
    return client.stage == Stage::served && !client.detaching && !client.is_forking();
  }

  void begin(Client& client, Worker& worker, Doing doing) {
    const bool is_access = doing.kind == Doing::Kind::access;
    story_.note(fmt::format("process {}, thread {}: {} {:#x}+{:#x}", client.process.pid(),
                            worker.thread->tid(), to_string(doing.kind),
                            is_access ? doing.access.address.value : doing.range.start.value,
                            doing.range.length.value));
    client.begin(worker, std::move(doing));
  }

  // ---- what must come of it

  // One turn of one thread; what it has done is looked at at once, so that all is in a known order.
  bool turn() {
    const bool moved = descriptors_.alone([&] {
      if (!kernel_.step()) return false;
      for (const auto& client : clients_)
        for (Worker& worker : client->workers) look_at(*client, worker);
      return true;
    });
    for (auto& child : std::exchange(newcomers_, {})) clients_.push_back(std::move(child));
    return moved;
  }

  void look_at(Client& client, Worker& worker) {
    const std::optional<Done> done = client.look_at(worker, client.dropping);
    if (!done) return;
    story_.hear(fmt::format("{}={} ", worker.thread->tid(), to_string(done->ended)));
    if (done->doing.kind == Doing::Kind::fork)
      add_child(client, *done->ended.child, *done->doing.of_child);
    else if (done->doing.kind == Doing::Kind::remap)
      look_at_remap(client, done->doing.remap, done->ended);
    else if (done->doing.kind == Doing::Kind::access)
      look_at_access(client, done->doing.access, done->ended);
  }

  static void look_at_remap(Client& client, const sim::Remap& remap, const sim::Completion& ended) {
    if (ended.result >= 0) return;
    // Where a manager has unregistered part of it, that is a mapping of its own: it may have been moved
    // alone.
    forget(client, remap.from);
    forget(client, {*remap.to, remap.new_length});
  }

  void add_child(Client& parent, sim::Process& process, ExpectedMemory memory) {
    auto child = std::make_unique<Client>(process, Speaks::nothing);
    child->stage = Stage::served;
    child->grows = true;
    child->dropped = parent.dropped;
    child->begin_as_child(std::move(memory));
    story_.note(fmt::format("process {} has a child, {}", parent.process.pid(), process.pid()));
    newcomers_.push_back(std::move(child));
  }

  void look_at_access(Client& client, const sim::Access& access, const sim::Completion& ended) {
    const bool is_known = client.memory.find(access.address) != nullptr;
    if (!is_known && overlaps_any(client.unknown, {access.address, ByteCount(1)})) return;
    client.check(story_, access, ended, !is_known);
  }

  void check() {
    for (const std::string& text : kernel_.violations()) story_.fail(text);
  }

  // What is under way still; empty if nothing is.
  std::string unfinished() const {
    if (!operators_asked_.empty()) return "an operator waits for an answer: " + operators_asked_.front();
    if (!strangers_.empty()) return "a stranger is not shown out";
    for (const auto& client : clients_) {
      if (!client->process.alive()) continue;
      const int pid = client->process.pid();
      if (client->stage == Stage::outside || client->stage == Stage::asking)
        return fmt::format("process {} is not served", pid);
      if (!client->asked.empty()) return fmt::format("process {} waits for an answer", pid);
      for (const Worker& worker : client->workers)
        if (!worker.is_idle())
          return fmt::format("thread {} of process {} is {}, and nobody comes for it", worker.thread->tid(),
                             pid, to_string(worker.thread->state()));
    }
    return "";
  }

  // Nothing new is begun; all that is under way comes to its end.
  void rest() {
    std::int64_t until_ns = threads_.clock_ns() + kPatienceNs;
    while (story_.is_right()) {
      if (!ending_)
        for (const auto& client : clients_)
          if (client->speaks != Speaks::nothing) connect(*client);
      const bool moved = turn();
      if (ended_) until_ns = threads_.clock_ns() + kPatienceNs;
      if (ending_ && !ended_) until_ns = std::max(until_ns, ends_by_ns_);
      go_on();
      if (moved) continue;
      const bool idle = threads_.run_until_idle();
      hear_all();
      const std::string left = unfinished();
      if (left.empty() && !ending_) return;
      if (threads_.clock_ns() > until_ns)
        return story_.fail(left.empty() ? "the manager does not end" : left);
      if (turn() || ended_ || !idle) continue;
      if (!threads_.let_time_pass()) return story_.fail(left);
    }
  }

  void look_at_everything() {
    for (const auto& client : clients_) {
      if (!client->process.alive()) continue;
      std::vector<Address> addresses;
      for (const auto& [address, page] : client->memory.pages()) addresses.emplace_back(address);
      for (const Address address : addresses) {
        if (!story_.is_right()) return;
        Worker& worker = client->workers[story_.draw(client->workers.size())];
        if (!worker.is_idle()) rest();
        if (!story_.is_right()) return;
        if (client->memory.find(address) == nullptr) continue;
        descriptors_.alone([&] {
          begin(
              *client, worker,
              {.kind = Doing::Kind::access, .access = {.address = address + ByteCount(story_.draw(kPage))}});
        });
        turn();
      }
      rest();
    }
  }

  // The last manager ends while nobody does anything, and nothing is left of it.
  void end() {
    if (!story_.is_right()) return;
    begin_end();
    const std::int64_t until_ns = threads_.clock_ns() + kEndNs;
    while (!ended_) {
      while (turn()) continue;
      hear_all();
      const bool idle = threads_.run_until_idle();
      if (threads_.clock_ns() > until_ns) return story_.fail("the manager does not end");
      if (ended_ || turn() || !idle) continue;
      CHECK(threads_.let_time_pass());
    }
    bury();
    (void)threads_.run_until_idle();
    if (threads_.others() != 0) story_.fail(fmt::format("{} threads are left", threads_.others()));
  }

  // Something was wrong: who waits for what does not come would not end, and the manager not before its
  // clients.
  void give_up() {
    threads_.mend();
    for (const auto& client : clients_) kill(*client);
    manager_->stop();
    manager_->stop();
    while (!ended_) {
      const bool idle = threads_.run_until_idle();
      if (!ended_ && idle) CHECK(threads_.let_time_pass());
    }
    running_.join();
    manager_.reset();
  }

  void run_to_the_end_of_all() {
    while (threads_.others() != 0)
      if (threads_.run_until_idle() && threads_.others() != 0) CHECK(threads_.let_time_pass());
  }

  test::TempDir directory_;
  std::optional<test::Mapping> image_;
  Story story_;
  const Compressed compressed_ = story_.one_in(3) ? Compressed::yes : Compressed::no;
  PlantedThreads threads_;
  sim::Kernel kernel_;
  RealDescriptors descriptors_;
  YieldingCalls calls_;
  std::vector<std::unique_ptr<Client>> clients_;
  std::vector<std::unique_ptr<Client>> newcomers_;  // born in this turn
  std::vector<UniqueFd> strangers_;                 // their connections
  UniqueFd operator_;                               // its connection
  std::vector<std::string> operators_asked_;
  control::LineReader operators_reader_{control::kAnswerBytesMax};
  std::unique_ptr<Manager> manager_;
  Thread running_;
  bool ending_ = false;  // it has been told to
  std::int64_t ends_by_ns_ = 0;
  bool ended_ = false;
  bool ended_well_ = false;
  Places places_;
};

}  // namespace

Found run_manager(std::uint64_t seed, ManagerBug bug) {
  const std::size_t before = open_descriptors();
  Found found;
  {
    ManagerWorld world(seed, bug);
    found = world.run();
  }
  const std::size_t after = open_descriptors();
  if (found.wrong.empty() && after != before)
    found.wrong = fmt::format("{} descriptors are open in the end, of {} before", after, before);
  return found;
}

std::uint64_t first_seed_that_finds(ManagerBug bug, std::uint64_t most) {
  for (std::uint64_t seed = 1; seed <= most; ++seed)
    if (!run_manager(seed, bug).wrong.empty()) return seed;
  return 0;
}

}  // namespace uffdkit::simulate
