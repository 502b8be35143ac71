// What a manager of before had is taken up from its records.
#include "manager/manager_impl.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/epoll.h>
#include <unistd.h>

#include <algorithm>
#include <bit>

#include "base/check.h"
#include "base/step.h"

namespace uffdkit {
namespace {

// How soon a session is tried again that cannot be taken up.
constexpr std::int64_t kTakeUpAgainMs = 1000;

bool is_userfaultfd(int fd) {
  std::array<char, 64> kind;
  const ssize_t bytes = ::readlink(fmt::format("/proc/self/fd/{}", fd).c_str(), kind.data(), kind.size());
  return bytes > 0 &&
         std::string_view(kind.data(), static_cast<std::size_t>(bytes)) == "anon_inode:[userfaultfd]";
}

// Whether its client has descriptors of its own, and hands them over again; but not those of children whose
// forks were not applied.
bool can_come_back(const Records::Session& session) {
  return session.kind == SessionKind::native && SessionState::forks_in_inbox(session.state_file).empty();
}

}  // namespace

// Everything here is in the table of descriptors that the next worker has too, so that an error must close
// nothing of it: a userfaultfd that is closed turns what its client has not got into zeros.

Result<void> Manager::Impl::take_up() {
  Records& records = *options_.records;
  Inherited inherited;
  for (const Records::Session& session : records.sessions()) {
    step();
    if (auto taken = take_up(session, inherited); !taken) return taken;
  }
  const std::size_t sessions = sessions_.size();
  for (const Records::Listener& listener : records.listeners())
    if (auto taken = take_up(listener, inherited); !taken) return taken;
  for (const auto& [record, image] : inherited.images) records.release_image(image.lane.get());
  step();
  for (UniqueFd& socket : std::exchange(inherited_connections_, {})) take_up(std::move(socket));
  const int signal = records.shared().death_signal;
  log_.write(fmt::format("the worker before has ended{}; process {} goes on with {} sessions",
                         signal == 0 ? "" : fmt::format(" by signal {}", signal), ::getpid(), sessions));
  take_stops();
  return {};
}

Result<ImageCatalog::TakenUp> Manager::Impl::image_of(std::size_t record, Inherited& inherited) {
  if (const auto known = inherited.images.find(record); known != inherited.images.end()) return known->second;
  const Records::Image image = options_.records->image(record);
  UniqueFd file(image.file);
  Result<ImageCatalog::TakenUp> taken = images_->take_up(file, image.name, image.size);
  (void)file.release();
  if (!taken) return taken;
  options_.records->hold_image(record, taken->lane.get());
  if (const std::optional<Error>& damage = taken->damage)
    log_.write(fmt::format("an image is not what it was: {}", damage->text()));
  return inherited.images.emplace(record, *std::move(taken)).first->second;
}

Result<void> Manager::Impl::take_up(const Records::Session& session, Inherited& inherited) {
  const Result<ImageCatalog::TakenUp> image = image_of(session.image, inherited);
  if (!image) return Failure(image.error());
  // Its client had come back, and the worker died before it let go of what it had of it.
  const std::optional<FileIdentity> state_file = identity_of(session.state_file);
  if (state_file && inherited.state_files.contains(*state_file)) {
    give_up(session);
    return {};
  }
  std::shared_ptr<SharedImage> memory;
  if (session.shares) {
    memory = inherited.memories[session.image];
    if (!memory) {
      const Records::Image record = options_.records->image(session.image);
      UniqueFd file(record.memory);
      UniqueFd filled(record.filled);
      auto taken = images_->take_up_memory(image->lane, file, filled);
      (void)file.release();
      (void)filled.release();
      if (!taken) return Failure(std::move(taken).error());
      memory = inherited.memories[session.image] = std::move(*taken);
    }
  }
  // A client that can come back waits for the image to be whole again.
  const std::optional<Error>& damage = image->damage;
  const Result<void> taken =
      damage && can_come_back(session) ? Failure(*damage) : take_up(session, image->lane, memory);
  if (taken) {
    if (state_file) inherited.state_files.insert(*state_file);
    return {};
  }
  log_.write(fmt::format("session {} cannot be taken up: {}", session.id, taken.error().text()));
  cannot_take_up(session, image->lane, memory);
  return {};
}

Result<void> Manager::Impl::take_up(const Records::Session& session, const std::shared_ptr<StoreLane>& lane,
                                    const std::shared_ptr<SharedImage>& memory) {
  Records& records = *options_.records;
  if (is_in_inbox_of_parent(session))
    return Failure(Error("its parent, whose fork is not applied, is not taken up yet", EAGAIN));
  // By a copy, which is closed if it is refused.
  UniqueFd copy(::fcntl(session.uffd, F_DUPFD_CLOEXEC, 0));
  if (!copy) return Failure(Error::from_errno("duplicate a userfaultfd", errno));
  const Result<Uffd> checked = Uffd::receive(copy.release(), options_.system);
  if (!checked) return Failure(checked.error());
  UniqueFd file(session.state_file);
  Result<SessionState> state = SessionState::open_or_leave(file);
  (void)file.release();
  if (!state) return Failure(std::move(state).error());
  if (auto fits = fits_image(*state, lane->store()->size()); !fits) {
    (void)(*std::move(state)).leave().release();
    return fits;
  }
  std::optional<UniqueFd> process;
  if (session.process >= 0) process.emplace(session.process);
  SessionInfo info{.kind = session.kind,
                   .keeps_descriptor = session.kind == SessionKind::native,
                   .pid = session.pid,
                   .uid = session.uid,
                   .image = state->image(),
                   .lane = lane,
                   .state_file = identity_of(state->fd()),
                   .connection = nullptr};
  Attachment attachment{.uffd = Uffd::adopt(session.uffd, checked->features(), options_.system),
                        .state = std::move(*state),
                        .regions = {},
                        .lane = lane,
                        .process = std::move(process),
                        .id = session.id,
                        .parent = session.parent,
                        .shared = memory,
                        .begins = nullptr,
                        .may_adopt = [&](int fd) { return is_userfaultfd(fd) && !records.has_uffd(fd); }};
  if (session.kind != SessionKind::fork) use_working_set(attachment, info);
  // Before it is run, which may end it at once.
  attachment.counters = records.taken_up(session, lane, memory);
  sessions_.emplace(session.id, info);
  Result<SessionId> id = engine_->attach(std::move(attachment));
  // Its regions have been looked at.
  CHECK(id);
  // A native client comes back by itself; its connection went with the worker.
  if (info.keeps_descriptor) loop_->after(kResumeMs, [this, own = *id] { leave(own); });
  return {};
}

bool Manager::Impl::is_in_inbox_of_parent(const Records::Session& session) const {
  const auto parent = not_taken_up_.find(session.parent);
  if (parent == not_taken_up_.end()) return false;
  const std::vector<int> forks = SessionState::forks_in_inbox(parent->second.session.state_file);
  return std::ranges::find(forks, session.uffd) != forks.end();
}

bool Manager::Impl::has_come_back(const Records::Session& session) const {
  // Two that serve the same memory would spoil it.
  const auto file = identity_of(session.state_file);
  return std::ranges::any_of(sessions_, [&](const auto& entry) { return entry.second.state_file == file; });
}

void Manager::Impl::cannot_take_up(const Records::Session& session, const std::shared_ptr<StoreLane>& lane,
                                   const std::shared_ptr<SharedImage>& memory) {
  if (can_come_back(session) || has_come_back(session)) return give_up(session);
  // For want of descriptors or memory, which others give back.
  options_.records->hold_image(session.image, lane.get());
  not_taken_up_.emplace(session.id, NotTakenUp{.session = session, .lane = lane, .memory = memory});
  loop_->after(kTakeUpAgainMs, [this, id = session.id] { take_up_again(id); });
}

void Manager::Impl::take_up_again(SessionId id) {
  NotTakenUp& waits = not_taken_up_.at(id);
  Uffd uffd = Uffd::adopt(waits.session.uffd, Features(), options_.system);
  const bool is_alive = uffd.target_alive();
  (void)uffd.release();
  const bool is_served = is_alive && !has_come_back(waits.session);
  if (is_served) {
    if (const Result<void> taken = take_up(waits.session, waits.lane, waits.memory); !taken) {
      // Who waits there is in no list of pending faults, so it is said here: each time twice as late.
      if (std::has_single_bit(++waits.tries))
        log_.write(fmt::format("session {} still cannot be taken up, after {} tries: {}", id, waits.tries,
                               taken.error().text()));
      loop_->after(kTakeUpAgainMs, [this, id] { take_up_again(id); });
      return;
    }
    log_.write(fmt::format("session {} is taken up now", id));
  } else {
    give_up(waits.session);
  }
  options_.records->release_image(waits.lane.get());
  not_taken_up_.erase(id);
  if (ending_ && is_served) end_session(id, sessions_.at(id));
  end_if_done();
}

void Manager::Impl::give_up(const Records::Session& session) {
  SessionStatus ended;
  set_counts(ended, options_.records->give_up(session));
  add_counters(ended_counters_, counters_json(ended));
  ++sessions_ended_;
  for (const int fd : {session.uffd, session.state_file, session.process}) UniqueFd(fd).reset();
}

Result<void> Manager::Impl::take_up(const Records::Listener& listener, Inherited& inherited) {
  std::shared_ptr<StoreLane> store;
  std::optional<Error> damage;
  if (listener.kind == ListenerKind::firecracker) {
    Result<ImageCatalog::TakenUp> image = image_of(listener.image, inherited);
    if (!image) return Failure(std::move(image).error());
    store = image->lane;
    damage = image->damage;
  }
  ListeningSocket socket =
      ListeningSocket::take_up(UniqueFd(listener.socket), listener.path, listener.device, listener.inode);
  const auto give_up = [&](const Error& error) {
    log_.write(fmt::format("{} is listened at no more: {}", listener.path, error.text()));
    options_.records->give_up(listener);
    return Result<void>();
  };
  std::vector<Subject> allowed;
  if (!listener.allow.empty()) {
    Result<std::vector<Subject>> subjects = parse_subjects(listener.allow, Names::refuse);
    if (!subjects) return give_up(subjects.error());
    allowed = std::move(*subjects);
  }
  if (listener.kind == ListenerKind::control) {
    options_.records->taken_up(listener, nullptr);
    control_ = std::move(socket);
    return loop_->add(control_->fd(), EPOLLIN, [this] { accept_control(); });
  }
  options_.records->taken_up(listener, store);
  const int fd = socket.fd();
  Listener& own = listeners_
                      .emplace(listener.path, Listener{.socket = std::move(socket),
                                                       .kind = store ? control::ListenKind::firecracker
                                                                     : control::ListenKind::native,
                                                       .image = store ? store->store()->name() : "",
                                                       .store = store,
                                                       .allowed = std::move(allowed),
                                                       .damage = std::move(damage)})
                      .first->second;
  if (auto watched = loop_->add(fd, EPOLLIN, [this, &own] { accept(own); }); !watched) {
    options_.records->remove_listener(fd);
    log_.write(fmt::format("{} is listened at no more: {}", listener.path, watched.error().text()));
    listeners_.erase(listener.path);
  }
  return {};
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
