#include "manager/records.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <set>
#include <span>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/publish.h"
#include "base/step.h"

namespace uffdkit {
namespace {

constexpr std::array<char, 8> kMagic = {'U', 'F', 'F', 'D', 'K', 'E', 'P', 'T'};
constexpr std::uint32_t kVersion = 3;

constexpr std::size_t kListenersAt = 65'536;
constexpr std::size_t kListenersMax = 16'384;
constexpr std::size_t kImagesAt = 64u << 20;
constexpr std::size_t kImagesMax = 16'384;
constexpr std::size_t kSessionsAt = 192u << 20;
constexpr std::size_t kSessionsMax = 1u << 20;
constexpr std::size_t kCountersAt = 256u << 20;
constexpr std::size_t kCountersBytes = 192;  // of a session
constexpr std::uint32_t kNone = ~0u;

Error full(std::string_view what, std::size_t most) {
  return Error(fmt::format("there is no room to record more than {} {}", most, what), ENOSPC)
      .with_remedy("have several managers share the clients");
}

std::vector<int> open_descriptors() {
  std::vector<int> found;
  DIR* directory = ::opendir("/proc/self/fd");
  if (directory == nullptr) return found;
  const int own = ::dirfd(directory);
  // NOLINTNEXTLINE(concurrency-mt-unsafe): nobody else has this directory open.
  while (const dirent* entry = ::readdir(directory)) {
    const std::string_view name = entry->d_name;
    int fd = -1;
    if (std::from_chars(name.data(), name.data() + name.size(), fd).ec != std::errc()) continue;
    if (fd != own) found.push_back(fd);
  }
  ::closedir(directory);
  return found;
}

bool is_connected_socket(int fd) {
  int listens = 0;
  socklen_t size = sizeof listens;
  if (::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listens, &size) != 0 || listens != 0) return false;
  sockaddr_storage peer;
  size = sizeof peer;
  return ::getpeername(fd, reinterpret_cast<sockaddr*>(&peer), &size) == 0 && peer.ss_family == AF_UNIX;
}

// The lowest place of which that holds, or `count`.
template <class Holds>
std::size_t first_place(std::size_t count, const Holds& holds) {
  for (std::size_t i = 0; i < count; ++i)
    if (holds(i)) return i;
  return count;
}

}  // namespace

struct Records::FileSession {
  std::uint32_t valid;
  std::uint32_t kind;
  std::uint64_t id;
  std::uint64_t parent;
  std::uint64_t connection;
  std::int32_t uffd;
  std::int32_t state_file;
  std::int32_t process;
  std::uint32_t image;
  std::int32_t pid;
  std::uint32_t uid;
  std::uint32_t acknowledged;
  std::uint32_t shares;
};

struct Records::FileListener {
  std::uint32_t valid;
  std::uint32_t kind;
  std::uint64_t device;
  std::uint64_t inode;
  std::int32_t socket;
  std::uint32_t image;
  std::uint32_t path_bytes;
  std::uint32_t allow_bytes;
  std::array<char, 108> path;
  std::array<char, 1900> allow;
};

struct Records::FileImage {
  std::uint32_t valid;
  std::int32_t file;
  std::int32_t memory;
  std::int32_t filled;
  std::uint32_t name_bytes;
  std::uint32_t padding;
  std::uint64_t size;
  std::array<char, 4064> name;
};

Records::Records(UniqueFd file, StateMapping memory)
    : file_(std::move(file)), memory_(std::move(memory)), shared_(reinterpret_cast<Shared*>(memory_.data())) {
  static_assert(sizeof(Shared) <= kListenersAt);
  static_assert(sizeof(FileListener) == 2048 && sizeof(FileImage) == 4096 && sizeof(FileSession) == 64);
  static_assert(kListenersAt + kListenersMax * sizeof(FileListener) <= kImagesAt);
  static_assert(kImagesAt + kImagesMax * sizeof(FileImage) <= kSessionsAt);
  static_assert(kSessionsAt + kSessionsMax * sizeof(FileSession) <= kCountersAt);
  static_assert(sizeof(SessionCounters) <= kCountersBytes);
  static_assert(std::atomic<std::int32_t>::is_always_lock_free &&
                std::atomic<std::uint64_t>::is_always_lock_free);
}

Records::~Records() = default;

constexpr std::size_t kFileBytes = kCountersAt + kSessionsMax * kCountersBytes;

