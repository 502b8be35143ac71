#include "manager/manager.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <map>
#include <mutex>
#include <nlohmann/json.hpp>
#include <unordered_map>
#include <utility>

#include "base/clock.h"
#include "kernel/own_memory.h"
#include "manager/access.h"
#include "manager/blocking_work.h"
#include "manager/connections.h"
#include "manager/event_loop.h"
#include "manager/image_catalog.h"
#include "manager/keeper.h"
#include "manager/log.h"
#include "manager/quotas.h"
#include "manager/records.h"
#include "manager/sandbox.h"
#include "manager/service.h"
#include "manager/watchdog.h"

namespace uffdkit {
namespace {

// Connections that have not yet said what they want, and those on the control socket; more are not accepted
// until some have, or are closed. Clients that have a session are not bounded but by descriptors.
constexpr std::size_t kUndecidedMax = 4096;
constexpr std::size_t kControlMax = 256;
// Of the former, those of one user, so that others find a place.
constexpr std::size_t kUndecidedOfUserMax = 1024;
// How many refusals of one user are logged in a second; the rest is counted.
constexpr std::uint64_t kRefusalsLoggedPerSecond = 20;
// How long accepting stops when no descriptor is left.
constexpr std::int64_t kAcceptPauseMs = 100;
// How many descriptors are kept for what there is: the manager's own; a listener; a session (userfaultfd,
// state file, pidfd, perhaps an image); a connection (socket, pidfd); a client that has no session yet (all
// that becomes its session's, and an image while it is opened).
constexpr std::size_t kOwnDescriptors = 20;
constexpr std::size_t kListenerDescriptors = 3;
constexpr std::size_t kSessionDescriptors = 4;
constexpr std::size_t kConnectionDescriptors = 2;
constexpr std::size_t kClientDescriptors = 6;
// Page errors that are logged for each session; the rest is counted.
constexpr std::uint64_t kPageErrorsLogged = 10;
// How long a native session is served on after its connection has ended.
constexpr std::int64_t kResumeMs = 2'000;
// What the sessions take of an answer's bytes at most, which leaves as much again for some thousand
// listeners; one session but for its image's name; and a byte of that, written as JSON.
constexpr std::size_t kSessionsJsonBytesMax = control::kAnswerBytesMax / 2;
constexpr std::size_t kSessionJsonBytes = 800;
constexpr std::size_t kEscapedBytes = 6;
// How often pending faults are looked at: so many times within the watchdog's limit, and at least each
// second.
constexpr std::int64_t kWatchdogLooks = 4;
constexpr std::int64_t kWatchdogPauseMaxMs = 1000;
// Lines that workers have to say and that are not written yet; more are left out.
constexpr std::size_t kLogsQueuedMax = 1000;

std::string_view to_string(SessionEnd end) {
  switch (end) {
    case SessionEnd::gone:
      return "its process is gone";
    case SessionEnd::detached:
      return "complete and detached";
    case SessionEnd::released:
      return "released by its client";
    case SessionEnd::abandoned:
      return "left to a successor";
    case SessionEnd::failed:
      return "failed, client killed";
  }
  return "?";
}

std::string_view to_string(SharingMode mode) {
  switch (mode) {
    case SharingMode::none:
      return "none";
    case SharingMode::page_cache:
      return "page cache";
    case SharingMode::resolve:
      return "resolve";
  }
  return "?";
}

nlohmann::json counters_json(const SessionStatus& status) {
  return {{"faults", status.faults},
          {"faults_merged", status.faults_merged},
          {"events", status.events},
          {"pages_copied", status.pages_copied},
          {"pages_zeroed", status.pages_zeroed},
          {"pages_shared", status.pages_shared},
          {"pages_removed", status.pages_removed},
          {"pages_poisoned", status.pages_poisoned},
          {"pages_outside", status.pages_outside},
          {"bytes_read", status.bytes_read},
          {"fetches", status.fetches},
          {"retries", status.retries},
          {"read_retries", status.read_retries},
          {"read_errors", status.read_errors}};
}

void add_counters(nlohmann::json& total, const nlohmann::json& more) {
  for (const auto& [name, count] : more.items())
    total[name] = total.value(name, std::uint64_t{0}) + count.get<std::uint64_t>();
}

std::string_view to_string(SessionKind kind) {
  switch (kind) {
    case SessionKind::firecracker:
      return "firecracker";
    case SessionKind::native:
      return "native";
    case SessionKind::fork:
      return "fork";
  }
  return "?";
}

ListenerKind recorded_kind(control::ListenKind kind) {
  return kind == control::ListenKind::firecracker ? ListenerKind::firecracker : ListenerKind::native;
}

// What tells one file from all others.
struct FileIdentity {
  dev_t device;
  ino_t inode;
  bool operator==(const FileIdentity&) const = default;
};

std::optional<FileIdentity> identity_of(int fd) {
  struct stat status;
  if (::fstat(fd, &status) != 0) return std::nullopt;
  return FileIdentity{.device = status.st_dev, .inode = status.st_ino};
}

nlohmann::json cache_to_json(const image::FrameCache& cache) {
  const image::FrameCache::Statistics statistics = cache.statistics();
  return {{"bytes", statistics.bytes},   {"bytes_max", cache.bytes_max().value},
          {"frames", statistics.frames}, {"hits", statistics.hits},
          {"joined", statistics.joined}, {"decoded", statistics.decoded},
          {"failed", statistics.failed}};
}

bool is_userfaultfd(int fd) {
  std::array<char, 64> kind;
  const ssize_t bytes = ::readlink(fmt::format("/proc/self/fd/{}", fd).c_str(), kind.data(), kind.size());
  return bytes > 0 &&
         std::string_view(kind.data(), static_cast<std::size_t>(bytes)) == "anon_inode:[userfaultfd]";
}

}  // namespace

class Manager::Impl final : public ConnectionService, public EngineListener {
 public:
  // `connections`: of a worker of before, that may have sent a handshake.
  Impl(const ManagerOptions& options, std::vector<UniqueFd> connections)
      : options_(options), inherited_connections_(std::move(connections)) {}
  Result<void> start();
  Result<void> take_up();

  Result<void> listen(control::ListenKind kind, const std::string& path, const std::string& image);
  Result<void> listen_control(const std::string& path);
  ImageCatalog& images() { return *images_; }
  AccessRules& rules() { return rules_; }
  std::string listening() const;
  Result<void> stop_at_signals();
  void on_ending(std::function<void()> tell) { on_ending_ = std::move(tell); }
  bool run();
  void stop();

  // ConnectionService
  void acknowledged(SessionId session) override;
  Result<AttachedSession> attach(NewSession session, std::shared_ptr<StoreLane> image,
                                 Connection* connection) override;
  void resume(UniqueFd uffd, UniqueFd state_file, const Peer& peer, Connection* connection,
              Attached attached) override;
  void open_image(const std::string& name, const Peer& peer, Connection* connection,
                  ImageOpened opened) override;
  Result<std::shared_ptr<SharedImage>> share_memory(const std::shared_ptr<StoreLane>& image) override {
    return images_->share_memory(image);
  }
  Engine& engine() override { return *engine_; }
  Result<void> take_request(const Peer& peer) override {
    return quotas_.take_request(peer.uid, monotonic_ns());
  }
  Result<void> may_add(const Peer& peer, std::span<const RequestedRegion> regions) override;
  Engine::Done count_until_added(const Peer& peer, const RequestedRegion& region, Engine::Done done) override;
  Engine::Done on_loop(Connection* connection, Engine::Done done) override;
  void resume_client(SessionId session, Connection* connection, Engine::Done done) override;
  nlohmann::json status() override;
  nlohmann::json listeners() override;
  void add_listener(const control::ListenAdd& request, Connection* connection, Engine::Done done) override;
  Result<void> remove_listener(const std::string& socket) override;
  void refused(uid_t user, const std::string& who, const Error& error) override;
  void want(Connection& connection, int fd, bool read, bool write) override;
  void close(Connection& connection, int fd) override;

