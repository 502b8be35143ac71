// Sessions: what a client hands over is checked and given to the engine, and what the engine says of it is
// written down.
#include "manager/manager_impl.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>

#include <algorithm>
#include <cerrno>

namespace uffdkit {
namespace {

// Page errors that are logged for each session; the rest is counted.
constexpr std::uint64_t kPageErrorsLogged = 10;
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
      return "failed, client killed or poisoned";
  }
  return "?";
}

}  // namespace

std::optional<FileIdentity> identity_of(int fd) {
  struct stat status;
  if (::fstat(fd, &status) != 0) return std::nullopt;
  return FileIdentity{.device = status.st_dev, .inode = status.st_ino};
}

Result<void> fits_image(const SessionState& state, ByteCount image_size) {
  for (const RegionRecord& region : state.regions())
    if (region.live && (region.offset.value > image_size.value ||
                        region.length.value > image_size.value - region.offset.value))
      return Failure(Error(fmt::format("the image {} has {} bytes now, less than the session's regions need",
                                       state.image(), image_size.value),
                           ESTALE));
  return {};
}

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
    if (recorded != 0) options_.records->withdraw(recorded);
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
  regions.reserve(session.request.regions.size());
  for (const RequestedRegion& region : session.request.regions)
    regions.push_back({.memory = region.memory,
                       .offset = region.offset,
                       .page_size = region.page_size,
                       .sharing = session.sharing});
  UniqueFd process(::fcntl(session.peer->pidfd.get(), F_DUPFD_CLOEXEC, 0));
  if (!process) return Failure(Error::from_errno("duplicate the client's pidfd", errno));
  Attachment attachment{.uffd = std::move(*uffd),
                        .state = std::move(*state),
                        .regions = std::move(regions),
                        .lane = image,
                        .process = std::move(process)};
  SessionInfo info{.kind = session.keeps_descriptor ? SessionKind::native : SessionKind::firecracker,
                   .keeps_descriptor = session.keeps_descriptor,
                   .pid = session.peer->pid,
                   .uid = session.peer->uid,
                   .image = session.request.image,
                   .lane = image,
                   .state_file = state_file,
                   .connection = connection,
                   .cookie = session.connection};
  use_working_set(attachment, info);
  return serve(std::move(attachment), info);
}

void Manager::Impl::use_working_set(Attachment& attachment, SessionInfo& info) {
  info.working_set = images_->working_set(info.lane);
  if (!info.working_set && options_.record)
    log_.write("not recorded: where the image lies, or what it holds, cannot be told");
  if (!info.working_set) return;
  while (const std::optional<Error> problem = info.working_set->problem()) log_.write(problem->text());
  if (!options_.record) {
    attachment.prefetch = info.working_set->order();
    info.prefetches = attachment.prefetch != nullptr;
    return;
  }
  Result<std::shared_ptr<AccessRecord>> record =
      AccessRecord::create(kPage4K.pages(info.lane->store()->size()));
  if (!record) return log_.write("not recorded: " + record.error().text());
  attachment.record = info.recording = std::move(*record);
}