Result<std::unique_ptr<Records>> Records::create() {
  const std::vector<int> inherited = open_descriptors();
  if (inherited.size() > kInheritedMax)
    return Failure(Error(fmt::format("{} descriptors were open at the start, more than {}", inherited.size(),
                                     kInheritedMax))
                       .with_remedy("close them in whatever starts this program"));
  UniqueFd file(::memfd_create("uffdkit-records", MFD_CLOEXEC));
  if (!file || ::ftruncate(file.get(), kFileBytes) < 0)
    return Failure(Error::from_errno("create the records of sessions", errno));
  Result<StateMapping> memory = StateMapping::map(file.get(), 0, kFileBytes);
  if (!memory) return Failure(std::move(memory).error());
  std::unique_ptr<Records> records(new Records(std::move(file), std::move(*memory)));
  Shared& shared = records->shared();
  shared.inherited_count = static_cast<std::uint32_t>(inherited.size());
  std::ranges::copy(inherited, shared.inherited.begin());
  for (auto* none : {&shared.signals, &shared.nudge, &shared.trial_timer, &shared.keeper_pidfd,
                     &shared.standby_pidfd, &shared.worker_pidfd, &shared.exit_code})
    none->store(-1);
  shared.magic = kMagic;
  publish(shared.version, kVersion);
  return records;
}

Result<std::unique_ptr<Records>> Records::open(UniqueFd file) {
  struct stat status;
  if (::fstat(file.get(), &status) < 0 || status.st_size != static_cast<off_t>(kFileBytes))
    return Failure(Error("the records of sessions are not such a file", EBADMSG));
  Result<StateMapping> memory = StateMapping::map(file.get(), 0, kFileBytes);
  if (!memory) return Failure(std::move(memory).error());
  std::unique_ptr<Records> records(new Records(std::move(file), std::move(*memory)));
  const Shared& shared = records->shared();
  if (shared.magic != kMagic) return Failure(Error("the records of sessions are not such a file", EBADMSG));
  if (shared.version != kVersion)
    return Failure(Error(fmt::format("the records of sessions have version {}, and this program knows {}",
                                     shared.version, kVersion),
                         EBADMSG)
                       .with_remedy("let the old program end its sessions, then start the new one"));
  return records;
}

Records::FileSession* Records::session_table() const {
  return reinterpret_cast<FileSession*>(memory_.data() + kSessionsAt);
}
Records::FileListener* Records::listener_table() const {
  return reinterpret_cast<FileListener*>(memory_.data() + kListenersAt);
}
Records::FileImage* Records::image_table() const {
  return reinterpret_cast<FileImage*>(memory_.data() + kImagesAt);
}

SessionCounters& Records::counters_of(std::size_t session) const {
  return *reinterpret_cast<SessionCounters*>(memory_.data() + kCountersAt + session * kCountersBytes);
}

std::size_t Records::index_of(SessionId id) const {
  const std::size_t index =
      first_place(kSessionsMax, [&](std::size_t i) { return is_there(i) && session_table()[i].id == id; });
  CHECK(index < kSessionsMax);
  return index;
}

// One that has been counted has ended, though its record is not free yet.
bool Records::is_there(std::size_t session) const {
  return session_table()[session].valid != 0 && shared_->counted >> 1 != session + 1;
}

const Records::Totals& Records::totals() const {
  return shared_->totals[shared_->counted & 1];
}

void Records::count_and_free(std::size_t session) {
  const std::uint64_t spare = 1 - (shared_->counted & 1);
  const Totals& before = totals();
  Totals& after = shared_->totals[spare];
  after.counters.set_to_sum(before.counters, counters_of(session));
  after.sessions = before.sessions + 1;
  step();
  shared_->counted = (session + 1) << 1 | spare;
  step();
  finish_counting();
}

void Records::finish_counting() {
  const std::uint64_t counted = shared_->counted;
  if (counted >> 1 == 0) return;
  publish(session_table()[(counted >> 1) - 1].valid, 0);
  step();
  // Before the place is another's.
  shared_->counted = counted & 1;
  step();
}

// ---- of the worker that serves ----------------------------------------------------------------------------

void Records::tell_serving() {
  shared_->is_ready = 1;
  step();
  shared_->is_serving = 1;
  step();
  nudge_keeper();
}

void Records::ask_for_upgrade() {
  shared_->upgrade = 1;
  nudge_keeper();
}

void Records::nudge_keeper() const {
  const std::uint64_t one = 1;
  (void)!::write(shared_->nudge, &one, sizeof one);
}