  // EngineListener: from workers
  void session_ended(const SessionStatus& session, SessionEnd end) override;
  void session_forked(const SessionStatus& session, const SessionFiles& files) override;
  void detach_failed(SessionId session, const Error& error) override;
  void page_failed(SessionId session, const Error& error) override;
  void warn(SessionId session, const std::string& text) override;

 private:
  struct Listener {
    ListeningSocket socket;
    control::ListenKind kind;
    std::string image;                 // the path that was given, for Firecracker's
    std::shared_ptr<StoreLane> store;  // likewise
    std::vector<Subject> allowed;      // to connect to this one, beside those who may have its image
  };
  // What is opened before a listener can be added; it may block.
  struct Opened {
    ListeningSocket socket;
    std::shared_ptr<StoreLane> store;
  };
  enum class Stage : std::uint8_t {
    undecided,  // a client that has to say what it wants within the deadline
    decided,    // one that has done so, and may stay for as long as it lives
    control,
  };
  struct OpenConnection {
    std::unique_ptr<Connection> connection;
    int fd;
    std::uint64_t serial;  // tells it from a later one at the same address
    Stage stage;
    uid_t user;
    EventLoop::Timer deadline;         // 0: none
    ImageOpened opened = nullptr;      // while an image is opened for it
    BlockingWork::Ticket opening = 0;  // the last one
  };
  struct SessionInfo {
    SessionKind kind;
    bool keeps_descriptor;
    pid_t pid;
    uid_t uid;
    std::string image;
    std::shared_ptr<StoreLane> lane;  // none for forks
    std::optional<FileIdentity> state_file;
    Connection* connection;
    std::uint64_t cookie = 0;  // of the socket by which it was handed over
    bool leaving = false;      // abandoned; its end has not been heard yet
    std::uint64_t page_errors = 0;
  };

  static Result<Opened> open(ImageCatalog& images, control::ListenKind kind, const std::string& path,
                             const std::string& image);
  // Whether a listener can be added at this path.
  Result<void> check_free(const std::string& path) const;
  Result<void> add_listener(control::ListenKind kind, const std::string& path, const std::string& image,
                            std::vector<Subject> allowed, Opened opened);
  void accept(Listener& listener);
  // Whether this client may connect there.
  Result<void> let_in(const Listener& listener, const Peer& peer);
  // Whether another client can be taken to its end. A client that must be refused half-way for want of a
  // descriptor may hang for ever; one that waits in the listener's queue comes later.
  bool has_room() const;
  void accept_control();
  void open_connection(std::unique_ptr<Connection> connection, int fd, Stage stage, uid_t user);
  void leave_stage(const OpenConnection& connection);
  // What this user has.
  Usage usage_of(uid_t user);
  // Whether it may have so much more.
  Result<void> check_quota(uid_t user, const Usage& more);
  void set_deadline(Connection* connection);
  // A session is served for this connection, if it is one.
  void has_session(Connection* connection);
  // How many connections there are.
  std::size_t& in_stage(Stage stage) { return in_stage_[static_cast<std::size_t>(stage)]; }
  std::size_t in_stage(Stage stage) const { return in_stage_[static_cast<std::size_t>(stage)]; }
  bool is_open(Connection* connection, std::uint64_t serial) const;
  // After a failed accept: tries again later, since an event for it would come at once.
  void pause(int fd);
  // What arrived as a client's userfaultfd, if it is one.
  Result<Uffd> receive(UniqueFd fd) const;
  Result<AttachedSession> serve(Attachment attachment, const SessionInfo& info);
  // RESUME of a session that this manager serves; nothing if it does not.
  std::optional<Result<AttachedSession>> resume_own(int state_file, const Peer& peer, Connection* connection);
  // Whether this client may have the image of this name.
  Result<void> check_image(const Peer& peer, const std::string& image) const;
  // And of another's, once its image is open.
  Result<AttachedSession> take_up(UniqueFd uffd, UniqueFd process, SessionState state, uid_t uid, pid_t pid,
                                  std::shared_ptr<StoreLane> image, Connection* connection);
  // What of a manager's of before is used again.
  struct Inherited {
    std::map<std::size_t, Result<std::shared_ptr<StoreLane>>> images;
    std::map<std::size_t, std::shared_ptr<SharedImage>> memories;
  };
  Result<void> take_up(const Records::Session& session, Inherited& inherited);
  Result<void> take_up(const Records::Listener& listener, Inherited& inherited);
  // A connection that has sent a handshake, perhaps.
  void take_up(UniqueFd socket);
  Result<std::shared_ptr<StoreLane>> image_of(std::size_t record, Inherited& inherited);
  // Counts what was asked of the keeper, and was not yet done.
  void take_stops();
  void forget(const SessionStatus& session, SessionEnd end);
  // Of all sessions that forget() has not taken out yet.
  std::vector<SessionStatus> statuses();
  // What each user has, for status().
  nlohmann::json users();
  // Serves a session no longer whose client's connection has ended: the client keeps a descriptor of its own,
  // so it either wants no more, or finds its way back by RESUME.
  void leave(SessionId session);
  // Has `write` log something on the loop's thread. From workers.
  void post_log(EventLoop::Callback write);
  void watch_pending();
  void begin_end();
  void end_now();

  const ManagerOptions options_;
  std::vector<UniqueFd> inherited_connections_;
  Log log_{STDERR_FILENO};
  std::int64_t started_ns_ = monotonic_ns();
  std::uint32_t stops_ = 0;  // that were done of those that the keeper was asked for
  const OwnMemoryWay own_memory_way_ = own_memory_way(options_.system);
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<BlockingWork> work_;
  UniqueFd signals_;
  // Shared with threads that open an image still.
  const std::shared_ptr<ImageCatalog> images_ = std::make_shared<ImageCatalog>(
      options_.read_retries, options_.store_faults, options_.image_cache_bytes);
  std::map<std::string, Listener> listeners_;
  std::optional<ListeningSocket> control_;
  AccessRules rules_{::geteuid()};
  Quotas quotas_{options_.user_limits};
  Quotas refusals_logged_{{.requests_per_second = kRefusalsLoggedPerSecond}};
  std::map<uid_t, std::size_t> undecided_of_;
  Watchdog watchdog_{std::max<std::int64_t>(options_.watchdog_ms, 1) * 1'000'000};
  std::unordered_map<Connection*, OpenConnection> connections_;
  std::array<std::size_t, 3> in_stage_{};
  std::uint64_t last_serial_ = 0;
  std::vector<std::unique_ptr<Connection>> closed_;
  std::map<SessionId, SessionInfo> sessions_;
  std::uint64_t sessions_ended_ = 0;
  std::uint64_t clients_refused_ = 0;
  nlohmann::json ended_counters_ = nlohmann::json::object();
  std::mutex unheard_mutex_;
  std::map<SessionId, SessionStatus> unheard_;  // sessions whose end is on its way through the loop
  std::atomic<std::size_t> logs_queued_{0};
  std::function<void()> on_ending_;
  bool full_ = false;  // clients wait at the listeners
  bool ending_ = false;
  bool end_was_good_ = true;
  // Last: its workers call this object.
  std::unique_ptr<Engine> engine_;
};

// ---- start, end -------------------------------------------------------------------------------------------

Result<void> Manager::Impl::start() {
  Result<std::unique_ptr<EventLoop>> loop = EventLoop::create();
  if (!loop) return Failure(std::move(loop).error());
  loop_ = std::move(*loop);
  work_ = std::make_unique<BlockingWork>(*loop_);
  SessionId last_session = 0;
  if (options_.records != nullptr) {
    const Records::Shared& shared = options_.records->shared();
    last_session = shared.last_session;
    started_ns_ = shared.started_ns;
    sessions_ended_ = shared.sessions_ended;
    clients_refused_ = shared.clients_refused;
    std::size_t i = 0;
    ended_counters_ = counters_json({});
    for (auto& count : ended_counters_) count = shared.totals[i++].load();
  }
  Result<std::unique_ptr<Engine>> engine =
      Engine::create({.last_session = last_session,
                      .workers = options_.workers,
                      .spin_ns = options_.spin_ns,
                      .session = {.fault_around = options_.fault_around,
                                  .shared_fault_around = options_.shared_fault_around,
                                  .on_error = options_.on_error}},
                     *this);
  if (!engine) return Failure(std::move(engine).error());
  engine_ = std::move(*engine);
  return {};
}

Result<void> Manager::Impl::stop_at_signals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  if (options_.records != nullptr) {
    ::sigaddset(&signals, Keeper::stop_signal());
  } else {
    ::sigaddset(&signals, SIGTERM);
    ::sigaddset(&signals, SIGINT);
  }
  signals_.reset(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals_) return Failure(Error::from_errno("wait for signals", errno));
  return loop_->add(signals_.get(), EPOLLIN, [this] {
    signalfd_siginfo signal;
    while (::read(signals_.get(), &signal, sizeof signal) == sizeof signal)
      options_.records == nullptr ? stop() : take_stops();
  });
}