void Manager::Impl::keep_working_set(const SessionStatus& session, const SessionInfo& info) {
  const auto run = [&](auto write) {
    ++working_sets_to_write_;
    work_->run("working set " + info.working_set->path(), [this, write = std::move(write)] {
      std::string said = write();
      return [this, said = std::move(said)] {
        --working_sets_to_write_;
        if (!said.empty()) log_.write(said);
        end_if_done();
      };
    });
  };
  if (info.recording && !info.recording->pages().empty())
    return run([id = session.id, set = info.working_set, lane = info.lane,
                recording = info.recording]() -> std::string {
      if (auto added = set->add_recording(*lane->store(), recording->pages()); !added)
        return fmt::format("session {}: its working set is lost: {}", id, added.error().text());
      const std::optional<std::string> image = set->can_be_stored_for();
      return fmt::format("session {}: {} pages recorded in {}{}", id, recording->pages().size(), set->path(),
                         image ? fmt::format("; store them for themselves, for sessions that start faster: "
                                             "uffdkit image store-set {}",
                                             *image)
                               : "");
    });
  if (!info.prefetches) return;
  const auto number = [](std::uint64_t count) {
    return static_cast<std::uint32_t>(std::min<std::uint64_t>(count, UINT32_MAX));
  };
  const image::WorkingSetRun result{.brought = number(session.pages_prefetched),
                                    .late = number(session.prefetch_late),
                                    .missed = number(session.prefetch_missed),
                                    .left_out = number(session.prefetch_left_out),
                                    .left_out_used = number(session.prefetch_left_out_used)};
  run([set = info.working_set, result]() -> std::string { return set->add_run(result), ""; });
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
  const Result<std::string> name = SessionState::image_of(state_fd.get());
  if (!name) return answer(Failure(Error(name.error().text(), EBADF)));

  struct Request {
    UniqueFd uffd;
    UniqueFd process;
    UniqueFd state_file;
    const Peer& peer;  // of the connection, which is there as long as somebody waits for this
  };
  const auto kept = std::make_shared<Request>(Request{.uffd = std::move(uffd_fd),
                                                      .process = std::move(process),
                                                      .state_file = std::move(state_fd),
                                                      .peer = peer});
  open_image(*name, peer, connection, [=, this](Result<std::shared_ptr<StoreLane>> image) {
    if (!image) return attached(Failure(std::move(image).error()));
    if (ending_)
      return attached(Failure(Error("the manager is ending", ESHUTDOWN).with_remedy("connect again")));
    // Somebody else may have taken it up meanwhile.
    if (auto own = resume_own(kept->state_file.get(), kept->peer, connection))
      return attached(*std::move(own));
    Result<SessionState> state = SessionState::open(std::move(kept->state_file));
    if (!state) return attached(Failure(Error(state.error().text(), EBADF)));
    attached(take_up(std::move(kept->uffd), std::move(kept->process), std::move(*state), kept->peer.uid,
                     kept->peer.pid, *image, connection));
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
                                               uid_t uid, pid_t pid, const std::shared_ptr<StoreLane>& image,
                                               Connection* connection) {
  Result<Uffd> uffd = receive(std::move(uffd_fd));
  if (!uffd) return Failure(Error(uffd.error().text(), EBADF));
  Usage more{.sessions = 1};
  for (const RegionRecord& region : state.regions()) more.regions += region.live ? 1 : 0;
  for (const Segment& segment : state.layout().segments()) more.memory_bytes += segment.memory.length.value;
  if (auto granted = check_quota(uid, more); !granted) return Failure(std::move(granted).error());
  if (auto fits = fits_image(state, image->store()->size()); !fits) return Failure(std::move(fits).error());
  const std::string name = state.image();
  const std::optional<FileIdentity> state_file = identity_of(state.fd());
  Attachment attachment{.uffd = std::move(*uffd),
                        .state = std::move(state),
                        .regions = {},
                        .lane = image,
                        .process = std::move(process)};
  SessionInfo info{.kind = SessionKind::native,
                   .keeps_descriptor = true,
                   .pid = pid,
                   .uid = uid,
                   .image = name,
                   .lane = image,
                   .state_file = state_file,
                   .connection = connection};
  use_working_set(attachment, info);
  return serve(std::move(attachment), info);
}

// ---- what workers say -------------------------------------------------------------------------------------

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
  add_counters(ended_counters_, counters_json(session));
  log_.write(
      fmt::format("session {}: {}; {} faults, {} pages copied, {} shared, {} zero, {} removed, {} failed",
                  session.id, to_string(end), session.faults, session.pages_copied, session.pages_shared,
                  session.pages_zeroed, session.pages_removed, session.pages_poisoned));
  if (end == SessionEnd::failed) end_was_good_ = end_was_good_ && !ending_;
  if (info.connection != nullptr) info.connection->session_ended(end);
  if (info.working_set) keep_working_set(session, info);
  end_if_done();
}

// One that is not recorded would read zeros when this process ends.
Result<SessionCounters*> Manager::Impl::session_forks(SessionId parent, SessionId child,
                                                      const SessionFiles& files) {
  if (options_.records == nullptr) return nullptr;
  return options_.records->add_fork(parent, child, files.uffd, files.state_file);
}

void Manager::Impl::session_forked(const SessionStatus& session) {
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
    SessionInfo& own = sessions_.emplace(session.id, info).first->second;
    if (parent != sessions_.end() && parent->second.draining) begin_draining(session.id, own);
    log_.write(fmt::format("session {}: a child of session {}'s client, {} bytes from {}", session.id,
                           session.parent, session.memory_bytes, session.image));
    if (ending_) end_session(session.id, own);
  });
}

void Manager::Impl::detach_failed(SessionId session, const Error& error) {
  loop_->post([this, session, error] {
    const auto found = sessions_.find(session);
    if (found == sessions_.end()) return;
    if (std::exchange(found->second.draining, false))
      log_.write(fmt::format("session {} cannot be completed: {}", session, error.text()));
    if (found->second.connection != nullptr) found->second.connection->detach_failed(error);
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

}  // namespace uffdkit