Result<std::size_t> Records::use_image(const std::shared_ptr<StoreLane>& lane) {
  if (const auto known = images_.find(lane.get()); known != images_.end()) {
    ++known->second.users;
    return known->second.index;
  }
  const std::string name = lane->store()->name();
  FileImage* table = image_table();
  if (name.size() > table->name.size())
    return Failure(
        Error(fmt::format("the image's name has {} bytes, more than {}", name.size(), table->name.size()),
              ENAMETOOLONG));
  const std::size_t index = first_place(kImagesMax, [&](std::size_t i) { return table[i].valid == 0; });
  if (index == kImagesMax) return Failure(full("images", kImagesMax));
  FileImage& record = table[index];
  step();
  record.file = lane->file();
  record.memory = -1;
  record.filled = -1;
  record.size = lane->store()->size().value;
  record.name_bytes = static_cast<std::uint32_t>(name.size());
  std::memcpy(record.name.data(), name.data(), name.size());
  step();
  publish(record.valid, 1);
  step();
  images_[lane.get()] = {.index = index, .users = 1};
  return index;
}

void Records::leave_image(const StoreLane* lane) {
  const auto found = images_.find(lane);
  CHECK(found != images_.end());
  if (--found->second.users > 0) return;
  publish(image_table()[found->second.index].valid, 0);
  images_.erase(found);
}

Result<SessionCounters*> Records::add(const Session& session, std::shared_ptr<StoreLane> lane,
                                      std::shared_ptr<SharedImage> memory) {
  const std::lock_guard lock(mutex_);
  FileSession* table = session_table();
  const std::size_t index = first_place(kSessionsMax, [&](std::size_t i) { return table[i].valid == 0; });
  if (index == kSessionsMax) return Failure(full("sessions", kSessionsMax));
  const Result<std::size_t> image = use_image(lane);
  if (!image) return Failure(image.error());
  if (memory) {
    // One at a time: whoever shares this image shares the same.
    image_table()[*image].memory = memory->file();
    image_table()[*image].filled = memory->filled_file();
  }
  table[index] = {.valid = 0,
                  .kind = static_cast<std::uint32_t>(session.kind),
                  .id = session.id,
                  .parent = session.parent,
                  .connection = session.connection,
                  .uffd = session.uffd,
                  .state_file = session.state_file,
                  .process = session.process,
                  .image = static_cast<std::uint32_t>(*image),
                  .pid = session.pid,
                  .uid = session.uid,
                  .acknowledged = session.acknowledged,
                  .shares = session.shares};
  counters_of(index).set_to_sum({}, {});
  // First, so that no later worker gives its number to another.
  if (shared_->last_session < session.id) shared_->last_session = session.id;
  step();
  publish(table[index].valid, 1);
  step();
  sessions_[session.id] = {.index = index, .lane = std::move(lane), .memory = std::move(memory)};
  return &counters_of(index);
}

Result<SessionCounters*> Records::add_fork(SessionId parent, SessionId id, int uffd, int state_file) {
  Session session{.id = id,
                  .parent = parent,
                  .kind = SessionKind::fork,
                  .uffd = uffd,
                  .state_file = state_file,
                  .acknowledged = true};
  std::shared_ptr<StoreLane> lane;
  std::shared_ptr<SharedImage> memory;
  {
    const std::lock_guard lock(mutex_);
    const auto found = sessions_.find(parent);
    if (found == sessions_.end()) return Failure(Error("its parent is not recorded", ESRCH));
    const FileSession& record = session_table()[found->second.index];
    session.uid = record.uid;
    session.shares = record.shares != 0;
    lane = found->second.lane;
    memory = found->second.memory;
  }
  return add(session, std::move(lane), std::move(memory));
}

void Records::acknowledge(SessionId id) {
  const std::lock_guard lock(mutex_);
  const auto found = sessions_.find(id);
  step();
  if (found != sessions_.end()) publish(session_table()[found->second.index].acknowledged, 1);
  step();
}

void Records::free(SessionId id, HasEnded has_ended) {
  // These may be the last ones, and go without the lock.
  std::shared_ptr<StoreLane> lane;
  std::shared_ptr<SharedImage> memory;
  const std::lock_guard lock(mutex_);
  const auto found = sessions_.find(id);
  if (found == sessions_.end()) return;
  step();
  if (has_ended == HasEnded::yes)
    count_and_free(found->second.index);
  else
    publish(session_table()[found->second.index].valid, 0);
  step();
  lane = std::move(found->second.lane);
  memory = std::move(found->second.memory);
  leave_image(lane.get());
  sessions_.erase(found);
}