void Manager::Impl::take_stops() {
  const std::uint32_t stops = options_.records->shared().stops;
  for (; stops_ != stops; ++stops_) stop();
}

bool Manager::Impl::run() {
  if (options_.watchdog_ms > 0) watch_pending();
  loop_->run();
  return end_was_good_;
}

void Manager::Impl::stop() {
  loop_->post([this] { ending_ ? end_now() : begin_end(); });
}

void Manager::Impl::begin_end() {
  ending_ = true;
  if (on_ending_) on_ending_();
  for (auto& [path, listener] : listeners_) {
    loop_->remove(listener.socket.fd());
    if (options_.records != nullptr) options_.records->remove_listener(listener.socket.fd());
  }
  listeners_.clear();
  if (sessions_.empty()) return loop_->stop();
  log_.write(fmt::format("ending: {} sessions to complete or to leave to a successor", sessions_.size()));
  const Engine::Done ignored = [](const Result<void>&) {};
  for (const auto& [id, info] : sessions_) {
    if (info.keeps_descriptor) {
      engine_->abandon(id, ignored);
    } else {
      engine_->begin_detach(id, Unreadable::poison, ignored);
    }
  }
  loop_->after(options_.drain_ms, [this] { end_now(); });
}

void Manager::Impl::end_now() {
  // Closing the descriptor under a client would make it hang, or read zeros.
  for (const auto& [id, info] : sessions_)
    engine_->kill(id, "the manager ends before the client's memory is complete", [](const Result<void>&) {});
}

// ---- sockets ----------------------------------------------------------------------------------------------

Result<Manager::Impl::Opened> Manager::Impl::open(ImageCatalog& images, control::ListenKind kind,
                                                  const std::string& path, const std::string& image) {
  std::shared_ptr<StoreLane> store;
  if (kind == control::ListenKind::firecracker) {
    auto opened = images.open_path(image);
    if (!opened) return Failure(std::move(opened).error());
    store = std::move(*opened);
  }
  Result<ListeningSocket> socket = ListeningSocket::open(path);
  if (!socket) return Failure(std::move(socket).error());
  return Opened{.socket = std::move(*socket), .store = std::move(store)};
}

Result<void> Manager::Impl::check_free(const std::string& path) const {
  if (ending_) return Failure(Error("the manager is ending", ESHUTDOWN));
  if (!listeners_.contains(path) && !(control_ && control_->path() == path)) return {};
  return Failure(Error(fmt::format("{} is listened at already", path), EADDRINUSE)
                     .with_remedy("choose another socket, or remove that one first"));
}

Result<void> Manager::Impl::add_listener(control::ListenKind kind, const std::string& path,
                                         const std::string& image, std::vector<Subject> allowed,
                                         Opened opened) {
  const int fd = opened.socket.fd();
  Listener& listener = listeners_
                           .emplace(path, Listener{.socket = std::move(opened.socket),
                                                   .kind = kind,
                                                   .image = image,
                                                   .store = std::move(opened.store),
                                                   .allowed = std::move(allowed)})
                           .first->second;
  Result<void> done;
  if (options_.records != nullptr)
    done = options_.records->add({.kind = recorded_kind(kind),
                                  .socket = fd,
                                  .device = listener.socket.device(),
                                  .inode = listener.socket.inode(),
                                  .path = path,
                                  .allow = to_string(listener.allowed)},
                                 listener.store);
  if (done) done = loop_->add(fd, EPOLLIN, [this, &listener] { accept(listener); });
  if (!done) {
    if (options_.records != nullptr) options_.records->remove_listener(fd);
    listeners_.erase(path);
  }
  return done;
}

Result<void> Manager::Impl::listen(control::ListenKind kind, const std::string& path,
                                   const std::string& image) {
  if (auto free = check_free(path); !free) return free;
  Result<Opened> opened = open(*images_, kind, path, image);
  if (!opened) return Failure(std::move(opened).error());
  return add_listener(kind, path, image, {}, std::move(*opened));
}

void Manager::Impl::add_listener(const control::ListenAdd& request, Connection* connection,
                                 Engine::Done done) {
  const Engine::Done answer = on_loop(connection, std::move(done));
  if (auto free = check_free(request.socket); !free) return answer(std::move(free));
  Result<std::vector<Subject>> allowed = std::vector<Subject>();
  // Names are for whoever asks to look up: that may need files and libraries which are not ours any more.
  if (!request.allow.empty()) allowed = parse_subjects(request.allow, Names::refuse);
  if (!allowed) return answer(Failure(std::move(allowed).error()));
  work_->run("listen " + request.socket, [this, images = images_, request, answer, allowed = *allowed] {
    auto opened =
        std::make_shared<Result<Opened>>(open(*images, request.kind, request.socket, request.image));
    return [this, request, answer, allowed, opened] {
      if (!*opened) return answer(Failure(opened->error()));
      if (auto free = check_free(request.socket); !free) return answer(std::move(free));
      answer(add_listener(request.kind, request.socket, request.image, allowed, std::move(**opened)));
    };
  });
}

Result<void> Manager::Impl::check_image(const Peer& peer, const std::string& image) const {
  if (rules_.may_have(peer, image)) return {};
  return Failure(Error(fmt::format("user {} may not have the image {}", peer.uid, image), EPERM)
                     .with_remedy("have the manager run with a rule for it: --allow WHO=IMAGES"));
}

void Manager::Impl::open_image(const std::string& name, const Peer& peer, Connection* connection,
                               ImageOpened opened) {
  OpenConnection& entry = connections_.at(connection);
  if (auto allowed = check_image(peer, name); !allowed)
    return on_loop(connection,
                   [opened, error = allowed.error()](const Result<void>&) { opened(Failure(error)); })({});
  // What waits for the image belongs to the connection, and goes with it: a userfaultfd, for one.
  entry.opened = std::move(opened);
  entry.opening =
      work_->run("image " + name, [this, images = images_, name, connection, serial = entry.serial] {
        return [this, connection, serial, image = images->open(name)] {
          if (!is_open(connection, serial)) return;
          const ImageOpened wanted = std::exchange(connections_.at(connection).opened, nullptr);
          wanted(image);
        };
      });
}

Result<void> Manager::Impl::remove_listener(const std::string& path) {
  const auto found = listeners_.find(path);
  if (found == listeners_.end())
    return Failure(Error(fmt::format("nothing is listened at {}", path), ENOENT)
                       .with_remedy("'uffdkit listen list' shows the sockets"));
  loop_->remove(found->second.socket.fd());
  if (options_.records != nullptr) options_.records->remove_listener(found->second.socket.fd());
  listeners_.erase(found);
  return {};
}

