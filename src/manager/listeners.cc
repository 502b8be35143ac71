// Sockets at which clients arrive, and the connections that come of them.
#include "manager/manager_impl.h"

#include <fmt/format.h>
#include <sys/epoll.h>
#include <sys/resource.h>

#include <algorithm>
#include <cerrno>

#include "base/step.h"

namespace uffdkit {
namespace {

// Connections that have not yet said what they want, and those on the control socket; more are not accepted
// until some have, or are closed. Clients that have a session are not bounded but by descriptors.
constexpr std::size_t kUndecidedMax = 4096;
constexpr std::size_t kControlMax = 256;
// Of the former, those of one user, so that others find a place.
constexpr std::size_t kUndecidedOfUserMax = 1024;
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

ListenerKind recorded_kind(control::ListenKind kind) {
  return kind == control::ListenKind::firecracker ? ListenerKind::firecracker : ListenerKind::native;
}

}  // namespace

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
  if (!has_peer(listener.allowed, peer))
    if (auto allowed = check_image(peer, listener.image); !allowed) return allowed;
  if (listener.damage) return Failure(*listener.damage);
  return {};
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
    step();
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
  if (!control_) return;
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
  if (refusals_logged_.take_request(user, options_.threads.now_ns()))
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

}  // namespace uffdkit
