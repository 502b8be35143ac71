#include "manager/criu_daemon.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdio>
#include <map>
#include <optional>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "engine/engine.h"
#include "kernel/own_memory.h"
#include "manager/criu_image.h"
#include "manager/event_loop.h"
#include "wire/criu_protocol.h"
#include "wire/unix_socket.h"

namespace uffdkit {
namespace {

// Page errors that are logged; the rest is counted.
constexpr std::uint64_t kPageErrorsLogged = 10;
// Lines that workers have to say and that are not written yet; more are left out.
constexpr std::size_t kLogsQueuedMax = 1000;
// Without these, memory that a task gives back, moves or shares with a child is not followed.
constexpr Features kEventFeatures{abi::kFeatureEventFork | abi::kFeatureEventRemap |
                                  abi::kFeatureEventRemove | abi::kFeatureEventUnmap};

void log(const std::string& text) {
  fmt::print(stderr, "uffdkit: {}\n", text);
}

std::string_view to_string(SessionEnd end) {
  if (end == SessionEnd::detached) return "complete";
  return end == SessionEnd::failed ? "failed" : "its process is gone";
}

// criu replaces what is at the path, alive or not; a connection to find out would be taken for a restore.
Result<ListeningSocket> listen_in_place_of_others(const std::string& path) {
  struct stat info;
  if (::lstat(path.c_str(), &info) == 0 && S_ISSOCK(info.st_mode) && ::unlink(path.c_str()) != 0)
    return Failure(Error::from_errno("replace " + path, errno));
  return ListeningSocket::open(path);
}

}  // namespace

class CriuDaemon::Impl final : public EngineListener {
 public:
  Impl(CriuImage image, ListeningSocket listener, CriuDaemonOptions options)
      : image_(std::move(image)), listener_(std::move(listener)), options_(std::move(options)) {}

  Result<void> run();

  // EngineListener: from workers
  void session_ended(const SessionStatus& session, SessionEnd end) override;
  Result<SessionCounters*> session_forks(SessionId, SessionId, const SessionFiles&) override {
    return nullptr;
  }
  void session_forked(const SessionStatus& session) override;
  void detach_failed(SessionId, const Error&) override {}  // not asked for
  void page_failed(SessionId session, const Error& error) override;
  void warn(SessionId session, const std::string& text) override;

 private:
  Result<void> watch_signals();
  void signalled();
  void accept();
  void receive();
  void forget_restorer();
  void restorer_failed(Error error);
  Result<void> handle(criu::RestoreMessage message);
  Result<void> serve(criu::TaskRestored task);
  void complete_all();
  void end_with(Error error);
  void end_if_complete();
  std::string name_of(SessionId session) const;

  CriuImage image_;
  std::optional<ListeningSocket> listener_;
  const CriuDaemonOptions options_;
  const OwnMemoryWay own_memory_way_ = own_memory_way();