Result<void> Manager::Impl::listen_control(const std::string& path) {
  Result<ListeningSocket> socket = ListeningSocket::open(path);
  if (!socket) return Failure(std::move(socket).error());
  control_ = std::move(*socket);
  if (options_.records != nullptr)
    if (auto added = options_.records->add({.kind = ListenerKind::control,
                                            .socket = control_->fd(),
                                            .device = control_->device(),
                                            .inode = control_->inode(),
                                            .path = path},
                                           nullptr);
        !added)
      return added;
  return loop_->add(control_->fd(), EPOLLIN, [this] { accept_control(); });
}

std::string Manager::Impl::listening() const {
  std::string text;
  for (const auto& [path, listener] : listeners_)
    text += fmt::format(" {}={}", control::to_string(listener.kind), path);
  if (control_) text += " control=" + control_->path();
  return text;
}

void Manager::Impl::pause(int fd) {
  loop_->change(fd, 0);
  loop_->after(kAcceptPauseMs, [this, fd] {
    const auto still_there = std::any_of(listeners_.begin(), listeners_.end(),
                                         [&](const auto& entry) { return entry.second.socket.fd() == fd; });
    if (still_there || (control_ && control_->fd() == fd)) loop_->change(fd, EPOLLIN);
  });
}

Result<void> Manager::Impl::let_in(const Listener& listener, const Peer& peer) {
  if (auto granted = take_request(peer); !granted) return granted;
  const auto undecided = undecided_of_.find(peer.uid);
  if (undecided != undecided_of_.end() && undecided->second >= kUndecidedOfUserMax)
    return Failure(Error(fmt::format("user {} has {} connections that have not said what they want", peer.uid,
                                     undecided->second),
                         ENOSPC)
                       .with_remedy("say what is wanted, or connect later"));
  if (listener.kind == control::ListenKind::native) {
    if (rules_.may_have_some(peer)) return {};
    return Failure(Error(fmt::format("user {} may have no image of this manager", peer.uid), EPERM)
                       .with_remedy("have it run with a rule for the user: --allow WHO=IMAGES"));
  }
  if (has_peer(listener.allowed, peer)) return {};
  return check_image(peer, listener.image);
}

bool Manager::Impl::has_room() const {
  if (in_stage(Stage::undecided) >= kUndecidedMax) return false;
  rlimit limit;
  if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) return true;
  return kOwnDescriptors + kListenerDescriptors * listeners_.size() + kSessionDescriptors * sessions_.size() +
             kConnectionDescriptors * connections_.size() +
             kClientDescriptors * (in_stage(Stage::undecided) + closed_.size() + 1) <=
         limit.rlim_cur;
}

void Manager::Impl::accept(Listener& listener) {
  while (has_room()) {
    full_ = false;
    Accepted accepted = listener.socket.accept();
    if (!accepted.socket) {
      if (accepted.os_error == 0) return;
      log_.write(Error::from_errno("accept at " + listener.socket.path(), accepted.os_error).text());
      return pause(listener.socket.fd());
    }
    Result<Peer> peer = peer_of(accepted.socket.get());
    if (!peer) {
      log_.write(fmt::format("refused: {}: {}", listener.socket.path(), peer.error().text()));
      ++clients_refused_;
      continue;
    }
    const int fd = accepted.socket.get();
    if (auto allowed = let_in(listener, *peer); !allowed) {
      refused(peer->uid,
              fmt::format("{}: client pid {} uid {}", listener.socket.path(), peer->pid, peer->uid),
              allowed.error());
      turn_away(fd, listener.kind, allowed.error());
      continue;
    }
    const uid_t user = peer->uid;
    std::unique_ptr<Connection> connection;
    if (listener.kind == control::ListenKind::firecracker) {
      connection = std::make_unique<FirecrackerConnection>(std::move(accepted.socket), std::move(*peer),
                                                           listener.socket.path(), listener.store, *this);
    } else {
      connection = std::make_unique<NativeConnection>(std::move(accepted.socket), std::move(*peer),
                                                      listener.socket.path(), *this);
    }
    open_connection(std::move(connection), fd, Stage::undecided, user);
  }
  if (!std::exchange(full_, true))
    log_.write(
        "there are no descriptors for more clients, which wait; raise the limit on open files "
        "(LimitNOFILE=)");
  pause(listener.socket.fd());
}

void Manager::Impl::accept_control() {
  while (in_stage(Stage::control) < kControlMax) {
    Accepted accepted = control_->accept();
    if (!accepted.socket) {
      if (accepted.os_error == 0) return;
      break;
    }
    const int fd = accepted.socket.get();
    const Result<Peer> peer = peer_of(fd);
    if (!peer) continue;
    if (!rules_.may_control(*peer)) {
      const Error error = Error(fmt::format("user {} may not control this manager", peer->uid), EPERM)
                              .with_remedy("have it run with --allow-control WHO");
      refused(peer->uid, fmt::format("{}: client pid {} uid {}", control_->path(), peer->pid, peer->uid),
              error);
      const std::string answer = control::encode_error(error);
      (void)send_some(fd, std::as_bytes(std::span(answer)), {});
      continue;
    }
    open_connection(std::make_unique<ControlConnection>(std::move(accepted.socket), *this), fd,
                    Stage::control, peer->uid);
  }
  pause(control_->fd());
}

// ---- connections ------------------------------------------------------------------------------------------

void Manager::Impl::open_connection(std::unique_ptr<Connection> connection, int fd, Stage stage, uid_t user) {
  Connection* key = connection.get();
  auto watched = loop_->add(fd, key->events(), [key] { key->ready(); });
  if (!watched) return log_.write(watched.error().text());
  connections_.emplace(key, OpenConnection{.connection = std::move(connection),
                                           .fd = fd,
                                           .serial = ++last_serial_,
                                           .stage = stage,
                                           .user = user,
                                           .deadline = 0});
  ++in_stage(stage);
  if (stage == Stage::undecided) ++undecided_of_[user];
  if (stage == Stage::undecided) set_deadline(key);
  key->ready();
}

void Manager::Impl::leave_stage(const OpenConnection& connection) {
  --in_stage(connection.stage);
  if (connection.stage != Stage::undecided) return;
  const auto found = undecided_of_.find(connection.user);
  if (--found->second == 0) undecided_of_.erase(found);
}

void Manager::Impl::set_deadline(Connection* connection) {
  connections_.at(connection).deadline = loop_->after(options_.handshake_ms, [this, connection] {
    // It may not be the client who is late.
    if (connection->is_waiting()) return set_deadline(connection);
    OpenConnection& entry = connections_.at(connection);
    entry.deadline = 0;
    refused(
        entry.user, connection->who(),
        Error(fmt::format("it did not say within {} ms what it wants", options_.handshake_ms), ETIMEDOUT));
    close(*connection, entry.fd);
  });
}

void Manager::Impl::has_session(Connection* connection) {
  if (connection == nullptr) return;
  OpenConnection& entry = connections_.at(connection);
  if (entry.stage != Stage::undecided) return;
  leave_stage(entry);
  entry.stage = Stage::decided;
  ++in_stage(entry.stage);
  loop_->cancel(std::exchange(entry.deadline, 0));
}

void Manager::Impl::want(Connection& connection, int fd, bool read, bool write) {
  if (!connections_.contains(&connection)) return;
  loop_->change(fd, (read ? EPOLLIN : 0u) | (write ? EPOLLOUT : 0u));
}