Result<void> Records::add(const Listener& listener, const std::shared_ptr<StoreLane>& lane) {
  const std::lock_guard lock(mutex_);
  FileListener* table = listener_table();
  const std::size_t index = first_place(kListenersMax, [&](std::size_t i) { return table[i].valid == 0; });
  if (index == kListenersMax) return Failure(full("sockets", kListenersMax));
  std::uint32_t image_index = kNone;
  if (lane) {
    const Result<std::size_t> image = use_image(lane);
    if (!image) return Failure(image.error());
    image_index = static_cast<std::uint32_t>(*image);
  }
  CHECK(listener.path.size() <= table->path.size());
  if (listener.allow.size() > table->allow.size())
    return Failure(Error(fmt::format("the users who may connect to {} are too many to record", listener.path),
                         ENAMETOOLONG)
                       .with_remedy("name a group that they are in"));
  FileListener& record = table[index];
  record.kind = static_cast<std::uint32_t>(listener.kind);
  record.device = listener.device;
  record.inode = listener.inode;
  record.socket = listener.socket;
  record.image = image_index;
  record.path_bytes = static_cast<std::uint32_t>(listener.path.size());
  std::memcpy(record.path.data(), listener.path.data(), listener.path.size());
  record.allow_bytes = static_cast<std::uint32_t>(listener.allow.size());
  std::memcpy(record.allow.data(), listener.allow.data(), listener.allow.size());
  publish(record.valid, 1);
  listeners_[listener.socket] = lane;
  return {};
}

void Records::remove_listener(int socket) {
  const std::lock_guard lock(mutex_);
  const auto found = listeners_.find(socket);
  if (found == listeners_.end()) return;
  for (FileListener& record : std::span(listener_table(), kListenersMax)) {
    if (record.valid == 0 || record.socket != socket) continue;
    publish(record.valid, 0);
    break;
  }
  if (found->second) leave_image(found->second.get());
  listeners_.erase(found);
}

// ---- of a worker that takes up ----------------------------------------------------------------------------

