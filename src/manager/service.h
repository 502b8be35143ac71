// What connections ask of the manager, and what it tells them.
#pragma once

#include <sys/epoll.h>
#include <uffdkit/error.h>
#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <functional>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "wire/attach_request.h"
#include "wire/control.h"
#include "wire/unix_socket.h"

namespace uffdkit {

// Something that is connected to the manager. Owned by it; lives until it asks to be closed, or the manager
// ends.
class Connection {
 public:
  virtual ~Connection() = default;
  // How its descriptor is waited for at first: see EventLoop::add.
  virtual std::uint32_t events() const { return EPOLLIN; }
  // Its descriptor can be read or written.
  virtual void ready() = 0;
  // Whether its peer is made to wait for an answer.
  virtual bool is_waiting() const { return false; }
  // Who is at the other end, for the log.
  virtual std::string who() const = 0;
  // The session that it attached or resumed has ended.
  virtual void session_ended(SessionEnd) {}
  // A detach that it asked for was given up: the session goes on.
  virtual void detach_failed(const Error&) {}
};

// What a new session is made of.
struct NewSession {
  AttachRequest request;
  UniqueFd uffd;  // as received: nothing is known of it
  const Peer* peer;
  std::uint64_t connection;  // the cookie of its socket
  bool keeps_descriptor;     // the client itself holds the userfaultfd, and will look for a successor of this
                             // manager
  Sharing sharing{};         // of all its regions
};

struct AttachedSession {
  SessionId id;
  ByteCount image_size;
  std::uint32_t regions;
  UniqueFd state_file;               // open for reading only
  std::shared_ptr<StoreLane> image;  // null for none
};

// A call with `connection` among its arguments that takes a function answers by it later, on the manager's
// thread and never from within the call, unless `connection` is closed by then: opening files may block, and
// is done elsewhere.
class ConnectionService {
 public:
  using Attached = std::function<void(Result<AttachedSession>)>;
  using ImageOpened = std::function<void(Result<std::shared_ptr<StoreLane>>)>;

  virtual ~ConnectionService() = default;

  // Checks everything and has it served. Errors say what is wrong with the request.
  virtual Result<AttachedSession> attach(NewSession session, std::shared_ptr<StoreLane> image,
                                         Connection* connection) = 0;
  // The client has been told of the session.
  virtual void acknowledged(SessionId session) = 0;
  // Goes on with a session of this manager or of another, which is known by its state file. EBUSY: a living
  // connection has it. EPERM: `peer` may not have its image.
  virtual void resume(UniqueFd uffd, UniqueFd state_file, const Peer& peer, Connection* connection,
                      Attached attached) = 0;
  // EPERM: `peer` may not have it, whether or not there is one.
  virtual void open_image(const std::string& name, const Peer& peer, Connection* connection,
                          ImageOpened opened) = 0;
  virtual Result<std::shared_ptr<SharedImage>> share_memory(const std::shared_ptr<StoreLane>& image) = 0;
  virtual Engine& engine() = 0;
  // Whether this user may ask for something now. ENOSPC: it has asked too often.
  virtual Result<void> take_request(const Peer& peer) = 0;
  // Whether this user may have so many regions more. ENOSPC: its quota is used up.
  virtual Result<void> may_add(const Peer& peer, std::span<const RequestedRegion> regions) = 0;
  // Counts a region as the user's until the engine has answered, and does so itself; then calls `done`.
  virtual Engine::Done count_until_added(const Peer& peer, const RequestedRegion& region,
                                         Engine::Done done) = 0;
  // Has `done` called on the manager's thread with what it is given on any other, unless `connection` is
  // closed by then.
  virtual Engine::Done on_loop(Connection* connection, Engine::Done done) = 0;

  // A client that was stopped over a page that cannot be read goes on; the page is tried again first.
  virtual void resume_client(SessionId session, Connection* connection, Engine::Done done) = 0;

  virtual nlohmann::json status() = 0;
  virtual nlohmann::json listeners() = 0;
  // The socket is added even if `connection` is closed meanwhile.
  virtual void add_listener(const control::ListenAdd& request, Connection* connection, Engine::Done done) = 0;
  virtual Result<void> remove_listener(const std::string& socket) = 0;
  // Errors: nobody keeps this process.
  virtual Result<void> upgrade() = 0;
  // Begins; returns the numbers of the sessions.
  virtual nlohmann::json drain() = 0;

  // A client was refused; counted, and logged unless this user is refused something all the time.
  virtual void refused(uid_t user, const std::string& who, const Error& error) = 0;
  // What the connection's descriptor waits for.
  virtual void want(Connection& connection, int fd, bool read, bool write) = 0;
  // Ends the connection soon, from its own calls too; `fd` is closed by it.
  virtual void close(Connection& connection, int fd) = 0;
};

}  // namespace uffdkit