  std::unique_ptr<EventLoop> loop_;
  UniqueFd signals_;
  UniqueFd restorer_;
  criu::RestoreDecoder decoder_;
  bool restored_ = false;  // every task is in place
  std::map<SessionId, std::string> sessions_;
  std::uint64_t page_errors_ = 0;
  std::optional<Error> error_;
  std::atomic<std::size_t> logs_queued_{0};
  std::unique_ptr<Engine> engine_;  // goes first: its workers call us
};

Result<void> CriuDaemon::Impl::run() {
  if (!listener_) return Failure(Error("a daemon runs once", EINVAL));
  Result<std::unique_ptr<EventLoop>> loop = EventLoop::create();
  if (!loop) return Failure(std::move(loop).error());
  loop_ = std::move(*loop);
  if (auto watched = watch_signals(); !watched) return watched;
  Result<std::unique_ptr<Engine>> engine = Engine::create(
      {.workers = options_.workers, .session = {.fault_around = options_.fault_around}}, *this);
  if (!engine) return Failure(std::move(engine).error());
  engine_ = std::move(*engine);
  if (auto added = loop_->add(listener_->fd(), EPOLLIN, [this] { accept(); }); !added) return added;
  loop_->run();
  // A restorer that is still there is to see first that nobody serves it, then its tasks.
  restorer_.reset();
  engine_.reset();
  if (!error_ && page_errors_ > 0)
    error_ = Error(fmt::format("{} pages could not be read; they answer with SIGBUS", page_errors_), EIO);
  if (error_) return Failure(*error_);
  return {};
}

Result<void> CriuDaemon::Impl::watch_signals() {
  sigset_t signals;
  ::sigemptyset(&signals);
  ::sigaddset(&signals, SIGTERM);
  ::sigaddset(&signals, SIGINT);
  signals_.reset(::signalfd(-1, &signals, SFD_CLOEXEC | SFD_NONBLOCK));
  if (!signals_) return Failure(Error::from_errno("watch for signals", errno));
  return loop_->add(signals_.get(), EPOLLIN, [this] { signalled(); });
}

void CriuDaemon::Impl::signalled() {
  signalfd_siginfo info;
  if (::read(signals_.get(), &info, sizeof info) != sizeof info) return;
  // criu notices that nobody is there, and gives up.
  if (!restored_)
    return end_with(Error(fmt::format("ended by signal {}, before the restore was", info.ssi_signo)));
  log(fmt::format("signal {}: the memory of the tasks is completed first", info.ssi_signo));
}

void CriuDaemon::Impl::end_with(Error error) {
  if (!error_) error_ = std::move(error);
  loop_->stop();
}

// ---- the restorer -----------------------------------------------------------------------------------------

void CriuDaemon::Impl::accept() {
  if (!listener_) return;
  Accepted accepted = listener_->accept();
  if (!accepted.socket) {
    if (accepted.os_error != 0) end_with(Error::from_errno("accept the restorer", accepted.os_error));
    return;
  }
  restorer_ = std::move(accepted.socket);
  loop_->remove(listener_->fd());
  listener_.reset();
  if (auto added = loop_->add(restorer_.get(), EPOLLIN, [this] { receive(); }); !added)
    end_with(added.error());
}

void CriuDaemon::Impl::forget_restorer() {
  loop_->remove(restorer_.get());
  restorer_.reset();
}

void CriuDaemon::Impl::restorer_failed(Error error) {
  // Its tasks run already, and need us: only what it says is of no use any more.
  if (restored_) {
    log(error.text());
    return forget_restorer();
  }
  end_with(std::move(error));
}

void CriuDaemon::Impl::receive() {
  std::array<std::byte, 256> buffer;
  for (;;) {
    Result<Piece> piece = receive_some(restorer_.get(), buffer);
    if (!piece) return restorer_failed(std::move(piece).error().within("hear the restorer"));
    if (piece->bytes.empty() && !piece->end) return;
    const bool end = piece->end;
    Result<std::vector<criu::RestoreMessage>> messages = decoder_.feed(std::move(*piece));
    if (!messages) return restorer_failed(std::move(messages).error());
    for (criu::RestoreMessage& message : *messages)
      if (auto handled = handle(std::move(message)); !handled) return restorer_failed(handled.error());
    if (end) return forget_restorer();
  }
}

Result<void> CriuDaemon::Impl::handle(criu::RestoreMessage message) {
  if (auto* task = std::get_if<criu::TaskRestored>(&message)) return serve(std::move(*task));
  if (const auto* zombie = std::get_if<criu::ZombieRestored>(&message)) {
    log(fmt::format("task {}: a zombie", zombie->pid));
    return {};
  }
  log("every task is in place");
  restored_ = true;
  complete_all();
  end_if_complete();
  return {};
}

Result<void> CriuDaemon::Impl::serve(criu::TaskRestored task) {
  const std::string name = fmt::format("task {}", task.pid);
  Result<Uffd> uffd = Uffd::receive(task.uffd.release());
  if (!uffd) return Failure(std::move(uffd).error().within(name));
  if (is_of_own_memory(*uffd, own_memory_way_))
    return Failure(
        Error(fmt::format("{}: the userfaultfd is one of this process's own memory", name), EBADF));
  if (!uffd->features().has(kEventFeatures))
    log(fmt::format("{}: this kernel does not tell of {}; what the task does there is not followed", name,
                    to_string(kEventFeatures - uffd->features())));
  Result<TaskMemory> memory = image_.task(task.pid);
  if (!memory) return Failure(std::move(memory).error());
  Result<SessionState> state = SessionState::create(name);
  if (!state) return Failure(std::move(state).error().within(name));
  std::vector<RegionSpec> regions;
  for (const TaskRegion& region : memory->regions)
    regions.push_back({.memory = region.memory, .offset = region.offset});
  std::shared_ptr<StoreLane> lane;
  if (memory->store) {
    Result<std::shared_ptr<StoreLane>> made = StoreLane::create(memory->store);
    if (!made) return Failure(std::move(made).error().within(name));
    lane = std::move(*made);
  }
  // Its process is in a namespace that may not be ours: that it has gone is found when it is filled.
  const Result<SessionId> id = engine_->attach({.uffd = std::move(*uffd),
                                                .state = std::move(*state),
                                                .regions = std::move(regions),
                                                .lane = std::move(lane),
                                                .process = std::nullopt});
  if (!id) return Failure(Error(id.error()).within(name));
  sessions_.emplace(*id, name);
  log(fmt::format("{}: {} bytes in {} regions", name, memory->lazy.value, memory->regions.size()));
  return {};
}

// ---- sessions ---------------------------------------------------------------------------------------------

void CriuDaemon::Impl::complete_all() {
  for (const auto& [id, name] : sessions_)
    engine_->begin_detach(id, Unreadable::poison, [](const Result<void>&) {});
}

void CriuDaemon::Impl::end_if_complete() {
  if (restored_ && sessions_.empty()) loop_->stop();
}

std::string CriuDaemon::Impl::name_of(SessionId session) const {
  const auto found = sessions_.find(session);
  return found != sessions_.end() ? found->second : fmt::format("session {}", session);
}

void CriuDaemon::Impl::session_ended(const SessionStatus& session, SessionEnd end) {
  loop_->post([this, session, end] {
    // Without a process to kill, what cannot be served is poisoned instead.
    if (end == SessionEnd::failed) page_errors_ += session.pages_poisoned;
    log(fmt::format("{}: {}; {} faults, {} pages copied, {} zero, {} removed, {} failed", name_of(session.id),
                    to_string(end), session.faults, session.pages_copied, session.pages_zeroed,
                    session.pages_removed, session.pages_poisoned));
    sessions_.erase(session.id);
    end_if_complete();
  });
}

void CriuDaemon::Impl::session_forked(const SessionStatus& session) {
  loop_->post([this, session] {
    // A child of a child is named after the task that was restored.
    sessions_.emplace(session.id, fmt::format("{} (child {})", session.image, session.id));
    if (restored_) engine_->begin_detach(session.id, Unreadable::poison, [](const Result<void>&) {});
  });
}

void CriuDaemon::Impl::page_failed(SessionId session, const Error& error) {
  loop_->post([this, session, error] {
    if (++page_errors_ > kPageErrorsLogged) return;
    log(fmt::format("{}: {}; that page answers with SIGBUS", name_of(session), error.text()));
    if (page_errors_ == kPageErrorsLogged) log("further pages that fail are only counted");
  });
}

void CriuDaemon::Impl::warn(SessionId session, const std::string& text) {
  // A log that nobody reads must not fill the memory.
  if (logs_queued_.fetch_add(1) >= kLogsQueuedMax) {
    logs_queued_.fetch_sub(1);
    return;
  }
  loop_->post([this, session, text] {
    logs_queued_.fetch_sub(1);
    log(fmt::format("{}: {}", name_of(session), text));
  });
}

// ---- CriuDaemon -------------------------------------------------------------------------------------------

CriuDaemon::CriuDaemon(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
CriuDaemon::~CriuDaemon() = default;

Result<std::unique_ptr<CriuDaemon>> CriuDaemon::create(const CriuDaemonOptions& options) {
  Result<CriuImage> image = CriuImage::open(options.images);
  if (!image) return Failure(std::move(image).error());
  Result<ListeningSocket> listener = listen_in_place_of_others(options.socket);
  if (!listener) return Failure(std::move(listener).error());
  return std::unique_ptr<CriuDaemon>(
      new CriuDaemon(std::make_unique<Impl>(std::move(*image), std::move(*listener), options)));
}

Result<void> CriuDaemon::run() {
  return impl_->run();
}

}  // namespace uffdkit
