#include "manager/manager.h"

#include <fmt/format.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "base/process.h"
#include "manager/keeper.h"
#include "manager/manager_impl.h"

namespace uffdkit {
namespace {

// How often pending faults are looked at: so many times within the watchdog's limit, and at least each
// second.
constexpr std::int64_t kWatchdogLooks = 4;
constexpr std::int64_t kWatchdogPauseMaxMs = 1000;

}  // namespace

Result<void> Manager::Impl::start() {
  Result<std::unique_ptr<EventLoop>> loop = EventLoop::create(options_.threads);
  if (!loop) return Failure(std::move(loop).error());
  loop_ = std::move(*loop);
  work_ = std::make_unique<BlockingWork>(*loop_);
  SessionId last_session = 0;
  if (options_.records != nullptr) {
    const Records::Shared& shared = options_.records->shared();
    last_session = shared.last_session;
    started_ns_ = shared.started_ns;
    clients_refused_ = shared.clients_refused;
    const Records::Totals& totals = options_.records->totals();
    sessions_ended_ = totals.sessions;
    SessionStatus ended;
    set_counts(ended, totals.counters);
    ended_counters_ = counters_json(ended);
  }
  Result<std::unique_ptr<Engine>> engine = Engine::create(
      {.last_session = last_session,
       .workers = options_.workers,
       .spin_ns = options_.spin_ns,
       .session = {.fault_around = options_.record ? PageCount(1) : options_.fault_around,
                   .shared_fault_around = options_.record ? PageCount(1) : options_.shared_fault_around,
                   .on_error = options_.on_error,
                   .background = options_.record ? Background::off : options_.background,
                   .follow_streams = options_.prefetch && !options_.record,
                   .background_budget = std::make_shared<IoBudget>(options_.background_bytes_per_second)},
       .threads = options_.threads},
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

Result<void> Manager::Impl::upgrade() {
  if (options_.records == nullptr)
    return Failure(Error("this manager has no keeper, which would replace the program", ENOTSUP)
                       .with_remedy("end it and start the new one; see uffdkit-serve(1), SIGNALS"));
  options_.records->ask_for_upgrade();
  return {};
}

nlohmann::json Manager::Impl::drain() {
  nlohmann::json begun = nlohmann::json::array();
  for (auto& [id, info] : sessions_) {
    if (info.keeps_descriptor) continue;
    begun.push_back(id);
    begin_draining(id, info);
  }
  return begun;
}

void Manager::Impl::begin_draining(SessionId id, SessionInfo& info) {
  if (std::exchange(info.draining, true)) return;
  engine_->begin_detach(id, Unreadable::keep_serving, [](const Result<void>&) {});
}

void Manager::Impl::begin_end() {
  ending_ = true;
  if (on_ending_) on_ending_();
  for (auto& [path, listener] : listeners_) {
    loop_->remove(listener.socket.fd());
    if (options_.records != nullptr) options_.records->remove_listener(listener.socket.fd());
  }
  listeners_.clear();
  if (!has_sessions() && working_sets_to_write_ == 0) return loop_->stop();
  log_.write(fmt::format("ending: {} sessions to complete or to leave to a successor",
                         sessions_.size() + not_taken_up_.size()));
  for (const auto& [id, info] : sessions_) end_session(id, info);
  loop_->after(options_.drain_ms, [this] { end_now(); });
}

void Manager::Impl::end_session(SessionId id, const SessionInfo& info) {
  const Engine::Done ignored = [](const Result<void>&) {};
  // Closing the descriptor under a client would make it hang, or read zeros.
  if (ends_now_) return engine_->kill(id, "the manager ends before the client's memory is complete", ignored);
  if (info.keeps_descriptor) return engine_->abandon(id, ignored);
  engine_->begin_detach(id, Unreadable::poison, ignored);
}

void Manager::Impl::end_if_done() {
  if (ending_ && !has_sessions() && working_sets_to_write_ == 0) loop_->stop();
}

void Manager::Impl::end_now() {
  ends_now_ = true;
  // What a disk does not take is lost.
  if (!has_sessions()) return loop_->stop();
  for (const auto& [id, info] : sessions_) end_session(id, info);
  // The others are when they have been taken up, unless that is the end of their memory.
  for (const auto& [id, waits] : not_taken_up_) {
    end_was_good_ = false;
    log_.write(
        fmt::format("session {}: the manager ends before it could be taken up; its client is killed, if "
                    "its process is known",
                    id));
    if (waits.session.process >= 0) send_signal(waits.session.process, SIGKILL);
  }
}

void Manager::Impl::watch_pending() {
  for (const std::string& line : watchdog_.look(engine_->sessions(), options_.threads.now_ns()))
    log_.write(line);
  const std::int64_t pause_ms =
      std::clamp<std::int64_t>(options_.watchdog_ms / kWatchdogLooks, 1, kWatchdogPauseMaxMs);
  loop_->after(pause_ms, [this] { watch_pending(); });
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