std::vector<Records::Session> Records::sessions() const {
  const std::lock_guard lock(mutex_);
  std::vector<Session> all;
  for (std::size_t i = 0; i < kSessionsMax; ++i) {
    const FileSession& record = session_table()[i];
    // Beyond the last one that was ever used, all is zero.
    if (record.kind == 0) break;
    if (!is_there(i)) continue;
    all.push_back({.id = record.id,
                   .parent = record.parent,
                   .kind = static_cast<SessionKind>(record.kind),
                   .pid = record.pid,
                   .uid = record.uid,
                   .uffd = record.uffd,
                   .state_file = record.state_file,
                   .process = record.process,
                   .connection = record.connection,
                   .acknowledged = record.acknowledged != 0,
                   .shares = record.shares != 0,
                   .image = record.image});
  }
  // This one's share of a whole turn is that of the golden ratio's multiples, which lie evenly whatever their
  // number.
  const std::uint64_t share = (shared_->workers * 0x9e37'79b9u) & 0xffff'ffffu;
  std::ranges::rotate(all, all.begin() + static_cast<std::ptrdiff_t>(share * all.size() >> 32));
  std::set<SessionId> parents;
  for (const Session& session : all) parents.insert(session.parent);
  std::ranges::partition(all, [&](const Session& session) {
    return parents.contains(session.id) && !SessionState::forks_in_inbox(session.state_file).empty();
  });
  return all;
}

std::vector<Records::Listener> Records::listeners() const {
  const std::lock_guard lock(mutex_);
  return all_listeners();
}

std::vector<Records::Listener> Records::all_listeners() const {
  std::vector<Listener> all;
  for (const FileListener& record : std::span(listener_table(), kListenersMax)) {
    if (record.kind == 0) break;
    if (record.valid == 0) continue;
    all.push_back({.kind = static_cast<ListenerKind>(record.kind),
                   .socket = record.socket,
                   .device = record.device,
                   .inode = record.inode,
                   .path = std::string(record.path.data(), record.path_bytes),
                   .allow = std::string(record.allow.data(), record.allow_bytes),
                   .image = record.image});
  }
  return all;
}

Records::Image Records::image(std::size_t index) const {
  const std::lock_guard lock(mutex_);
  const FileImage& record = image_table()[index];
  return {.file = record.file,
          .name = std::string(record.name.data(), record.name_bytes),
          .size = ByteCount(record.size),
          .memory = record.memory,
          .filled = record.filled};
}

void Records::hold_image(std::size_t index, const StoreLane* lane) {
  const std::lock_guard lock(mutex_);
  ++images_.try_emplace(lane, ImageUse{.index = index, .users = 0}).first->second.users;
}

void Records::release_image(const StoreLane* lane) {
  const std::lock_guard lock(mutex_);
  leave_image(lane);
}

const SessionCounters& Records::give_up(const Session& session) {
  const std::lock_guard lock(mutex_);
  const std::size_t index = index_of(session.id);
  count_and_free(index);
  return counters_of(index);
}

void Records::give_up(const Listener& listener) {
  const std::lock_guard lock(mutex_);
  for (FileListener& record : std::span(listener_table(), kListenersMax)) {
    if (record.kind == 0) return;
    if (record.valid != 0 && record.socket == listener.socket) publish(record.valid, 0);
  }
}

SessionCounters* Records::taken_up(const Session& session, std::shared_ptr<StoreLane> lane,
                                   std::shared_ptr<SharedImage> memory) {
  const std::lock_guard lock(mutex_);
  const std::size_t index = index_of(session.id);
  ++images_.try_emplace(lane.get(), ImageUse{.index = session.image, .users = 0}).first->second.users;
  sessions_[session.id] = {.index = index, .lane = std::move(lane), .memory = std::move(memory)};
  return &counters_of(index);
}

void Records::taken_up(const Listener& listener, std::shared_ptr<StoreLane> lane) {
  const std::lock_guard lock(mutex_);
  if (lane)
    ++images_.try_emplace(lane.get(), ImageUse{.index = listener.image, .users = 0}).first->second.users;
  listeners_[listener.socket] = std::move(lane);
}

template <class Is>
bool Records::has_session(const Is& is) const {
  const std::lock_guard lock(mutex_);
  for (const FileSession& record : std::span(session_table(), kSessionsMax)) {
    if (record.kind == 0) return false;
    if (record.valid != 0 && is(record)) return true;
  }
  return false;
}

bool Records::has_uffd(int fd) const {
  return has_session([fd](const FileSession& session) { return session.uffd == fd; });
}

bool Records::has_connection(std::uint64_t cookie) const {
  return cookie != 0 &&
         has_session([cookie](const FileSession& session) { return session.connection == cookie; });
}

std::vector<UniqueFd> Records::sweep() {
  const std::lock_guard lock(mutex_);
  finish_counting();
  std::set<int> kept(shared_->inherited.begin(), shared_->inherited.begin() + shared_->inherited_count);
  for (const auto* fd : {&shared_->signals, &shared_->nudge, &shared_->trial_timer, &shared_->keeper_pidfd,
                         &shared_->standby_pidfd, &shared_->worker_pidfd})
    kept.insert(fd->load());
  kept.insert(file_.get());
  std::set<std::uint32_t> images;
  std::set<std::uint32_t> shared_images;
  for (FileSession& record : std::span(session_table(), kSessionsMax)) {
    if (record.kind == 0) break;
    if (record.valid != 0 && record.kind == static_cast<std::uint32_t>(SessionKind::native) &&
        record.acknowledged == 0)
      publish(record.valid, 0);
    if (record.valid == 0) continue;
    images.insert(record.image);
    if (record.shares != 0) shared_images.insert(record.image);
    kept.insert({record.uffd, record.state_file, record.process});
    for (const int child : SessionState::forks_in_inbox(record.state_file)) kept.insert(child);
  }
  for (const Listener& listener : all_listeners()) {
    kept.insert(listener.socket);
    if (listener.kind == ListenerKind::firecracker) images.insert(static_cast<std::uint32_t>(listener.image));
  }
  for (std::uint32_t i = 0; i < kImagesMax; ++i) {
    FileImage& record = image_table()[i];
    if (record.name_bytes == 0) break;
    if (record.valid == 0) continue;
    if (images.contains(i)) {
      kept.insert(record.file);
      // Else these are numbers of long ago.
      if (shared_images.contains(i)) kept.insert({record.memory, record.filled});
    } else {
      publish(record.valid, 0);
    }
  }

  std::vector<UniqueFd> connected;
  for (const int fd : open_descriptors()) {
    if (kept.contains(fd)) continue;
    step();
    UniqueFd left(fd);
    if (is_connected_socket(fd)) connected.push_back(std::move(left));
  }
  return connected;
}

}  // namespace uffdkit
