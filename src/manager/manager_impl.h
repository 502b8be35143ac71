// All that the manager keeps, and its parts: manager.cc (start, run, end), listeners.cc (sockets and
// connections), sessions.cc (what clients hand over, and how it ends), taking_up.cc (what a manager of before
// had) and status.cc (who asks about it).
#pragma once

#include <array>
#include <atomic>
#include <compare>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kernel/own_memory.h"
#include "manager/access.h"
#include "manager/blocking_work.h"
#include "manager/connections.h"
#include "manager/event_loop.h"
#include "manager/image_catalog.h"
#include "manager/log.h"
#include "manager/manager.h"
#include "manager/quotas.h"
#include "manager/records.h"
#include "manager/service.h"
#include "manager/watchdog.h"

namespace uffdkit {

// How many refusals of one user are logged in a second; the rest is counted.
inline constexpr std::uint64_t kRefusalsLoggedPerSecond = 20;
// How long a native session is served on after its connection has ended.
inline constexpr std::int64_t kResumeMs = 2'000;

// What tells one file from all others.
struct FileIdentity {
  dev_t device;
  ino_t inode;
  auto operator<=>(const FileIdentity&) const = default;
};

std::optional<FileIdentity> identity_of(int fd);

// Whether an image of so many bytes has all that the session's regions show.
Result<void> fits_image(const SessionState& state, ByteCount image_size);

// The counts of a session, each by its name; and those of `more` added to `total`.
nlohmann::json counters_json(const SessionStatus& status);
void add_counters(nlohmann::json& total, const nlohmann::json& more);

class Manager::Impl final : public ConnectionService, public EngineListener {
 public:
  // `connections`: of a worker of before, that may have sent a handshake.
  Impl(ManagerOptions options, std::vector<UniqueFd> connections)
      : options_(std::move(options)), inherited_connections_(std::move(connections)) {}
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
    return quotas_.take_request(peer.uid, options_.threads.now_ns());
  }
  Result<void> may_add(const Peer& peer, std::span<const RequestedRegion> regions) override;
  Engine::Done count_until_added(const Peer& peer, const RequestedRegion& region, Engine::Done done) override;
  Engine::Done on_loop(Connection* connection, Engine::Done done) override;
  void resume_client(SessionId session, Connection* connection, Engine::Done done) override;
  nlohmann::json status() override;
  nlohmann::json listeners() override;
  void add_listener(const control::ListenAdd& request, Connection* connection, Engine::Done done) override;
  Result<void> remove_listener(const std::string& socket) override;
  Result<void> upgrade() override;
  nlohmann::json drain() override;
  void refused(uid_t user, const std::string& who, const Error& error) override;
  void want(Connection& connection, int fd, bool read, bool write) override;
  void close(Connection& connection, int fd) override;

  // EngineListener: from workers
  void session_ended(const SessionStatus& session, SessionEnd end) override;
  Result<SessionCounters*> session_forks(SessionId parent, SessionId child,
                                         const SessionFiles& files) override;
  void session_forked(const SessionStatus& session) override;
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
    std::optional<Error> damage = {};  // why nobody new is served from `store`
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
    bool draining = false;     // its memory is being completed
    bool leaving = false;      // abandoned; its end has not been heard yet
    std::shared_ptr<ImageWorkingSet> working_set = nullptr;
    std::shared_ptr<AccessRecord> recording = nullptr;
    bool prefetches = false;
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
                                  const std::shared_ptr<StoreLane>& image, Connection* connection);
  // What of a manager's of before is used again, by the numbers of its records.
  struct Inherited {
    std::map<std::size_t, ImageCatalog::TakenUp> images;
    std::map<std::size_t, std::shared_ptr<SharedImage>> memories;
    std::set<FileIdentity> state_files;  // of sessions that are taken up
  };
  // What of it cannot be taken up yet; its descriptors stay open.
  struct NotTakenUp {
    Records::Session session;
    std::shared_ptr<StoreLane> lane;
    std::shared_ptr<SharedImage> memory;
    std::uint32_t tries = 0;
  };
  // Errors, here and in the next: no thread can be started.
  Result<ImageCatalog::TakenUp> image_of(std::size_t record, Inherited& inherited);
  Result<void> take_up(const Records::Session& session, Inherited& inherited);
  // With an error nothing of it was closed.
  Result<void> take_up(const Records::Session& session, const std::shared_ptr<StoreLane>& lane,
                       const std::shared_ptr<SharedImage>& memory);
  // A native client is left to come back; others are tried again.
  void cannot_take_up(const Records::Session& session, const std::shared_ptr<StoreLane>& lane,
                      const std::shared_ptr<SharedImage>& memory);
  void take_up_again(SessionId id);
  // Whether its parent, which is not taken up yet, has still to say that it has forked. Were the child to end
  // before, its descriptor's number could be another's by then.
  bool is_in_inbox_of_parent(const Records::Session& session) const;
  // Whether its client has handed it over again.
  bool has_come_back(const Records::Session& session) const;
  // It is another's, or nobody's: its descriptors are closed.
  void give_up(const Records::Session& session);
  Result<void> take_up(const Records::Listener& listener, Inherited& inherited);
  // A connection that has sent a handshake, perhaps.
  void take_up(UniqueFd socket);
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
  // Completes its memory, and lets its client go on by itself.
  void begin_draining(SessionId id, SessionInfo& info);
  void begin_end();
  void end_now();
  // As the manager ends: is left to a successor, or completed, or killed.
  void end_session(SessionId id, const SessionInfo& info);
  bool has_sessions() const { return !sessions_.empty() || !not_taken_up_.empty(); }
  // Ends run() if nothing is left to be done.
  void end_if_done();
  // What the session has to do with its image's working set, and what comes of it at its end.
  void use_working_set(Attachment& attachment, SessionInfo& info);
  void keep_working_set(const SessionStatus& session, const SessionInfo& info);

  const ManagerOptions options_;
  std::vector<UniqueFd> inherited_connections_;
  Log log_{STDERR_FILENO};
  std::int64_t started_ns_ = options_.threads.now_ns();
  std::uint32_t stops_ = 0;  // that were done of those that the keeper was asked for
  const OwnMemoryWay own_memory_way_ = own_memory_way(options_.system);
  std::unique_ptr<EventLoop> loop_;
  std::unique_ptr<BlockingWork> work_;
  UniqueFd signals_;
  // Shared with threads that open an image still.
  const std::shared_ptr<ImageCatalog> images_ = std::make_shared<ImageCatalog>(
      options_.read_retries, options_.store_faults, options_.image_cache_bytes,
      options_.record || options_.prefetch ? ImageCatalog::WorkingSets::yes : ImageCatalog::WorkingSets::no,
      options_.threads, options_.readers);
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
  std::map<SessionId, NotTakenUp> not_taken_up_;
  std::size_t working_sets_to_write_ = 0;
  std::uint64_t sessions_ended_ = 0;
  std::uint64_t clients_refused_ = 0;
  nlohmann::json ended_counters_ = nlohmann::json::object();
  std::mutex unheard_mutex_;
  std::map<SessionId, SessionStatus> unheard_;  // sessions whose end is on its way through the loop
  std::atomic<std::size_t> logs_queued_{0};
  std::function<void()> on_ending_;
  bool full_ = false;  // clients wait at the listeners
  bool ending_ = false;
  bool ends_now_ = false;  // nobody is completed any more
  bool end_was_good_ = true;
  // Last: its workers call this object.
  std::unique_ptr<Engine> engine_;
};

}  // namespace uffdkit
