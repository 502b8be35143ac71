#include "support/fake_manager.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>

namespace uffdkit::test {
namespace {

constexpr std::uint64_t kPage = 4096;

template <class... Fs>
struct Overloaded : Fs... {
  using Fs::operator()...;
};

UniqueFd copy_of(const UniqueFd& fd) {
  return UniqueFd(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 0));
}

ListeningSocket listen_at(const std::string& path) {
  auto listener = ListeningSocket::open(path);
  if (!listener) std::abort();
  return std::move(*listener);
}

}  // namespace

std::byte image_byte(std::uint64_t offset) {
  return static_cast<std::byte>(1 + (offset / kPage * 31 + offset % kPage) % 251);
}

FakeManager::FakeManager(const std::string& path, Script script)
    : script_(script), listener_(listen_at(path)), thread_([this] { run(); }) {}

FakeManager::~FakeManager() {
  stop_ = true;
  thread_.join();
}

void FakeManager::run() {
  while (!stop_) {
    if (hang_up_.exchange(false)) close_connection();
    std::array<pollfd, 3> entries = {
        pollfd{.fd = connection_ ? -1 : listener_.fd(), .events = POLLIN, .revents = 0},
        pollfd{.fd = connection_.get(), .events = POLLIN, .revents = 0},
        pollfd{.fd = uffd_ && script_.read_messages ? uffd_->fd() : -1, .events = POLLIN, .revents = 0}};
    if (::poll(entries.data(), entries.size(), 1) <= 0) continue;
    if (entries[0].revents != 0) accept();
    if (entries[2].revents != 0) serve_faults();
    if (entries[1].revents != 0) receive();
  }
  close_connection();
}

void FakeManager::accept() {
  Accepted accepted = listener_.accept();
  if (!accepted.socket) return;
  ++connections_;
  connection_ = std::move(accepted.socket);
  reader_ = native::FrameReader(native::FrameReader::Reads::requests);
}

void FakeManager::close_connection() {
  connection_.reset();
  uffd_.reset();
  state_file_.reset();
  regions_.clear();
}

void FakeManager::receive() {
  std::array<std::byte, 4096> buffer;
  auto piece = receive_some(connection_.get(), buffer);
  if (!piece || piece->end) return close_connection();
  auto frames = reader_.feed(std::move(*piece));
  if (!frames) return close_connection();
  for (native::Frame& frame : *frames) {
    const std::uint32_t request_id = frame.request_id;
    auto request = native::decode_request(std::move(frame));
    if (!request) return close_connection();
    if (script_.silent) continue;
    if (script_.garbage) {
      static_cast<void>(send_some(connection_.get(), std::as_bytes(std::span("this is no frame")), {}));
      continue;
    }
    const bool may_be_lost = std::holds_alternative<native::Attach>(*request) ||
                             std::holds_alternative<native::Query>(*request) ||
                             std::holds_alternative<native::Resume>(*request);
    if (may_be_lost && lost_ < script_.lose) {
      ++lost_;
      return close_connection();
    }
    if (std::holds_alternative<native::Query>(*request) && queries_held_ < script_.hold_queries) {
      ++queries_held_;
      held_.push_back(request_id);
      continue;
    }
    for (const std::uint32_t late : std::exchange(held_, {}))
      send(late, native::Status{.pages_served = 0, .faults_pending = 999});
    send(request_id, answer(std::move(*request)));
  }
}

void FakeManager::send(std::uint32_t request_id, native::Answer answer) {
  const native::OutgoingFrame frame = native::encode_answer(request_id, std::move(answer));
  static_cast<void>(
      send_all(connection_.get(), frame.bytes, frame.fd_numbers(), std::chrono::milliseconds(1000)));
}

