#include "manager/connections.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <utility>

#include "base/step.h"

namespace uffdkit {
namespace {

// What one recvmsg(2) takes.
using ReceiveBuffer = std::array<std::byte, std::size_t{16} * 1024>;
// What a client can have under way to us, by the default of net.core.wmem_default less what the kernel counts
// on top of it. A handshake that is longer (of more than 500 regions) is taken out of the socket, or its
// sender would wait for that.
constexpr std::size_t kPeekedBytesMax = std::size_t{96} << 10;
// Answers that a client has not taken; beyond that it is not reading.
constexpr std::size_t kUnsentFramesMax = 64;

std::string describe(const std::string& socket, const Peer& peer) {
  return fmt::format("{}: client pid {} uid {}", socket, peer.pid, peer.uid);
}

// What a client is told of an error of attaching.
native::ErrorCode code_of(int os_error) {
  switch (os_error) {
    case EBUSY:
      return native::ErrorCode::busy;
    case EBADF:
      return native::ErrorCode::bad_descriptor;
    case ENOENT:
      return native::ErrorCode::no_such_image;
    case ESRCH:
      return native::ErrorCode::no_such_session;
    case ESHUTDOWN:
      return native::ErrorCode::shutting_down;
    case EPERM:
      return native::ErrorCode::not_permitted;
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case ENOSPC:
      return native::ErrorCode::limit;
    default:
      return native::ErrorCode::invalid;
  }
}

// What a client is told of an image that it cannot have: why not is in the message.
native::ErrorCode code_of_image(int os_error) {
  return os_error == EPERM ? native::ErrorCode::not_permitted : native::ErrorCode::no_such_image;
}

}  // namespace

void turn_away(int socket, control::ListenKind kind, const Error& error) {
  if (kind != control::ListenKind::native) return;
  const native::OutgoingFrame frame =
      native::encode_answer(0, native::Refused{.code = code_of(error.os_error()), .message = error.text()});
  // It fits into an empty socket, or the client will have to look into the log.
  (void)send_some(socket, frame.bytes, {});
}

// ---- Firecracker ------------------------------------------------------------------------------------------

FirecrackerConnection::FirecrackerConnection(UniqueFd socket, Peer peer, std::string name,
                                             std::shared_ptr<StoreLane> image, ConnectionService& service)
    : socket_(std::move(socket)),
      peer_(std::move(peer)),
      name_(std::move(name)),
      image_(std::move(image)),
      service_(service),
      decoder_(image_->store()->name()) {
  // Refused only by kernels before 3.4.
  (void)peek_from_start(socket_.get());
}

void FirecrackerConnection::ready() {
  ReceiveBuffer buffer;
  while (true) {
    Result<Piece> piece = peek_some(socket_.get(), buffer);
    if (!piece) return refuse(piece.error());
    if (piece->bytes.empty() && !piece->end) return;
    step();
    peeked_ += piece->bytes.size();
    if (peeked_ > kPeekedBytesMax) drop_peeked(socket_.get(), std::exchange(peeked_, 0));
    Result<std::optional<FirecrackerHandshake>> fed = decoder_.feed(std::move(*piece));
    if (!fed) return refuse(fed.error());
    std::optional<FirecrackerHandshake>& handshake = *fed;
    if (!handshake) continue;
    Result<AttachedSession> attached = service_.attach({.request = std::move(handshake->request),
                                                        .uffd = std::move(handshake->uffd),
                                                        .peer = &peer_,
                                                        .connection = cookie_of(socket_.get()),
                                                        .keeps_descriptor = false},
                                                       image_, nullptr);
    if (!attached) return refuse(attached.error());
    step();
    // With something left in it the client would hear that its connection was broken.
    drop_peeked(socket_.get(), peeked_);
    // Firecracker says no more, and does not mind: its process is watched, not its socket.
    return service_.close(*this, socket_.get());
  }
}

std::string FirecrackerConnection::who() const {
  return describe(name_, peer_);
}

void FirecrackerConnection::refuse(const Error& error) {
  drop_peeked(socket_.get(), peeked_);
  service_.refused(peer_.uid, who(), error);
  service_.close(*this, socket_.get());
}

// ---- native -----------------------------------------------------------------------------------------------

NativeConnection::NativeConnection(UniqueFd socket, Peer peer, std::string name, ConnectionService& service)
    : socket_(std::move(socket)), peer_(std::move(peer)), name_(std::move(name)), service_(service) {}

std::string NativeConnection::who() const {
  return describe(name_, peer_);
}

void NativeConnection::ready() {
  // Nothing is to be read or sent, so the client is gone.
  if (waiting_ && out_.empty()) return service_.close(*this, socket_.get());
  handle_received();
  receive();
  send_queued();
}

void NativeConnection::go_on() {
  waiting_ = false;
  ready();
}

void NativeConnection::receive() {
  ReceiveBuffer buffer;
  while (!closing_ && !waiting_) {
    Result<Piece> piece = receive_some(socket_.get(), buffer);
    // The client went away; its session goes on for as long as its process has the memory.
    if (!piece) return close_after_sending();
    if (piece->bytes.empty() && !piece->end) return;
    const bool end = piece->end;
    Result<std::vector<native::Frame>> frames = reader_.feed(std::move(*piece));
    if (!frames) {
      refuse(0, native::ErrorCode::protocol, frames.error());
      return close_after_sending();
    }
    for (native::Frame& frame : *frames) received_.push_back(std::move(frame));
    handle_received();
    if (end) return close_after_sending();
  }
}

void NativeConnection::handle_received() {
  while (!received_.empty() && !closing_ && !waiting_) {
    native::Frame frame = std::move(received_.front());
    received_.pop_front();
    const std::uint32_t id = frame.request_id;
    Result<native::Request> request = native::decode_request(std::move(frame));
    if (!request) {
      refuse(id, native::ErrorCode::protocol, request.error());
      return close_after_sending();
    }
    step();
    handle(id, std::move(*request));
    step();
  }
}

void NativeConnection::handle(std::uint32_t id, native::Request request) {
  if (auto granted = service_.take_request(peer_); !granted)
    return refuse(id, native::ErrorCode::limit, granted.error());
  if (auto* hello = std::get_if<native::Hello>(&request)) {
    if (greeted_)
      return refuse(id, native::ErrorCode::invalid, Error("HELLO was said on this connection already"));
    if (native::kVersion < hello->version_min || native::kVersion > hello->version_max) {
      refuse(id, native::ErrorCode::version,
             Error(fmt::format("this manager speaks version {}, the client {} to {}", native::kVersion,
                               hello->version_min, hello->version_max)));
      return close_after_sending();
    }
    greeted_ = true;
    return answer(id, native::Welcome{});
  }
  if (!greeted_) {
    refuse(id, native::ErrorCode::protocol, Error("the first request is not HELLO"));
    return close_after_sending();
  }
  if (auto* unsupported = std::get_if<native::Unsupported>(&request))
    return refuse(
        id, native::ErrorCode::unsupported,
        Error(fmt::format("request type {:#x} is not of version {}", unsupported->type, native::kVersion)));
  if (auto* wanted = std::get_if<native::ImageInfo>(&request)) return image_info(id, *wanted);
  if (auto* wanted = std::get_if<native::ShareImage>(&request)) return share_image(id, *wanted);
  if (auto* wanted = std::get_if<native::Attach>(&request)) return attach(id, std::move(*wanted));
  if (auto* wanted = std::get_if<native::Resume>(&request)) return resume(id, std::move(*wanted));

  if (!session_ || detach_request_)
    return refuse(id, native::ErrorCode::no_such_session, Error("nothing is attached on this connection"));
  if (auto* wanted = std::get_if<native::AddRegions>(&request)) return add_regions(id, *session_, *wanted);
  if (auto* wanted = std::get_if<native::DropRegions>(&request)) return drop_regions(id, *session_, *wanted);
  if (auto* wanted = std::get_if<native::Detach>(&request)) return detach(id, *session_, *wanted);
  const std::optional<SessionStatus> status = service_.engine().session(*session_);
  if (!status) return refuse(id, native::ErrorCode::no_such_session, Error("the session has ended"));
  answer(id,
         native::Status{.pages_served = status->pages_copied + status->pages_zeroed + status->pages_shared,
                        .faults_pending = status->pending});
}

void NativeConnection::share_image(std::uint32_t id, const native::ShareImage& request) {
  if (session_) return refuse(id, native::ErrorCode::invalid, Error("this connection has a session already"));
  wait();
  service_.open_image(
      request.image, peer_, this,
      [this, id, zero = request.removed_reads_zero](const Result<std::shared_ptr<StoreLane>>& image) {
        if (image) {
          share_opened(id, *image, zero);
        } else {
          refuse(id, code_of_image(image.error().os_error()), image.error());
        }
        go_on();
      });
}

void NativeConnection::share_opened(std::uint32_t id, const std::shared_ptr<StoreLane>& image,
                                    bool removed_reads_zero) {
  auto shared = service_.share_memory(image);
  if (!shared) return refuse(id, native::ErrorCode::internal, shared.error());
  Result<UniqueFd> memory = (*shared)->open_for_client();
  if (!memory) return refuse(id, native::ErrorCode::internal, memory.error());
  sharing_ = {.mode = (*shared)->mode_for(removed_reads_zero), .image = std::move(*shared)};
  answer(id, native::ImageMemory{
                 .size = sharing_.image->size(), .mode = sharing_.mode, .memory = std::move(*memory)});
}

void NativeConnection::image_info(std::uint32_t id, const native::ImageInfo& request) {
  wait();
  service_.open_image(request.image, peer_, this,
                      [this, id](const Result<std::shared_ptr<StoreLane>>& image) {
                        if (image) {
                          answer(id, native::ImageSize{.size = (*image)->store()->size()});
                        } else {
                          refuse(id, code_of_image(image.error().os_error()), image.error());
                        }
                        go_on();
                      });
}

void NativeConnection::attach(std::uint32_t id, native::Attach request) {
  if (session_) return refuse(id, native::ErrorCode::invalid, Error("this connection has a session already"));
  wait();
  const std::string name = request.request.image;
  // Shared, because a std::function must be copyable.
  auto kept = std::make_shared<native::Attach>(std::move(request));
  service_.open_image(name, peer_, this, [this, id, kept](Result<std::shared_ptr<StoreLane>> image) {
    if (image) {
      attach_to(id, std::move(*kept), std::move(*image));
    } else {
      refuse(id, code_of_image(image.error().os_error()), image.error());
    }
    go_on();
  });
}

void NativeConnection::attach_to(std::uint32_t id, native::Attach request, std::shared_ptr<StoreLane> image) {
  Sharing sharing = std::exchange(sharing_, {});
  if (request.sharing == SharingMode::none) {
    sharing = {};
  } else if (sharing.mode != request.sharing || sharing.image->lane() != image) {
    return refuse(id, native::ErrorCode::invalid,
                  Error("the regions are not what SHARE_IMAGE on this connection has brought"));
  } else if (std::ranges::any_of(request.request.regions,
                                 [](const RequestedRegion& r) { return r.page_size != kPage4K; })) {
    return refuse(id, native::ErrorCode::invalid, Error("an image is shared in pages of 4096 bytes only"));
  }
  answer_attached(id, service_.attach({.request = std::move(request.request),
                                       .uffd = std::move(request.uffd),
                                       .peer = &peer_,
                                       .connection = cookie_of(socket_.get()),
                                       .keeps_descriptor = true,
                                       .sharing = std::move(sharing)},
                                      std::move(image), this));
}

void NativeConnection::resume(std::uint32_t id, native::Resume request) {
  if (session_) return refuse(id, native::ErrorCode::invalid, Error("this connection has a session already"));
  wait();
  service_.resume(std::move(request.uffd), std::move(request.state_file), peer_, this,
                  [this, id](Result<AttachedSession> attached) {
                    answer_attached(id, std::move(attached));
                    go_on();
                  });
}

void NativeConnection::answer_attached(std::uint32_t id, Result<AttachedSession> attached) {
  if (!attached) {
    return refuse(id, code_of(attached.error().os_error()), attached.error());
  }
  session_ = attached->id;
  acknowledged_ = false;
  image_size_ = attached->image_size;
  image_ = std::move(attached->image);
  answer(id, native::Attached{.session = static_cast<native::SessionId>(attached->id),
                              .image_size = attached->image_size,
                              .regions = attached->regions,
                              .state_file = std::move(attached->state_file)});
}

Engine::Done NativeConnection::answer_when_done(std::uint32_t id, std::size_t parts) {
  struct Progress {
    std::size_t left;
    std::optional<Error> error;
  };
  auto progress = std::make_shared<Progress>(Progress{.left = parts, .error = std::nullopt});
  return service_.on_loop(this, [this, id, progress](const Result<void>& result) {
    if (!result && !progress->error) progress->error = result.error();
    if (--progress->left > 0) return;
    if (progress->error) {
      const bool used_up = progress->error->os_error() == ENOSPC;
      refuse(id, used_up ? native::ErrorCode::limit : native::ErrorCode::internal, *progress->error);
    } else {
      answer(id, native::Ok{});
    }
    send_queued();
  });
}

void NativeConnection::add_regions(std::uint32_t id, SessionId session, const native::AddRegions& request) {
  if (auto valid = validate(request.regions, image_size_); !valid)
    return refuse(id, native::ErrorCode::invalid, valid.error());
  if (auto granted = service_.may_add(peer_, request.regions); !granted)
    return refuse(id, native::ErrorCode::limit, granted.error());
  const Engine::Done done = answer_when_done(id, request.regions.size());
  for (const RequestedRegion& region : request.regions)
    service_.engine().add_region(
        session, {.memory = region.memory, .offset = region.offset, .page_size = region.page_size}, image_,
        service_.count_until_added(peer_, region, done));
}

void NativeConnection::drop_regions(std::uint32_t id, SessionId session, const native::DropRegions& request) {
  if (auto valid = validate(request.ranges); !valid)
    return refuse(id, native::ErrorCode::invalid, valid.error());
  const Engine::Done done = answer_when_done(id, request.ranges.size());
  for (const AddressRange range : request.ranges) service_.engine().drop(session, range, done);
}

void NativeConnection::detach(std::uint32_t id, SessionId session, const native::Detach& request) {
  detach_request_ = id;
  const Engine::Done ignored = [](const Result<void>&) {};
  if (request.mode == native::DetachMode::populate) {
    service_.engine().begin_detach(session, Unreadable::keep_serving, ignored);
  } else {
    service_.engine().release(session, ignored);
  }
}

void NativeConnection::session_ended(SessionEnd end) {
  session_.reset();
  const std::optional<std::uint32_t> asked = std::exchange(detach_request_, std::nullopt);
  if (!asked) {
    // The client hears by the connection's end that it has to look for a successor.
    close_after_sending();
    return send_queued();
  }
  if (end == SessionEnd::detached || end == SessionEnd::released) {
    answer(*asked, native::Ok{});
  } else {
    refuse(*asked, native::ErrorCode::internal, Error("the session ended before it was complete"));
  }
  send_queued();
}

void NativeConnection::detach_failed(const Error& error) {
  const std::optional<std::uint32_t> asked = std::exchange(detach_request_, std::nullopt);
  if (!asked) return;
  refuse(*asked, native::ErrorCode::internal, error);
  send_queued();
}

void NativeConnection::answer(std::uint32_t id, native::Answer answer) {
  out_.push_back(native::encode_answer(id, std::move(answer)));
  if (out_.size() > kUnsentFramesMax) close_after_sending();
}

void NativeConnection::refuse(std::uint32_t id, native::ErrorCode code, const Error& error) {
  service_.refused(peer_.uid, who(), error);
  answer(id, native::Refused{.code = code, .message = error.text()});
}

void NativeConnection::send_queued() {
  while (!out_.empty()) {
    native::OutgoingFrame& frame = out_.front();
    const std::vector<int> fds = sent_of_first_ == 0 ? frame.fd_numbers() : std::vector<int>();
    const Result<std::size_t> sent =
        send_some(socket_.get(), std::span(frame.bytes).subspan(sent_of_first_), fds);
    if (!sent) return service_.close(*this, socket_.get());
    step();
    sent_of_first_ += *sent;
    if (sent_of_first_ < frame.bytes.size()) {
      // A peer that does not take what is said last is not waited for.
      if (closing_) return service_.close(*this, socket_.get());
      return service_.want(*this, socket_.get(), !waiting_, true);
    }
    out_.pop_front();
    sent_of_first_ = 0;
  }
  if (session_ && !std::exchange(acknowledged_, true)) service_.acknowledged(*session_);
  if (closing_) return service_.close(*this, socket_.get());
  service_.want(*this, socket_.get(), !waiting_, false);
}

// ---- control ----------------------------------------------------------------------------------------------

ControlConnection::ControlConnection(UniqueFd socket, ConnectionService& service)
    : socket_(std::move(socket)), service_(service) {}

void ControlConnection::ready() {
  // Nothing is to be read or sent, so the client is gone.
  if (waiting_) return service_.close(*this, socket_.get());
  // One line after the other, each when the answer before it has been taken: nobody is made to hold answers.
  while (send_queued()) {
    if (waiting_) return service_.want(*this, socket_.get(), false, false);
    if (!lines_.empty()) {
      const std::string line = std::move(lines_.front());
      lines_.pop_front();
      answer(line);
      continue;
    }
    if (ended_) return service_.close(*this, socket_.get());
    ReceiveBuffer buffer;
    Result<Piece> piece = receive_some(socket_.get(), buffer);
    if (!piece) return service_.close(*this, socket_.get());
    if (piece->bytes.empty() && !piece->end) return service_.want(*this, socket_.get(), true, false);
    ended_ = piece->end;
    Result<std::vector<std::string>> lines = reader_.feed(*piece);
    if (!lines) {
      out_ += control::encode_error(lines.error());
      ended_ = true;
      continue;
    }
    for (std::string& line : *lines) lines_.push_back(std::move(line));
  }
  if (out_.empty()) return service_.close(*this, socket_.get());
  service_.want(*this, socket_.get(), false, true);
}

void ControlConnection::answer(const std::string& line) {
  const Result<control::Request> request = control::decode_request(line);
  const auto say = [this](const Result<void>& result) {
    out_ += result ? control::encode_ok(nlohmann::json::object()) : control::encode_error(result.error());
  };
  if (!request) {
    out_ += control::encode_error(request.error());
  } else if (std::holds_alternative<control::Status>(*request)) {
    out_ += control::encode_ok(service_.status());
  } else if (std::holds_alternative<control::ListenList>(*request)) {
    out_ += control::encode_ok({{"listeners", service_.listeners()}});
  } else if (const auto* remove = std::get_if<control::ListenRemove>(&*request)) {
    say(service_.remove_listener(remove->socket));
  } else if (std::holds_alternative<control::Upgrade>(*request)) {
    say(service_.upgrade());
  } else if (std::holds_alternative<control::Drain>(*request)) {
    out_ += control::encode_ok({{"sessions", service_.drain()}});
  } else {
    waiting_ = true;
    const auto say_later = [this, say](const Result<void>& result) {
      say(result);
      waiting_ = false;
      ready();
    };
    if (const auto* resume = std::get_if<control::SessionResume>(&*request))
      return service_.resume_client(resume->session, this, say_later);
    service_.add_listener(std::get<control::ListenAdd>(*request), this, say_later);
  }
}

bool ControlConnection::send_queued() {
  while (!out_.empty()) {
    const Result<std::size_t> sent = send_some(socket_.get(), std::as_bytes(std::span(out_)), {});
    if (!sent) {
      out_.clear();
      ended_ = true;
      return false;
    }
    if (*sent == 0) return false;
    out_.erase(0, *sent);
  }
  return true;
}

}  // namespace uffdkit
