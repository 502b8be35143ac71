// The three kinds of peers, each a small state machine over one socket. Threads: the manager's own.
#pragma once

#include <uffdkit/unique_fd.h>

#include <array>
#include <cstddef>
#include <deque>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/store_lane.h"
#include "manager/service.h"
#include "wire/control.h"
#include "wire/firecracker.h"
#include "wire/native.h"
#include "wire/unix_socket.h"

namespace uffdkit {

// Has a client that is not let in hear why, where its protocol has a way to say so.
void turn_away(int socket, control::ListenKind kind, const Error& error);

// Takes one handshake; the connection ends with it. What the client has sent stays in the socket until the
// session is served: a client of this kind says it once, and whoever takes the socket up reads it again.
class FirecrackerConnection final : public Connection {
 public:
  FirecrackerConnection(UniqueFd socket, Peer peer, std::string name, std::shared_ptr<StoreLane> image,
                        ConnectionService& service);
  void ready() override;
  std::string who() const override;
  // What was looked at stays there, so only what is new is to be heard of.
  std::uint32_t events() const override { return EPOLLIN | EPOLLRDHUP | EPOLLET; }

 private:
  void refuse(const Error& error);

  UniqueFd socket_;
  Peer peer_;
  std::string name_;  // of the socket, for messages
  std::shared_ptr<StoreLane> image_;
  ConnectionService& service_;
  FirecrackerDecoder decoder_;
  std::size_t peeked_ = 0;  // bytes that are in the socket still
};

// Speaks the native protocol for as long as the client wants to.
class NativeConnection final : public Connection {
 public:
  NativeConnection(UniqueFd socket, Peer peer, std::string name, ConnectionService& service);
  void ready() override;
  std::string who() const override;
  void session_ended(SessionEnd end) override;
  void detach_failed(const Error& error) override;
  // Whether it is the manager that has something to do, and not the client.
  bool is_waiting() const override { return waiting_; }

 private:
  void receive();
  // Handles what has been received, until a request has to wait for something.
  void handle_received();
  void handle(std::uint32_t id, native::Request request);
  void share_image(std::uint32_t id, const native::ShareImage& request);
  void share_opened(std::uint32_t id, const std::shared_ptr<StoreLane>& image, bool removed_reads_zero);
  void image_info(std::uint32_t id, const native::ImageInfo& request);
  void attach_to(std::uint32_t id, native::Attach request, std::shared_ptr<StoreLane> image);
  void attach(std::uint32_t id, native::Attach request);
  void resume(std::uint32_t id, native::Resume request);
  void add_regions(std::uint32_t id, SessionId session, const native::AddRegions& request);
  void drop_regions(std::uint32_t id, SessionId session, const native::DropRegions& request);
  void detach(std::uint32_t id, SessionId session, const native::Detach& request);
  void answer_attached(std::uint32_t id, Result<AttachedSession> attached);
  // The request in hand is answered by answers to come: those behind it wait, until go_on().
  void wait() { waiting_ = true; }
  void go_on();
  // Answers request `id` when `parts` answers of the engine have come.
  Engine::Done answer_when_done(std::uint32_t id, std::size_t parts);

  void answer(std::uint32_t id, native::Answer answer);
  void refuse(std::uint32_t id, native::ErrorCode code, const Error& error);
  void send_queued();
  void close_after_sending() { closing_ = true; }

  UniqueFd socket_;
  Peer peer_;
  std::string name_;
  ConnectionService& service_;
  native::FrameReader reader_{native::FrameReader::Reads::requests};
  std::deque<native::Frame> received_;
  bool waiting_ = false;
  std::deque<native::OutgoingFrame> out_;
  std::size_t sent_of_first_ = 0;
  bool greeted_ = false;
  bool closing_ = false;
  std::optional<SessionId> session_;
  bool acknowledged_ = false;
  ByteCount image_size_;
  std::shared_ptr<StoreLane> image_;
  Sharing sharing_;                              // what SHARE_IMAGE has brought, until ATTACH
  std::optional<std::uint32_t> detach_request_;  // to be answered when the session has ended
};

// Answers one request line after the other.
class ControlConnection final : public Connection {
 public:
  ControlConnection(UniqueFd socket, ConnectionService& service);
  void ready() override;
  std::string who() const override { return "a client of the control socket"; }

 private:
  // Says nothing where the answer comes later.
  void answer(const std::string& line);
  bool send_queued();

  UniqueFd socket_;
  ConnectionService& service_;
  control::LineReader reader_{control::kRequestBytesMax};
  std::deque<std::string> lines_;  // not answered yet
  bool waiting_ = false;           // for the answer of the line before those
  std::string out_;
  bool ended_ = false;
};

}  // namespace uffdkit
