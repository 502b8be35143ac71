#include "simulate/manager_client.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <uffdkit/uffd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <nlohmann/json.hpp>
#include <utility>
#include <variant>

#include "base/check.h"
#include "support/client.h"
#include "wire/unix_socket.h"

namespace uffdkit::simulate {
namespace {

constexpr std::uint64_t kRegionPages = 60;

UniqueFd duplicate(int fd) {
  return UniqueFd(linux_system_calls().duplicate(fd));
}

bool overlaps_any(const std::vector<AddressRange>& ranges, AddressRange range) {
  return std::ranges::any_of(ranges, [&](AddressRange other) { return other.overlaps(range); });
}

}  // namespace

ManagerClient::ManagerClient(const Surroundings& around, sim::Process& simulated, Speaks how)
    : ClientProcess(simulated),
      story_(around.story),
      descriptors_(around.descriptors),
      managers_(around.managers),
      places_(around.places),
      speaks_(how) {}

ManagerClient::ManagerClient(const Surroundings& around, sim::Process& simulated)
    : ManagerClient(around, simulated, around.story.one_in(2) ? Speaks::firecracker : Speaks::native) {
  const std::uint64_t features = speaks_ == Speaks::native ? kAllEvents
                                 : story_.one_in(2) ? abi::kFeatureEventRemove | abi::kFeatureEventUnmap
                                                    : abi::kFeatureEventRemove;
  uffd = Uffd::create({.required = Features(features)}, process.system_calls()).value();
  grows = story_.one_in(2);
  first_page_ = story_.draw(Managers::kImagePages - kRegionPages);
  region_ = begin_with({.memory = grows ? sim::Memory::anonymous : sim::Memory::shmem_private,
                        .length = ByteCount(kRegionPages * kPage)},
                       kMissing, first_page_);
  const std::string socket =
      speaks_ == Speaks::native ? managers_.native_socket() : managers_.firecracker_socket();
  real_ = std::make_unique<test::Child>([socket](const test::Channel& test) {
    while (test.receive() != 0) test.send_fd(0, test::connect_to(socket).get());
    return 0;
  });
}

ManagerClient::ManagerClient(const Surroundings& around, sim::Process& simulated, const ManagerClient& parent,
                             ExpectedMemory its_memory)
    : ManagerClient(around, simulated, Speaks::nothing) {
  stage_ = Stage::served;
  grows = true;
  dropped_ = parent.dropped_;
  begin_as_child(std::move(its_memory));
}

bool ManagerClient::may_do(const Doing& doing) const {
  switch (doing.kind) {
    case Doing::Kind::fork:
      // A private mapping of a file shares that file with the child, whose zeros it would read when nobody
      // serves the child any more.
      return grows && stage_ == Stage::served && !detaching_ && !is_forking();
    case Doing::Kind::access:
      return !overlaps_any(dropping_, {doing.access.address, ByteCount(1)});
    case Doing::Kind::remap:
      return !overlaps_any(dropped_, doing.range) && !overlaps_any(dropping_, doing.range);
    default:
      return !overlaps_any(dropping_, doing.range);
  }
}

void ManagerClient::forget(AddressRange range) {
  memory.forget(range);
  unknown_.push_back(range);
}

bool ManagerClient::is_unknown(Address address) const {
  return overlaps_any(unknown_, {address, ByteCount(1)});
}

bool ManagerClient::is_in_use(AddressRange range) const {
  const auto touches = [&](const Worker& worker) {
    const Doing& doing = worker.doing;
    if (doing.kind == Doing::Kind::access) return range.contains(doing.access.address);
    const bool moves = doing.kind == Doing::Kind::remap;
    return doing.changes_memory() &&
           (doing.range.overlaps(range) ||
            (moves && AddressRange{*doing.remap.to, doing.remap.new_length}.overlaps(range)));
  };
  return std::ranges::any_of(workers, touches) || overlaps_any(dropping_, range);
}

// ---- being served -----------------------------------------------------------------------------------------

void ManagerClient::connect() {
  if (stage_ != Stage::outside || !process.alive() || managers_.is_ending()) return;
  story_.note(fmt::format("process {} connects", process.pid()));
  real_->channel().send(1);
  std::uint64_t ignored = 0;
  socket_ = real_->channel().receive_fd(ignored);
  handed_over_ = descriptors_.pass(process, uffd->fd());
  stage_ = Stage::asking;
  if (speaks_ == Speaks::native) return ask_to_be_served();
  const nlohmann::json handshake = {{{"base_host_virt_addr", region_.start.value},
                                     {"size", region_.length.value},
                                     {"offset", first_page_ * kPage},
                                     {"page_size", kPage}}};
  test::send_with_fds(socket_.get(), handshake.dump(), std::array{handed_over_});
}

void ManagerClient::ask_to_be_served() {
  reader_ = native::FrameReader(native::FrameReader::Reads::answers);
  ask(native::Hello{}, [](native::Answer&) {});
  UniqueFd handed_over = duplicate(handed_over_);
  const auto attached = [this](native::Answer& answer) { hear_attached(answer); };
  if (has_session_)
    return ask(
        native::Resume{
            .session = session_, .uffd = std::move(handed_over), .state_file = duplicate(state_file_.get())},
        attached);
  ask(native::Attach{.request = {.image = "guest",
                                 .regions = {{.memory = region_,
                                              .offset = StoreOffset(first_page_ * kPage),
                                              .page_size = kPage4K}}},
                     .uffd = std::move(handed_over)},
      attached);
}

void ManagerClient::hear_attached(native::Answer& answer) {
  // One that serves it already needs no other descriptor.
  (void)descriptors_.lost(std::exchange(handed_over_, -1));
  if (auto* attached = std::get_if<native::Attached>(&answer)) {
    session_ = attached->session;
    state_file_ = std::move(attached->state_file);
    has_session_ = true;
    stage_ = Stage::served;
    story_.note(fmt::format("process {} is served", process.pid()));
    // What was not answered is asked again.
    for (const AddressRange range : dropping_) ask_to_drop(range);
    return;
  }
  if (!process.alive()) return;
  const auto* refused = std::get_if<native::Refused>(&answer);
  if (refused == nullptr) return story_.fail("ATTACH or RESUME was answered with something else");
  story_.note(fmt::format("process {} is refused: {}", process.pid(), to_string(refused->code)));
  const bool may_try_again = refused->code == native::ErrorCode::busy ||
                             refused->code == native::ErrorCode::shutting_down ||
                             refused->code == native::ErrorCode::no_such_session;
  if (!may_try_again) return story_.fail("refused: " + refused->message);
  ::shutdown(socket_.get(), SHUT_WR);
}

void ManagerClient::lose_connection() {
  story_.note(fmt::format("the connection of process {} has ended", process.pid()));
  socket_.reset();
  asked_.clear();
  const bool not_arrived = descriptors_.lost(std::exchange(handed_over_, -1));
  detaching_ = false;
  if (stage_ == Stage::complete) return;
  stage_ = speaks_ == Speaks::firecracker && !not_arrived ? Stage::served : Stage::outside;
}

void ManagerClient::break_connection() {
  if (speaks_ != Speaks::native || stage_ != Stage::served) return;
  story_.note(fmt::format("process {} breaks its connection", process.pid()));
  lose_connection();
}

void ManagerClient::kill() {
  if (!process.alive()) return;
  story_.note(fmt::format("process {} is killed", process.pid()));
  descriptors_.alone([&] { process.kill(); });
  if (real_) real_->kill();
  // Its end stays with us until the manager's has gone, with what is on its way there.
  if (speaks_ == Speaks::native && socket_) ::shutdown(socket_.get(), SHUT_WR);
}

void ManagerClient::lose_manager() {
  if (stage_ == Stage::served) stage_ = Stage::complete;
}

std::string ManagerClient::waits_for() const {
  if (!process.alive()) return "";
  const int pid = process.pid();
  if (stage_ == Stage::outside || stage_ == Stage::asking)
    return fmt::format("process {} is not served", pid);
  if (!asked_.empty()) return fmt::format("process {} waits for an answer", pid);
  for (const Worker& worker : workers)
    if (!worker.is_idle())
      return fmt::format("thread {} of process {} is {}, and nobody comes for it", worker.thread->tid(), pid,
                         to_string(worker.thread->state()));
  return "";
}

// ---- what it asks, and hears -----------------------------------------------------------------------------

void ManagerClient::ask(native::Request request, Hear hear) {
  const native::OutgoingFrame frame = native::encode_request(++last_request_, std::move(request));
  asked_[last_request_] = std::move(hear);
  const auto sent = send_all(socket_.get(), frame.bytes, frame.fd_numbers(), std::chrono::seconds(1));
  // A manager that has ended is heard of next.
  if (!sent) CHECK(sent.error().os_error() == EPIPE || sent.error().os_error() == ECONNRESET);
}

void ManagerClient::hear() {
  // What the manager kills is the process that has connected.
  if (real_ && process.alive() && real_->has_ended()) kill();
  std::array<std::byte, 4096> buffer;
  while (socket_) {
    Result<Piece> piece = receive_some(socket_.get(), buffer);
    if (!piece) return lose_connection();
    if (piece->bytes.empty() && !piece->end) return;
    const bool end = piece->end;
    story_.hear(fmt::format("{}:{} ", process.pid(), piece->bytes.size()));
    if (speaks_ == Speaks::native) hear(std::move(*piece));
    if (end) return lose_connection();
  }
}

void ManagerClient::hear(Piece piece) {
  Result<std::vector<native::Frame>> frames = reader_.feed(std::move(piece));
  if (!frames) return story_.fail("the manager says what it must not: " + frames.error().text());
  for (native::Frame& frame : *frames) {
    auto request = asked_.extract(frame.request_id);
    Result<native::Answer> answer = native::decode_answer(std::move(frame));
    if (!answer || !request) return story_.fail("the manager answers what was not asked");
    request.mapped()(*answer);
  }
}

void ManagerClient::ask_something() {
  if (speaks_ != Speaks::native || stage_ != Stage::served || detaching_ || !process.alive()) return;
  const std::uint64_t what = story_.draw(10);
  if (what < 3) return ask(native::Query{}, [](native::Answer&) {});
  if (what < 6) return add_region();
  if (what < 9) return drop_region();
  if (story_.one_in(3)) detach();
}

void ManagerClient::add_region() {
  const AddressRange range{places_.next(), ByteCount((1 + story_.draw(8)) * kPage)};
  const std::uint64_t first = story_.draw(Managers::kImagePages - 8);
  process.map({.length = range.length, .fixed = range.start}).value();
  uffd->register_range(range, kMissing).value();
  story_.note(
      fmt::format("process {} adds {:#x}+{:#x}", process.pid(), range.start.value, range.length.value));
  ask(
      native::AddRegions{
          .regions = {{.memory = range, .offset = StoreOffset(first * kPage), .page_size = kPage4K}}},
      [this, range, first](native::Answer& answer) {
        // From here on it may be touched.
        if (!std::holds_alternative<native::Ok>(answer)) return;
        memory.add(range, first);
        if (releasing_) memory.release();
      });
}

void ManagerClient::drop_region() {
  if (memory.pages().empty()) return;
  const AddressRange range{some_page(story_), ByteCount((1 + story_.draw(4)) * kPage)};
  // It touches nothing there until it has taken it out. A child that is being born has what is dropped, or
  // has it not.
  if (is_in_use(range) || is_forking()) return;
  story_.note(
      fmt::format("process {} drops {:#x}+{:#x}", process.pid(), range.start.value, range.length.value));
  memory.begin_leaving(range);
  dropping_.push_back(range);
  ask_to_drop(range);
}

void ManagerClient::ask_to_drop(AddressRange range) {
  ask(native::DropRegions{.ranges = {range}}, [this, range](native::Answer& answer) {
    if (!std::holds_alternative<native::Ok>(answer)) return;
    // Page by page: part of it may be unmapped.
    descriptors_.alone([&] {
      for (std::uint64_t at = 0; at < range.length.value; at += kPage)
        (void)uffd->unregister_range({range.start + ByteCount(at), ByteCount(kPage)});
    });
    memory.end_leaving(range, false);
    // A file that is mapped elsewhere, too, would show there the zeros that are read here.
    if (!grows) forget(range);
    dropping_.erase(std::ranges::find(dropping_, range));
    dropped_.push_back(range);
  });
}

void ManagerClient::detach() {
  const bool populates = !story_.one_in(3);
  story_.note(fmt::format("process {} is to be {}", process.pid(), populates ? "completed" : "released"));
  detaching_ = true;
  releasing_ = releasing_ || !populates;
  if (releasing_) memory.release();
  ask(native::Detach{.mode = populates ? native::DetachMode::populate : native::DetachMode::release},
      [this](native::Answer& answer) {
        detaching_ = false;
        if (!std::holds_alternative<native::Ok>(answer)) return;
        story_.note(fmt::format("process {} is its own", process.pid()));
        stage_ = Stage::complete;
        // Which takes all of its memory out, also what it has added by mremap(2).
        descriptors_.alone([&] { uffd.reset(); });
        for (const AddressRange range : std::exchange(dropping_, {})) memory.end_leaving(range, false);
      });
}

}  // namespace uffdkit::simulate