void Manager::Impl::close(Connection& connection, int fd) {
  const auto found = connections_.find(&connection);
  if (found == connections_.end()) return;
  loop_->remove(fd);
  if (found->second.deadline != 0) loop_->cancel(found->second.deadline);
  leave_stage(found->second);
  work_->forget(found->second.opening);
  for (auto& [id, info] : sessions_) {
    if (info.connection != &connection) continue;
    info.connection = nullptr;
    loop_->after(kResumeMs, [this, session = id] { leave(session); });
  }
  // It may be running now: it goes when it has returned.
  closed_.push_back(std::move(found->second.connection));
  connections_.erase(found);
  loop_->post([this] { closed_.clear(); });
}

bool Manager::Impl::is_open(Connection* connection, std::uint64_t serial) const {
  const auto found = connections_.find(connection);
  return found != connections_.end() && found->second.serial == serial;
}

Engine::Done Manager::Impl::on_loop(Connection* connection, Engine::Done done) {
  const std::uint64_t serial = connections_.at(connection).serial;
  return [this, connection, serial, done = std::move(done)](Result<void> result) {
    loop_->post([this, connection, serial, done, result = std::move(result)] {
      if (is_open(connection, serial)) done(result);
    });
  };
}

void Manager::Impl::resume_client(SessionId session, Connection* connection, Engine::Done done) {
  log_.write(fmt::format("session {}: its client is to go on", session));
  engine_->resume(session, on_loop(connection, std::move(done)));
}

void Manager::Impl::leave(SessionId session) {
  const auto found = sessions_.find(session);
  if (found == sessions_.end() || found->second.connection != nullptr || found->second.leaving) return;
  found->second.leaving = true;
  engine_->abandon(session, [](const Result<void>&) {});
}

void Manager::Impl::refused(uid_t user, const std::string& who, const Error& error) {
  ++clients_refused_;
  if (options_.records != nullptr) options_.records->shared().clients_refused = clients_refused_;
  if (refusals_logged_.take_request(user, monotonic_ns()))
    log_.write(fmt::format("refused: {}: {}", who, error.text()));
}

Usage Manager::Impl::usage_of(uid_t user) {
  Usage usage;
  for (const auto& [id, info] : sessions_) {
    if (info.uid != user) continue;
    const std::optional<SessionStatus> status = engine_->session(id);
    if (status) usage += {.sessions = 1, .regions = status->regions, .memory_bytes = status->memory_bytes};
  }
  return usage;
}

Result<void> Manager::Impl::check_quota(uid_t user, const Usage& more) {
  if (!quotas_.limits_usage()) return {};
  return quotas_.check(user, usage_of(user), more);
}

Result<void> Manager::Impl::may_add(const Peer& peer, std::span<const RequestedRegion> regions) {
  Usage more{.regions = regions.size()};
  for (const RequestedRegion& region : regions) more.memory_bytes += region.memory.length.value;
  return check_quota(peer.uid, more);
}

Engine::Done Manager::Impl::count_until_added(const Peer& peer, const RequestedRegion& region,
                                              Engine::Done done) {
  if (!quotas_.limits_usage()) return done;
  const Usage more{.regions = 1, .memory_bytes = region.memory.length.value};
  quotas_.reserve(peer.uid, more);
  return [this, user = peer.uid, more, done = std::move(done)](Result<void> result) {
    loop_->post([this, user, more] { quotas_.release(user, more); });
    done(std::move(result));
  };
}

void Manager::Impl::acknowledged(SessionId session) {
  if (options_.records != nullptr) options_.records->acknowledge(session);
}

// ---- sessions ---------------------------------------------------------------------------------------------

Result<AttachedSession> Manager::Impl::serve(Attachment attachment, const SessionInfo& info) {
  const ByteCount image_size = attachment.lane->store()->size();
  SessionId recorded = 0;
  if (options_.records != nullptr) {
    const auto memory = attachment.regions.empty() ? nullptr : attachment.regions.front().sharing.image;
    attachment.begins = [&, memory,
                         record =
                             Records::Session{.kind = info.kind,
                                              .pid = info.pid,
                                              .uid = info.uid,
                                              .uffd = attachment.uffd.fd(),
                                              .state_file = attachment.state.fd(),
                                              .process = attachment.process ? attachment.process->get() : -1,
                                              .connection = info.cookie,
                                              .shares = memory != nullptr}](SessionId session) mutable {
      record.id = recorded = session;
      return options_.records->add(record, info.lane, memory);
    };
  }
  Result<SessionId> id = engine_->attach(std::move(attachment));
  if (!id) {
    if (recorded != 0) options_.records->remove(recorded);
    return Failure(std::move(id).error());
  }
  // Before anything of the session's end can be heard, which comes through the loop.
  sessions_.emplace(*id, info);
  has_session(info.connection);
  Result<UniqueFd> state_file = engine_->state_file(*id);
  if (!state_file && info.keeps_descriptor) {
    // Not released: a client that comes back may have memory that it has not got yet, which must not read as
    // zeros.
    sessions_.at(*id).connection = nullptr;
    leave(*id);
    return Failure(std::move(state_file).error());
  }
  const std::optional<SessionStatus> status = engine_->session(*id);
  log_.write(fmt::format("session {}: pid {} uid {}, {} bytes from {}", *id, info.pid, info.uid,
                         status ? status->memory_bytes : 0, info.image));
  return AttachedSession{.id = *id,
                         .image_size = image_size,
                         .regions = status ? static_cast<std::uint32_t>(status->regions) : 0,
                         .state_file = state_file ? std::move(*state_file) : UniqueFd(),
                         .image = info.lane};
}

Result<Uffd> Manager::Impl::receive(UniqueFd fd) const {
  Result<Uffd> uffd = Uffd::receive(fd.release(), options_.system);
  if (uffd && is_of_own_memory(*uffd, own_memory_way_))
    return Failure(Error("received descriptor: the userfaultfd is one of the manager's own memory", EBADF)
                       .with_remedy("hand over one that the client itself has created"));
  return uffd;
}

Result<AttachedSession> Manager::Impl::attach(NewSession session, std::shared_ptr<StoreLane> image,
                                              Connection* connection) {
  if (ending_) return Failure(Error("the manager is ending", ESHUTDOWN).with_remedy("connect again"));
  if (auto valid = validate(session.request.regions, image->store()->size()); !valid)
    return Failure(std::move(valid).error());
  Usage more{.sessions = 1, .regions = session.request.regions.size()};
  for (const RequestedRegion& region : session.request.regions)
    more.memory_bytes += region.memory.length.value;
  if (auto granted = check_quota(session.peer->uid, more); !granted)
    return Failure(std::move(granted).error());
  if (!session.peer->pidfd)
    return Failure(
        Error("the client's process cannot be watched", ESRCH)
            .with_remedy("use Linux 6.5 or newer, or run client and manager in one pid namespace"));
  Result<Uffd> uffd = receive(std::move(session.uffd));
  if (!uffd) return Failure(std::move(uffd).error());
  Result<SessionState> state = SessionState::create(session.request.image);
  if (!state) return Failure(std::move(state).error());
  const std::optional<FileIdentity> state_file = identity_of(state->fd());
  std::vector<RegionSpec> regions;
  for (const RequestedRegion& region : session.request.regions)
    regions.push_back({.memory = region.memory,
                       .offset = region.offset,
                       .page_size = region.page_size,
                       .sharing = session.sharing});
  UniqueFd process(::fcntl(session.peer->pidfd.get(), F_DUPFD_CLOEXEC, 0));
  if (!process) return Failure(Error::from_errno("duplicate the client's pidfd", errno));
  return serve({.uffd = std::move(*uffd),
                .state = std::move(*state),
                .regions = std::move(regions),
                .lane = image,
                .process = std::move(process)},
               {.kind = session.keeps_descriptor ? SessionKind::native : SessionKind::firecracker,
                .keeps_descriptor = session.keeps_descriptor,
                .pid = session.peer->pid,
                .uid = session.peer->uid,
                .image = session.request.image,
                .lane = image,
                .state_file = state_file,
                .connection = connection,
                .cookie = session.connection});
}

