#include "client/session.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/check.h"
#include "base/signals_blocked.h"
#include "client/backoff.h"
#include "wire/attach_request.h"
#include "wire/unix_socket.h"

namespace uffdkit::internal {
namespace {

using Clock = std::chrono::steady_clock;
using State = RemoteConnection::State;
using std::chrono::milliseconds;

constexpr milliseconds kPauseFirst{100};
// Before a request whose connection was lost is made to whoever listens now.
constexpr milliseconds kPauseLost{2};
constexpr milliseconds kPauseMax{2000};
// connect(2) to a listener whose queue is full cannot be interrupted, and destruction waits for the watcher.
constexpr milliseconds kReconnectLimit{100};

Result<UniqueFd> copy_of(int fd) {
  UniqueFd copy(::fcntl(fd, F_DUPFD_CLOEXEC, 0));
  if (!copy) return Failure(Error::from_errno("copy a descriptor", errno));
  return copy;
}

// What is left of `ranges` without `removed`.
std::vector<AddressRange> subtract(std::span<const AddressRange> ranges, AddressRange removed) {
  std::vector<AddressRange> left;
  for (const AddressRange& range : ranges) {
    if (!range.overlaps(removed)) {
      left.push_back(range);
      continue;
    }
    if (range.start < removed.start) left.push_back({range.start, removed.start - range.start});
    if (removed.end() < range.end()) left.push_back({removed.end(), range.end() - removed.end()});
  }
  return left;
}

}  // namespace

RemoteSessionCore::RemoteSessionCore(Channel channel, std::string socket, Uffd uffd,
                                     native::Attached attached, std::span<const RequestedRegion> regions,
                                     SharingMode sharing, const RemoteLimits& limits, UniqueFd stop)
    : owner_(::getpid()),
      socket_(std::move(socket)),
      limits_(limits),
      image_size_(attached.image_size),
      sharing_(sharing),
      stop_(std::move(stop)),
      channel_(std::move(channel)),
      uffd_(std::move(uffd)),
      session_(attached.session),
      state_file_(std::move(attached.state_file)) {
  for (const RequestedRegion& region : regions) served_.push_back(region.memory);
}

Result<std::unique_ptr<RemoteSessionCore>> RemoteSessionCore::start(Channel channel, std::string socket,
                                                                    const std::string& image, Uffd uffd,
                                                                    std::span<const RequestedRegion> regions,
                                                                    SharingMode sharing,
                                                                    const RemoteLimits& limits) {
  Result<UniqueFd> sent_uffd = copy_of(uffd.fd());
  if (!sent_uffd) return Failure(std::move(sent_uffd).error());
  UniqueFd stop(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!stop) return Failure(Error::from_errno("make an eventfd", errno));
  const Clock::time_point give_up = Clock::now() + limits.answer;
  const auto attach = [&](UniqueFd sent) {
    return channel.ask<native::Attached>(
        native::Attach{.request = {.image = image, .regions = {regions.begin(), regions.end()}},
                       .uffd = std::move(sent),
                       .sharing = sharing},
        {.limit = limits.answer});
  };
  Result<native::Attached> attached = attach(std::move(*sent_uffd));
  // Whoever shares the image's memory asks for that anew, too.
  while (!attached && is_lost(attached.error()) && sharing == SharingMode::none && Clock::now() < give_up) {
    std::this_thread::sleep_for(kPauseLost);
    Result<Channel> next = Channel::open(socket, limits.answer, {.limit = limits.answer});
    sent_uffd = copy_of(uffd.fd());
    if (!next || !sent_uffd) continue;
    channel = std::move(*next);
    attached = attach(std::move(*sent_uffd));
  }
  if (!attached) {
    // The manager may have taken the descriptor all the same, and unmapping would then wait for it.
    for (const RequestedRegion& region : regions) static_cast<void>(uffd.unregister_range(region.memory));
    return Failure(std::move(attached).error().within("attach to " + image));
  }
  std::unique_ptr<RemoteSessionCore> core(new RemoteSessionCore(std::move(channel), std::move(socket),
                                                                std::move(uffd), std::move(*attached),
                                                                regions, sharing, limits, std::move(stop)));
  if (auto started = core->start_watcher(); !started) return Failure(std::move(started).error());
  return core;
}

RemoteSessionCore::~RemoteSessionCore() {
  if (::getpid() != owner_) {
    // A forked child: the watcher does not exist here, and an ioctl would reach the parent's memory.
    static_cast<void>(watcher_.release());
    return;
  }
  stop_watcher();
  let_go();
}

std::uint64_t RemoteSessionCore::id() const {
  const std::lock_guard lock(mutex_);
  return static_cast<std::uint64_t>(session_);
}

RemoteConnection RemoteSessionCore::connection() const {
  const std::lock_guard lock(mutex_);
  return connection_;
}

Result<void> RemoteSessionCore::check_attached() const {
  switch (connection_.state) {
    case State::attached:
      return {};
    case State::detached:
      return Failure(Error("the session was detached"));
    case State::looking:
    case State::given_up:
      break;
  }
  return Failure(Error(fmt::format("no manager at {} at this moment: {}", socket_, connection_.last_error))
                     .with_remedy("start the manager again; the session goes on with it"));
}

template <class A, class Make>
Result<A> RemoteSessionCore::ask(std::unique_lock<std::mutex>& lock, const Make& make,
                                 const Patience& patience) {
  const Clock::time_point give_up = Clock::now() + limits_.answer;
  for (;;) {
    if (auto attached = check_attached(); !attached) return Failure(std::move(attached).error());
    const std::uint64_t resumes = connection_.resumes;
    // NOLINTNEXTLINE(bugprone-unchecked-optional-access): whoever is attached has one.
    Result<A> answer = channel_->ask<A>(make(), patience);
    if (answer || !is_lost(answer.error())) return answer;
    const auto found = [&] { return connection_.resumes != resumes || connection_.state == State::given_up; };
    if (!found_manager_.wait_until(lock, give_up, found)) return answer;
  }
}

Result<void> RemoteSessionCore::add(const RequestedRegion& region) {
  if (auto valid = validate(std::span(&region, 1), image_size_); !valid) return valid;
  std::unique_lock lock(mutex_);
  if (auto attached = check_attached(); !attached) return attached;
  // Asked here, not left to the manager: unregistering after its refusal would hit memory that is served.
  for (const AddressRange& served : served_)
    if (served.overlaps(region.memory))
      return Failure(Error(fmt::format("[{:#x}, {:#x}) overlaps with memory that is served",
                                       region.memory.start.value, region.memory.end().value),
                           EEXIST));
  if (auto registered = uffd_.register_range(region.memory, kMissing); !registered)
    return Failure(std::move(registered).error());
  const Result<native::Ok> added = ask<native::Ok>(
      lock, [&] { return native::AddRegions{.regions = {region}}; }, {.limit = limits_.answer});
  if (!added) {
    static_cast<void>(uffd_.unregister_range(region.memory));  // nobody uses it yet; the first error matters
    return Failure(Error(added.error()).within("add a region"));
  }
  served_.push_back(region.memory);
  return {};
}

Result<void> RemoteSessionCore::drop(AddressRange range) {
  if (auto valid = validate(std::span(&range, 1)); !valid) return valid;
  std::unique_lock lock(mutex_);
  const Result<native::Ok> dropped = ask<native::Ok>(
      lock, [&] { return native::DropRegions{.ranges = {range}}; }, {.limit = limits_.answer});
  if (!dropped) return Failure(Error(dropped.error()).within("drop a range"));
  if (auto unregistered = uffd_.unregister_range(range); !unregistered)
    return Failure(std::move(unregistered).error().within("drop a range"));
  served_ = subtract(served_, range);
  return {};
}

Result<RemoteStatus> RemoteSessionCore::query() {
  std::unique_lock lock(mutex_);
  const Result<native::Status> status =
      ask<native::Status>(lock, [] { return native::Query{}; }, {.limit = limits_.answer});
  if (!status) return Failure(status.error());
  return RemoteStatus{.pages_served = status->pages_served, .faults_pending = status->faults_pending};
}

Result<void> RemoteSessionCore::detach(DetachWay way) {
  {
    std::unique_lock lock(mutex_);
    if (connection_.state == State::detached) return {};
    if (auto attached = check_attached(); !attached) return attached;
    const bool populate = way == DetachWay::populate;
    Patience patience;
    if (!populate) patience.limit = limits_.answer;
    const Result<native::Ok> done = ask<native::Ok>(
        lock,
        [&] {
          return native::Detach{.mode =
                                    populate ? native::DetachMode::populate : native::DetachMode::release};
        },
        patience);
    if (!done) return Failure(Error(done.error()).within("detach"));
    connection_.state = State::detached;
  }
  stop_watcher();
  let_go();
  return {};
}

Result<void> RemoteSessionCore::start_watcher() {
  const SignalsBlocked blocked;
  try {
    watcher_ = std::make_unique<std::thread>([this] { watch(); });
  } catch (const std::system_error& error) {
    return Failure(Error::from_errno("start a thread", error.code().value()));
  }
  return {};
}

void RemoteSessionCore::stop_watcher() {
  if (!watcher_) return;
  const std::uint64_t one = 1;
  CHECK(::write(stop_.get(), &one, sizeof one) == sizeof one);
  watcher_->join();
  watcher_.reset();
}

void RemoteSessionCore::let_go() {
  const std::lock_guard lock(mutex_);
  // Before the descriptors are closed, and without the manager's help: munmap(2) of memory that is registered
  // would wait until somebody reads the event. Closing unregisters what this cannot (memory that was moved).
  for (const AddressRange& range : served_) static_cast<void>(uffd_.unregister_range(range));
  served_.clear();
  if (channel_) channel_->close_both_ways();
  channel_.reset();
  state_file_.reset();
  UniqueFd(uffd_.release()).reset();
}

void RemoteSessionCore::watch() {
  for (;;) {
    int socket = -1;
    {
      const std::lock_guard lock(mutex_);
      if (channel_) socket = channel_->fd();
    }
    // Only the end is waited for: answers belong to whoever asked.
    std::array<pollfd, 2> entries = {pollfd{.fd = stop_.get(), .events = POLLIN, .revents = 0},
                                     pollfd{.fd = socket, .events = POLLRDHUP, .revents = 0}};
    if (::poll(entries.data(), entries.size(), -1) < 0) continue;
    if (entries[0].revents != 0) return;
    if (entries[1].revents == 0) continue;
    {
      const std::lock_guard lock(mutex_);
      if (connection_.state == State::detached) return;
      connection_.state = State::looking;
      connection_.last_error = "the connection ended";
      channel_.reset();
    }
    if (!find_manager()) return;
  }
}

bool RemoteSessionCore::find_manager() {
  const Clock::time_point lost = Clock::now();
  for (Backoff pauses(kPauseFirst, kPauseMax);;) {
    const Result<void> resumed = resume();
    if (resumed) return true;
    const milliseconds pause = pauses.next();
    const bool give_up = limits_.resume && Clock::now() + pause - lost > *limits_.resume;
    {
      const std::lock_guard lock(mutex_);
      connection_.last_error = resumed.error().message();
      if (give_up) connection_.state = State::given_up;
    }
    if (give_up) found_manager_.notify_all();
    if (give_up || stopped_within(pause)) return false;
  }
}

Result<void> RemoteSessionCore::resume() {
  const Patience patience{.limit = limits_.answer, .cancel_fd = stop_.get()};
  Result<Channel> channel = Channel::open(socket_, std::min(kReconnectLimit, limits_.answer), patience);
  if (!channel) return Failure(std::move(channel).error());
  // Without the lock: while there is no channel, nobody else uses or changes what is read here.
  Result<UniqueFd> uffd = copy_of(uffd_.fd());
  if (!uffd) return Failure(std::move(uffd).error());
  Result<UniqueFd> state_file = copy_of(state_file_.get());
  if (!state_file) return Failure(std::move(state_file).error());
  Result<native::Attached> attached = channel->ask<native::Attached>(
      native::Resume{.session = session_, .uffd = std::move(*uffd), .state_file = std::move(*state_file)},
      patience);
  if (!attached) return Failure(std::move(attached).error());

  const std::lock_guard lock(mutex_);
  channel_ = std::move(*channel);
  session_ = attached->session;
  state_file_ = std::move(attached->state_file);
  connection_.state = State::attached;
  ++connection_.resumes;
  found_manager_.notify_all();
  return {};
}

bool RemoteSessionCore::stopped_within(milliseconds pause) const {
  pollfd entry{.fd = stop_.get(), .events = POLLIN, .revents = 0};
  return ::poll(&entry, 1, static_cast<int>(pause.count())) > 0;
}

}  // namespace uffdkit::internal