native::Answer FakeManager::answer(native::Request request) {
  return std::visit(Overloaded{
                        [](native::Hello&) -> native::Answer { return native::Welcome{}; },
                        [&](native::ImageInfo& info) -> native::Answer {
                          if (info.image != "image")
                            return native::Refused{native::ErrorCode::no_such_image, info.image};
                          return native::ImageSize{script_.image_size};
                        },
                        [&](native::Attach& request_body) { return attach(std::move(request_body)); },
                        [&](native::Resume& request_body) { return resume(std::move(request_body)); },
                        [&](native::AddRegions& add) -> native::Answer {
                          if (auto valid = validate(add.regions, script_.image_size); !valid)
                            return native::Refused{native::ErrorCode::invalid, valid.error().message()};
                          regions_.insert(regions_.end(), add.regions.begin(), add.regions.end());
                          return native::Ok{};
                        },
                        [&](native::DropRegions& drop) -> native::Answer {
                          for (const AddressRange& range : drop.ranges)
                            std::erase_if(regions_,
                                          [&](const auto& region) { return region.memory == range; });
                          return native::Ok{};
                        },
                        [&](native::Detach& detach) -> native::Answer {
                          if (detach.mode == native::DetachMode::populate)
                            for (const RequestedRegion& region : regions_) fill(region.memory);
                          regions_.clear();
                          uffd_.reset();
                          return native::Ok{};
                        },
                        [&](native::Query&) -> native::Answer {
                          return native::Status{.pages_served = pages_served_, .faults_pending = 0};
                        },
                        // As a manager that cannot share.
                        [](native::ShareImage&) -> native::Answer {
                          return native::Refused{native::ErrorCode::internal, "no memory files"};
                        },
                        [](native::Unsupported&) -> native::Answer {
                          return native::Refused{native::ErrorCode::unsupported, ""};
                        },
                    },
                    request);
}

native::Attached FakeManager::attached() const {
  return {.session = native::SessionId{7},
          .image_size = script_.image_size,
          .regions = static_cast<std::uint32_t>(regions_.size()),
          .state_file = copy_of(state_file_)};
}

native::Answer FakeManager::attach(native::Attach attach) {
  ++attaches_;
  if (script_.refuse_attach) return native::Refused{*script_.refuse_attach, "by the script"};
  if (auto valid = validate(attach.request.regions, script_.image_size); !valid)
    return native::Refused{native::ErrorCode::invalid, valid.error().message()};
  auto uffd = Uffd::receive(attach.uffd.release());
  if (!uffd) return native::Refused{native::ErrorCode::bad_descriptor, uffd.error().message()};
  uffd_ = std::move(*uffd);
  regions_ = std::move(attach.request.regions);
  state_file_.reset(::memfd_create("state", MFD_CLOEXEC));
  const auto bytes = std::as_bytes(std::span(regions_));
  if (::pwrite(state_file_.get(), bytes.data(), bytes.size(), 0) != std::ssize(bytes)) std::abort();
  return attached();
}

native::Answer FakeManager::resume(native::Resume resume) {
  if (script_.refuse_attach) return native::Refused{*script_.refuse_attach, "by the script"};
  auto uffd = Uffd::receive(resume.uffd.release());
  if (!uffd) return native::Refused{native::ErrorCode::bad_descriptor, uffd.error().message()};
  uffd_ = std::move(*uffd);
  state_file_ = std::move(resume.state_file);
  regions_.assign(kRegionsMax, {.memory = {}, .offset = {}, .page_size = kPage4K});
  const auto bytes = std::as_writable_bytes(std::span(regions_));
  const ssize_t got = ::pread(state_file_.get(), bytes.data(), bytes.size(), 0);
  regions_.resize(static_cast<std::size_t>(std::max<ssize_t>(got, 0)) / sizeof(RequestedRegion),
                  {.memory = {}, .offset = {}, .page_size = kPage4K});
  for (const RequestedRegion& region : regions_) static_cast<void>(uffd_->wake(region.memory));
  ++resumes_;
  return attached();
}

void FakeManager::serve_faults() {
  std::array<abi::Msg, 16> messages;
  const ReadOutcome outcome = uffd_->read(messages);
  for (const abi::Msg& raw : std::span(messages).first(outcome.messages)) {
    const Message message = decode(raw);
    if (const auto* fault = std::get_if<Fault>(&message); fault != nullptr && script_.serve_pages)
      fill({Address(kPage4K.round_down(fault->address.value)), ByteCount(kPage)});
  }
}

void FakeManager::fill(AddressRange range) {
  for (Address at = range.start; at < range.end(); at = at + ByteCount(kPage)) {
    const auto region =
        std::ranges::find_if(regions_, [&](const auto& candidate) { return candidate.memory.contains(at); });
    if (region == regions_.end()) continue;
    const std::uint64_t offset = (region->offset + (at - region->memory.start)).value;
    std::array<std::byte, kPage> page;
    for (std::uint64_t i = 0; i < kPage; ++i) page[i] = image_byte(offset + i);
    const Outcome outcome = uffd_->copy(at, page);
    if (outcome.stop == Stop::complete) ++pages_served_;
    if (outcome.stop == Stop::present) static_cast<void>(uffd_->wake({at, ByteCount(kPage)}));
  }
}

}  // namespace uffdkit::test