void Manager::Impl::resume(UniqueFd uffd_fd, UniqueFd state_fd, const Peer& peer, Connection* connection,
                           Attached attached) {
  const auto answer = [&](Result<AttachedSession> result) {
    const auto kept = std::make_shared<Result<AttachedSession>>(std::move(result));
    on_loop(connection, [kept, attached](const Result<void>&) { attached(std::move(*kept)); })({});
  };
  if (ending_) return answer(Failure(Error("the manager is ending", ESHUTDOWN).with_remedy("connect again")));
  if (auto own = resume_own(state_fd.get(), peer, connection)) return answer(*std::move(own));
  if (!peer.pidfd) return answer(Failure(Error("the client's process cannot be watched", ESRCH)));
  UniqueFd process(::fcntl(peer.pidfd.get(), F_DUPFD_CLOEXEC, 0));
  if (!process) return answer(Failure(Error::from_errno("duplicate the client's pidfd", errno)));
  Result<SessionState> state = SessionState::open(std::move(state_fd));
  if (!state) return answer(Failure(Error(state.error().text(), EBADF)));

  struct Request {
    UniqueFd uffd;
    UniqueFd process;
    SessionState state;
    const Peer& peer;  // of the connection, which is there as long as somebody waits for this
  };
  const std::string name = state->image();
  const auto kept = std::make_shared<Request>(Request{
      .uffd = std::move(uffd_fd), .process = std::move(process), .state = std::move(*state), .peer = peer});
  open_image(name, peer, connection, [=, this](Result<std::shared_ptr<StoreLane>> image) {
    if (!image) return attached(Failure(std::move(image).error()));
    if (ending_)
      return attached(Failure(Error("the manager is ending", ESHUTDOWN).with_remedy("connect again")));
    // Somebody else may have taken it up meanwhile.
    if (auto own = resume_own(kept->state.fd(), kept->peer, connection)) return attached(*std::move(own));
    attached(take_up(std::move(kept->uffd), std::move(kept->process), std::move(kept->state), kept->peer.uid,
                     kept->peer.pid, std::move(*image), connection));
  });
}

std::optional<Result<AttachedSession>> Manager::Impl::resume_own(int state_file, const Peer& peer,
                                                                 Connection* connection) {
  // By the file, and not by its number: it may be another manager's number for it, of before a RESUME whose
  // answer did not arrive. Two that serve the same memory would spoil it.
  const auto found = std::ranges::find_if(sessions_, [&](const auto& entry) {
    const std::optional<FileIdentity>& own = entry.second.state_file;
    return own && own == identity_of(state_file);
  });
  if (found == sessions_.end()) return std::nullopt;
  SessionInfo& info = found->second;
  const SessionId id = found->first;
  if (auto allowed = check_image(peer, info.image); !allowed) return Failure(std::move(allowed).error());
  if (info.leaving) return Failure(Error(fmt::format("session {} is being closed", id), EBUSY));
  if (info.connection != nullptr)
    return Failure(Error(fmt::format("session {} is served on another connection", id), EBUSY)
                       .with_remedy("close that connection first"));
  const std::optional<SessionStatus> status = engine_->session(id);
  if (!status) return Failure(Error(fmt::format("session {} has ended", id), ESRCH));
  Result<UniqueFd> own = engine_->state_file(id);
  if (!own) return Failure(std::move(own).error());
  info.connection = connection;
  has_session(connection);
  return AttachedSession{.id = id,
                         .image_size = info.lane->store()->size(),
                         .regions = static_cast<std::uint32_t>(status->regions),
                         .state_file = std::move(*own),
                         .image = info.lane};
}

Result<AttachedSession> Manager::Impl::take_up(UniqueFd uffd_fd, UniqueFd process, SessionState state,
                                               uid_t uid, pid_t pid, std::shared_ptr<StoreLane> image,
                                               Connection* connection) {
  Result<Uffd> uffd = receive(std::move(uffd_fd));
  if (!uffd) return Failure(Error(uffd.error().text(), EBADF));
  Usage more{.sessions = 1};
  for (const RegionRecord& region : state.regions()) more.regions += region.live ? 1 : 0;
  for (const Segment& segment : state.layout().segments()) more.memory_bytes += segment.memory.length.value;
  if (auto granted = check_quota(uid, more); !granted) return Failure(std::move(granted).error());
  const ByteCount image_size = image->store()->size();
  for (const RegionRecord& region : state.regions())
    if (region.live && (region.offset.value > image_size.value ||
                        region.length.value > image_size.value - region.offset.value))
      return Failure(Error(fmt::format("the image {} has {} bytes now, less than the session's regions need",
                                       state.image(), image_size.value),
                           ESTALE));
  const std::string name = state.image();
  const std::optional<FileIdentity> state_file = identity_of(state.fd());
  return serve({.uffd = std::move(*uffd),
                .state = std::move(state),
                .regions = {},
                .lane = image,
                .process = std::move(process)},
               {.kind = SessionKind::native,
                .keeps_descriptor = true,
                .pid = pid,
                .uid = uid,
                .image = name,
                .lane = image,
                .state_file = state_file,
                .connection = connection});
}

// ---- taking up --------------------------------------------------------------------------------------------

Result<void> Manager::Impl::take_up() {
  Records& records = *options_.records;
  Inherited inherited;
  std::size_t sessions = 0;
  for (const Records::Session& session : records.sessions()) {
    const UniqueFd process(session.process < 0 ? -1 : ::fcntl(session.process, F_DUPFD_CLOEXEC, 0));
    if (auto taken = take_up(session, inherited); taken) {
      ++sessions;
    } else {
      // Without its descriptors it would read zeros in the place of what is missing.
      log_.write(fmt::format("session {} cannot be taken up: {}", session.id, taken.error().text()));
      records.give_up(session);
      if (process) (void)::syscall(SYS_pidfd_send_signal, process.get(), SIGKILL, nullptr, 0);
    }
  }
  for (const Records::Listener& listener : records.listeners())
    if (auto taken = take_up(listener, inherited); !taken)
      log_.write(fmt::format("{} is listened at no more: {}", listener.path, taken.error().text()));
  for (const auto& [record, lane] : inherited.images)
    if (lane) records.release_image(lane->get());
  for (UniqueFd& socket : std::exchange(inherited_connections_, {})) take_up(std::move(socket));
  const int signal = records.shared().death_signal;
  log_.write(fmt::format("the worker before has ended{}; process {} goes on with {} sessions",
                         signal == 0 ? "" : fmt::format(" by signal {}", signal), ::getpid(), sessions));
  take_stops();
  return {};
}

Result<std::shared_ptr<StoreLane>> Manager::Impl::image_of(std::size_t record, Inherited& inherited) {
  if (const auto known = inherited.images.find(record); known != inherited.images.end()) return known->second;
  const Records::Image image = options_.records->image(record);
  Result<std::shared_ptr<StoreLane>> lane = images_->take_up(UniqueFd(image.file), image.name);
  if (lane) options_.records->hold_image(record, lane->get());
  return inherited.images.emplace(record, std::move(lane)).first->second;
}

