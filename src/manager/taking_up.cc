// What a manager of before had is taken up from its records.
#include "manager/manager_impl.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "base/step.h"

namespace uffdkit {
namespace {

bool is_userfaultfd(int fd) {
  std::array<char, 64> kind;
  const ssize_t bytes = ::readlink(fmt::format("/proc/self/fd/{}", fd).c_str(), kind.data(), kind.size());
  return bytes > 0 &&
         std::string_view(kind.data(), static_cast<std::size_t>(bytes)) == "anon_inode:[userfaultfd]";
}

}  // namespace

Result<void> Manager::Impl::take_up() {
  Records& records = *options_.records;
  Inherited inherited;
  std::size_t sessions = 0;
  for (const Records::Session& session : records.sessions()) {
    step();
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
  step();
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
  SessionInfo info{.kind = session.kind,
                   .keeps_descriptor = session.kind == SessionKind::native,
                   .pid = session.pid,
                   .uid = session.uid,
                   .image = state->image(),
                   .lane = *lane,
                   .state_file = identity_of(state->fd()),
                   .connection = nullptr};
  Attachment attachment{.uffd = std::move(*uffd),
                        .state = std::move(*state),
                        .regions = {},
                        .lane = *lane,
                        .process = std::move(process),
                        .id = session.id,
                        .parent = session.parent,
                        .shared = memory,
                        .begins = nullptr,
                        .may_adopt = [&](int fd) { return is_userfaultfd(fd) && !records.has_uffd(fd); }};
  if (session.kind != SessionKind::fork) use_working_set(attachment, info);
  // Before it is run, which may end it at once.
  records.taken_up(session, *lane, memory);
  sessions_.emplace(session.id, info);
  Result<SessionId> id = engine_->attach(std::move(attachment));
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

}  // namespace uffdkit