Result<void> Manager::Impl::take_up(const Records::Session& session, Inherited& inherited) {
  Records& records = *options_.records;
  Result<std::shared_ptr<StoreLane>> lane = image_of(session.image, inherited);
  if (!lane) return Failure(lane.error());
  std::shared_ptr<SharedImage> memory;
  if (session.shares) {
    memory = inherited.memories[session.image];
    const Records::Image image = records.image(session.image);
    if (!memory) {
      auto taken = images_->take_up_memory(*lane, UniqueFd(image.memory), UniqueFd(image.filled));
      if (!taken) return Failure(std::move(taken).error());
      memory = inherited.memories[session.image] = std::move(*taken);
    }
  }
  Result<SessionState> state = SessionState::open(UniqueFd(session.state_file));
  if (!state) return Failure(std::move(state).error());
  Result<Uffd> uffd = Uffd::receive(session.uffd, options_.system);
  if (!uffd) return Failure(std::move(uffd).error());
  std::optional<UniqueFd> process;
  if (session.process >= 0) process.emplace(session.process);
  const SessionInfo info{.kind = session.kind,
                         .keeps_descriptor = session.kind == SessionKind::native,
                         .pid = session.pid,
                         .uid = session.uid,
                         .image = state->image(),
                         .lane = *lane,
                         .state_file = identity_of(state->fd()),
                         .connection = nullptr};
  // Before it is run, which may end it at once.
  records.taken_up(session, *lane, memory);
  sessions_.emplace(session.id, info);
  Result<SessionId> id = engine_->attach({
      .uffd = std::move(*uffd),
      .state = std::move(*state),
      .regions = {},
      .lane = *lane,
      .process = std::move(process),
      .id = session.id,
      .parent = session.parent,
      .shared = std::move(memory),
      .begins = nullptr,
      .may_adopt = [&](int fd) { return is_userfaultfd(fd) && !records.has_uffd(fd); },
  });
  if (!id) {
    sessions_.erase(session.id);
    records.remove(session.id);
    return Failure(std::move(id).error());
  }
  // A native client comes back by itself; its connection went with the worker.
  if (info.keeps_descriptor) loop_->after(kResumeMs, [this, own = *id] { leave(own); });
  return {};
}

Result<void> Manager::Impl::take_up(const Records::Listener& listener, Inherited& inherited) {
  ListeningSocket socket =
      ListeningSocket::take_up(UniqueFd(listener.socket), listener.path, listener.device, listener.inode);
  if (listener.kind == ListenerKind::control) {
    options_.records->taken_up(listener, nullptr);
    control_ = std::move(socket);
    return loop_->add(control_->fd(), EPOLLIN, [this] { accept_control(); });
  }
  const bool firecracker = listener.kind == ListenerKind::firecracker;
  std::shared_ptr<StoreLane> store;
  if (firecracker) {
    Result<std::shared_ptr<StoreLane>> lane = image_of(listener.image, inherited);
    if (!lane) return Failure(lane.error());
    store = *lane;
  }
  std::vector<Subject> allowed;
  if (!listener.allow.empty()) {
    Result<std::vector<Subject>> subjects = parse_subjects(listener.allow, Names::refuse);
    if (!subjects) return Failure(std::move(subjects).error());
    allowed = std::move(*subjects);
  }
  options_.records->taken_up(listener, store);
  const int fd = socket.fd();
  Listener& own = listeners_
                      .emplace(listener.path, Listener{.socket = std::move(socket),
                                                       .kind = firecracker ? control::ListenKind::firecracker
                                                                           : control::ListenKind::native,
                                                       .image = store ? store->store()->name() : "",
                                                       .store = store,
                                                       .allowed = std::move(allowed)})
                      .first->second;
  return loop_->add(fd, EPOLLIN, [this, &own] { accept(own); });
}

void Manager::Impl::take_up(UniqueFd socket) {
  const auto listener = listeners_.find(accepted_at(socket.get()));
  if (listener == listeners_.end() || listener->second.kind != control::ListenKind::firecracker) return;
  if (options_.records->has_connection(cookie_of(socket.get()))) {
    // Its session is served already.
    drop_peeked(socket.get(), SIZE_MAX);
    return;
  }
  Result<Peer> peer = peer_of(socket.get());
  if (!peer) return;  // its process has ended
  const int fd = socket.get();
  const uid_t user = peer->uid;
  if (auto allowed = let_in(listener->second, *peer); !allowed)
    return refused(user, fmt::format("{}: client pid {} uid {}", listener->first, peer->pid, user),
                   allowed.error());
  open_connection(std::make_unique<FirecrackerConnection>(std::move(socket), std::move(*peer),
                                                          listener->first, listener->second.store, *this),
                  fd, Stage::undecided, user);
}

// ---- ends -------------------------------------------------------------------------------------------------

void Manager::Impl::session_ended(const SessionStatus& session, SessionEnd end) {
  if (options_.records != nullptr) options_.records->remove(session.id);
  {
    const std::lock_guard lock(unheard_mutex_);
    unheard_.emplace(session.id, session);
  }
  loop_->post([this, session, end] { forget(session, end); });
}

void Manager::Impl::forget(const SessionStatus& session, SessionEnd end) {
  {
    const std::lock_guard lock(unheard_mutex_);
    unheard_.erase(session.id);
  }
  const auto found = sessions_.find(session.id);
  if (found == sessions_.end()) return;
  const SessionInfo info = found->second;
  sessions_.erase(found);
  ++sessions_ended_;
  const nlohmann::json counters = counters_json(session);
  add_counters(ended_counters_, counters);
  if (options_.records != nullptr) {
    Records::Shared& shared = options_.records->shared();
    shared.sessions_ended = sessions_ended_;
    std::size_t i = 0;
    for (const auto& count : counters) shared.totals[i++] += count.get<std::uint64_t>();
  }
  log_.write(
      fmt::format("session {}: {}; {} faults, {} pages copied, {} shared, {} zero, {} removed, {} failed",
                  session.id, to_string(end), session.faults, session.pages_copied, session.pages_shared,
                  session.pages_zeroed, session.pages_removed, session.pages_poisoned));
  if (end == SessionEnd::failed) end_was_good_ = end_was_good_ && !ending_;
  if (info.connection != nullptr) info.connection->session_ended(end);
  if (ending_ && sessions_.empty()) loop_->stop();
}

void Manager::Impl::session_forked(const SessionStatus& session, const SessionFiles& files) {
  if (options_.records != nullptr)
    if (auto added = options_.records->add_fork(session.parent, session.id, files.uffd, files.state_file);
        !added)
      warn(session.id, "it would be lost if this process ended: " + added.error().text());
  loop_->post([this, session] {
    const auto parent = sessions_.find(session.parent);
    // The parent may have ended meanwhile; the child knows no more of its process than its user then.
    SessionInfo info{.kind = SessionKind::fork,
                     .keeps_descriptor = false,
                     .pid = 0,
                     .uid = 0,
                     .image = session.image,
                     .lane = nullptr,
                     .state_file = std::nullopt,
                     .connection = nullptr};
    if (parent != sessions_.end()) info.uid = parent->second.uid;
    sessions_.emplace(session.id, info);
    log_.write(fmt::format("session {}: a child of session {}'s client, {} bytes from {}", session.id,
                           session.parent, session.memory_bytes, session.image));
    if (ending_) engine_->begin_detach(session.id, Unreadable::poison, [](const Result<void>&) {});
  });
}

void Manager::Impl::detach_failed(SessionId session, const Error& error) {
  loop_->post([this, session, error] {
    const auto found = sessions_.find(session);
    if (found != sessions_.end() && found->second.connection != nullptr)
      found->second.connection->detach_failed(error);
  });
}

void Manager::Impl::page_failed(SessionId session, const Error& error) {
  post_log([this, session, error] {
    const auto found = sessions_.find(session);
    if (found == sessions_.end() || ++found->second.page_errors > kPageErrorsLogged) return;
    log_.write(fmt::format(
        "session {}: {}; {}", session, error.text(),
        options_.on_error == OnError::poison ? "that page answers with SIGBUS" : "its client may not go on"));
    if (found->second.page_errors == kPageErrorsLogged)
      log_.write(fmt::format("session {}: further pages that fail are only counted", session));
  });
}

void Manager::Impl::warn(SessionId session, const std::string& text) {
  post_log([this, session, text] { log_.write(fmt::format("session {}: {}", session, text)); });
}

void Manager::Impl::post_log(EventLoop::Callback write) {
  // A log that nobody reads must not hold up a worker, nor fill the memory.
  if (logs_queued_.fetch_add(1) >= kLogsQueuedMax) {
    logs_queued_.fetch_sub(1);
    return;
  }
  loop_->post([this, write = std::move(write)] {
    logs_queued_.fetch_sub(1);
    write();
  });
}

void Manager::Impl::watch_pending() {
  for (const std::string& line : watchdog_.look(engine_->sessions(), monotonic_ns())) log_.write(line);
  const std::int64_t pause_ms =
      std::clamp<std::int64_t>(options_.watchdog_ms / kWatchdogLooks, 1, kWatchdogPauseMaxMs);
  loop_->after(pause_ms, [this] { watch_pending(); });
}

// ---- status -----------------------------------------------------------------------------------------------

nlohmann::json Manager::Impl::listeners() {
  nlohmann::json list = nlohmann::json::array();
  for (const auto& [path, listener] : listeners_) {
    nlohmann::json entry = {{"socket", path}, {"kind", control::to_string(listener.kind)}};
    if (!listener.image.empty()) entry["image"] = listener.image;
    if (!listener.allowed.empty()) entry["allow"] = to_string(listener.allowed);
    list.push_back(std::move(entry));
  }
  return list;
}

std::vector<SessionStatus> Manager::Impl::statuses() {
  std::vector<SessionStatus> statuses = engine_->sessions();
  // Those that have left the engine meanwhile are not among the ended ones yet.
  const std::lock_guard lock(unheard_mutex_);
  for (const auto& [id, status] : unheard_)
    if (std::ranges::find(statuses, id, &SessionStatus::id) == statuses.end()) statuses.push_back(status);
  return statuses;
}

nlohmann::json Manager::Impl::users() {
  struct User {
    Usage usage;
    std::uint64_t refused = 0;
  };
  std::map<uid_t, User> users;
  for (const SessionStatus& status : statuses()) {
    const auto found = sessions_.find(status.id);
    if (found != sessions_.end())
      users[found->second.uid].usage +=
          {.sessions = 1, .regions = status.regions, .memory_bytes = status.memory_bytes};
  }
  for (const auto& [user, times] : quotas_.refused()) users[user].refused = times;
  nlohmann::json list = nlohmann::json::array();
  for (const auto& [id, user] : users)
    list.push_back({{"uid", id},
                    {"sessions", user.usage.sessions},
                    {"regions", user.usage.regions},
                    {"memory_bytes", user.usage.memory_bytes},
                    {"refused_by_quota", user.refused}});
  return list;
}

nlohmann::json Manager::Impl::status() {
  nlohmann::json sessions = nlohmann::json::array();
  nlohmann::json total = ended_counters_;
  std::size_t bytes = 0;
  std::uint64_t left_out = 0;
  for (const SessionStatus& status : statuses()) {
    const auto found = sessions_.find(status.id);
    if (found == sessions_.end()) continue;
    const SessionInfo& info = found->second;
    nlohmann::json entry = counters_json(status);
    add_counters(total, entry);
    bytes += kSessionJsonBytes + kEscapedBytes * info.image.size();
    if (bytes > kSessionsJsonBytesMax) {
      ++left_out;
      continue;
    }
    entry["id"] = status.id;
    if (status.parent != 0) entry["parent"] = status.parent;
    entry["pid"] = info.pid;
    entry["uid"] = info.uid;
    entry["image"] = info.image;
    entry["kind"] = to_string(info.kind);
    entry["connected"] = info.connection != nullptr;
    entry["sharing"] = to_string(status.sharing);
    entry["memory_bytes"] = status.memory_bytes;
    entry["regions"] = status.regions;
    entry["pending"] = status.pending;
    entry["paused"] = status.paused;
    if (status.oldest_pending_ns > 0) {
      nlohmann::json oldest = {
          {"address", fmt::format("{:#x}", status.oldest_page)},
          {"why", to_string(status.oldest_why)},
          {"late", options_.watchdog_ms > 0 && status.oldest_pending_ns > options_.watchdog_ms * 1'000'000}};
      if (status.oldest_offset != SessionCounters::kNoOffset) oldest["offset"] = status.oldest_offset;
      oldest["text"] = describe_oldest(status);
      entry["oldest_pending"] = std::move(oldest);
    }
    entry["oldest_pending_us"] = status.oldest_pending_ns / 1000;
    sessions.push_back(std::move(entry));
  }
  nlohmann::json shared = nlohmann::json::array();
  for (const auto& image : images_->shared_memory())
    shared.push_back({{"image", image->lane()->store()->name()},
                      {"bytes", image->size().value},
                      {"filled_pages", image->filled_pages()}});
  nlohmann::json answer = {{"pid", ::getpid()}, {"worker", {{"pid", ::getpid()}}}};
  if (options_.records != nullptr) {
    const Records::Shared& kept = options_.records->shared();
    answer["pid"] = kept.keeper.load();
    answer["keeper"] = {{"pid", kept.keeper.load()}};
    answer["standby"] = {{"pid", kept.standby.load()}};
    answer["takeovers"] = kept.workers - 1;
    answer["upgrades"] = kept.upgrades.load();
  }
  answer.update({{"uptime_ms", (monotonic_ns() - started_ns_) / 1'000'000},
                 {"ending", ending_},
                 {"listeners", listeners()},
                 {"sessions", std::move(sessions)},
                 {"shared_images", std::move(shared)},
                 {"image_cache", cache_to_json(images_->cache())},
                 {"sessions_left_out", left_out},
                 {"late_faults", watchdog_.late_faults()},
                 {"sandbox", confinement()},
                 {"users", users()},
                 {"user_limits",
                  {{"sessions", options_.user_limits.sessions},
                   {"regions", options_.user_limits.regions},
                   {"memory_bytes", options_.user_limits.memory_bytes},
                   {"requests_per_second", options_.user_limits.requests_per_second}}},
                 {"sessions_ended", sessions_ended_},
                 {"clients_refused", clients_refused_},
                 {"total", std::move(total)}});
  return answer;
}

// ---- Manager ----------------------------------------------------------------------------------------------

Manager::Manager(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Manager::~Manager() = default;

Result<std::unique_ptr<Manager>> Manager::create(const ManagerOptions& options) {
  // Before anything is opened here: what is open now is a worker's of before.
  std::vector<UniqueFd> connections;
  if (options.records != nullptr && options.records->shared().is_ready != 0)
    connections = options.records->sweep();
  auto impl = std::make_unique<Impl>(options, std::move(connections));
  if (auto started = impl->start(); !started) return Failure(std::move(started).error());
  return std::unique_ptr<Manager>(new Manager(std::move(impl)));
}

Result<void> Manager::add_image(const std::string& name, const std::string& path) {
  return impl_->images().add(name, path);
}
Result<void> Manager::add_image_directory(const std::string& directory) {
  return impl_->images().add_directory(directory);
}
Result<void> Manager::allow(const std::string& rule) {
  return impl_->rules().allow(rule);
}
Result<void> Manager::allow_control(const std::string& who) {
  return impl_->rules().allow_control(who);
}
Result<void> Manager::listen_firecracker(const std::string& socket, const std::string& image) {
  return impl_->listen(control::ListenKind::firecracker, socket, image);
}
Result<void> Manager::listen_native(const std::string& socket) {
  return impl_->listen(control::ListenKind::native, socket, "");
}
Result<void> Manager::listen_control(const std::string& socket) {
  return impl_->listen_control(socket);
}
std::string Manager::listening() const {
  return impl_->listening();
}
Result<void> Manager::stop_at_signals() {
  return impl_->stop_at_signals();
}
Result<void> Manager::take_up() {
  return impl_->take_up();
}
void Manager::on_ending(std::function<void()> tell) {
  impl_->on_ending(std::move(tell));
}
bool Manager::run() {
  return impl_->run();
}
void Manager::stop() {
  impl_->stop();
}

}  // namespace uffdkit
