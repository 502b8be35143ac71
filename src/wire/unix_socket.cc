#include "wire/unix_socket.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <poll.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstring>
#include <thread>
#include <utility>

#include "base/check.h"

namespace uffdkit {
namespace {

using Clock = std::chrono::steady_clock;

// Debian 12's headers lack it; the number is that of every architecture but parisc and sparc.
constexpr int kSoPeerPidfd = 77;
// SCM_MAX_FD: no message brings more.
constexpr std::size_t kFdsPerMessageMax = 253;
constexpr int kBacklog = 128;
// How long to wait for others who are opening sockets in the same directory; they need microseconds.
constexpr std::chrono::seconds kDirectoryLockLimit{2};

Result<sockaddr_un> address_of(const std::string& path) {
  if (path.empty())
    return Failure(Error("socket path is empty", EINVAL).with_remedy("give the path of a file"));
  if (path.size() > kSocketPathBytesMax)
    return Failure(Error(fmt::format("socket path {} has {} bytes, more than the system's limit of {}", path,
                                     path.size(), kSocketPathBytesMax),
                         ENAMETOOLONG)
                       .with_remedy("use a shorter path, or one relative to the working directory"));
  if (path.find('\0') != std::string::npos) return Failure(Error("socket path has a zero byte", EINVAL));
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  return address;
}

const sockaddr* generic(const sockaddr_un& address) {
  return reinterpret_cast<const sockaddr*>(&address);
}

Result<UniqueFd> new_socket(int extra_type) {
  UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | extra_type, 0));
  if (!fd) return Failure(Error::from_errno("make a unix socket", errno));
  return fd;
}

std::string directory_of(const std::string& path) {
  const std::size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

// Keeps other processes from replacing the same dead socket at the same time: the one who comes second would
// remove the living one of the first. A lock on the directory leaves no file behind.
Result<UniqueFd> lock_directory(const std::string& path) {
  const std::string directory = directory_of(path);
  UniqueFd fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!fd) return Failure(Error::from_open("the directory " + directory, errno));
  const auto give_up = Clock::now() + kDirectoryLockLimit;
  while (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK || Clock::now() >= give_up)
      return Failure(Error::from_errno("lock the directory " + directory, errno)
                         .with_remedy("another program holds a lock on it: choose another directory"));
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  return fd;
}

// Removes the file at `path` if it is the socket of a dead listener. Ok if nothing is there in the end.
Result<void> clear_stale(const std::string& path, const sockaddr_un& address) {
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) {
    if (errno == ENOENT) return {};
    return Failure(Error::from_errno("look at " + path, errno));
  }
  if (!S_ISSOCK(info.st_mode))
    return Failure(Error(path + " exists and is not a socket", EEXIST)
                       .with_remedy("choose another path; it is not removed for you"));
  Result<UniqueFd> probe = new_socket(SOCK_NONBLOCK);
  if (!probe) return Failure(std::move(probe).error());
  if (::connect(probe->get(), generic(address), sizeof address) != 0) {
    const int why = errno;
    if (why == ECONNREFUSED) {
      if (::unlink(path.c_str()) == 0 || errno == ENOENT) return {};
      return Failure(Error::from_errno("remove the socket of a dead listener, " + path, errno));
    }
    if (why == ENOENT) return {};
    // EAGAIN: a listener whose queue is full. Anything else: who knows.
    if (why != EAGAIN) return Failure(Error::from_errno("see whether somebody listens at " + path, why));
  }
  return Failure(Error("somebody listens at " + path + " already", EADDRINUSE)
                     .with_remedy("end that program (ss -xlp names it), or choose another path"));
}

void collect_fds(const msghdr& message, std::vector<UniqueFd>& fds) {
  for (const cmsghdr* part = CMSG_FIRSTHDR(&message); part != nullptr;
       part = CMSG_NXTHDR(const_cast<msghdr*>(&message), const_cast<cmsghdr*>(part))) {
    if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) continue;
    const std::size_t count = (part->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (std::size_t i = 0; i < count; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(part) + i * sizeof(int), sizeof fd);
      fds.emplace_back(fd);
    }
  }
}

Result<std::vector<gid_t>> groups_of_peer(int socket) {
  std::vector<gid_t> groups(16);
  while (true) {
    socklen_t bytes = static_cast<socklen_t>(groups.size() * sizeof(gid_t));
    const int failed = ::getsockopt(socket, SOL_SOCKET, SO_PEERGROUPS, groups.data(), &bytes);
    // It says how many bytes it needs.
    const bool too_short = failed != 0 && errno == ERANGE && bytes > groups.size() * sizeof(gid_t);
    if (failed != 0 && !too_short)
      return Failure(Error::from_errno("ask for the groups at the other end of a socket", errno));
    groups.resize(bytes / sizeof(gid_t));
    if (!too_short) return groups;
  }
}

int poll_ms(Clock::time_point until) {
  const auto left = std::chrono::ceil<std::chrono::milliseconds>(until - Clock::now()).count();
  return static_cast<int>(std::clamp<long>(left, 0, 60'000));
}

}  // namespace

Result<ListeningSocket> ListeningSocket::open(const std::string& path) {
  const Result<sockaddr_un> address = address_of(path);
  if (!address) return Failure(address.error());
  const Result<UniqueFd> lock = lock_directory(path);
  if (!lock) return Failure(lock.error());
  if (auto cleared = clear_stale(path, *address); !cleared) return Failure(cleared.error());

  Result<UniqueFd> fd = new_socket(SOCK_NONBLOCK);
  if (!fd) return Failure(fd.error());
  // On Linux the file gets the socket's own mode, less the umask: so it is never wider, not for an instant.
  if (::fchmod(fd->get(), 0600) != 0) return Failure(Error::from_errno("restrict " + path, errno));
  if (::bind(fd->get(), generic(*address), sizeof *address) != 0) {
    Error error = Error::from_errno("bind " + path, errno);
    if (error.os_error() == EACCES)
      error = std::move(error).with_remedy("choose a directory that this user may write to");
    return Failure(std::move(error));
  }
  struct stat info;
  if (::lstat(path.c_str(), &info) != 0) return Failure(Error::from_errno("look at " + path, errno));
  ListeningSocket made(std::move(*fd), path, info.st_dev, info.st_ino);
  if ((info.st_mode & 0177) != 0)
    return Failure(
        Error(fmt::format("{} came out with mode {:o}, open to others", path, info.st_mode & 07777), EPERM)
            .with_remedy("use a directory on a file system that keeps modes, such as /run"));
  if (::listen(made.fd(), kBacklog) != 0) return Failure(Error::from_errno("listen at " + path, errno));
  return made;
}

ListeningSocket::ListeningSocket(ListeningSocket&& other) noexcept = default;

ListeningSocket& ListeningSocket::operator=(ListeningSocket&& other) noexcept {
  if (this == &other) return *this;
  remove_file();
  fd_ = std::move(other.fd_);
  path_ = std::move(other.path_);
  device_ = other.device_;
  inode_ = other.inode_;
  return *this;
}

ListeningSocket::~ListeningSocket() {
  remove_file();
}

void ListeningSocket::remove_file() {
  if (!fd_) return;
  // While the socket is open its inode number cannot go to another file.
  struct stat info;
  if (::lstat(path_.c_str(), &info) == 0 && info.st_dev == device_ && info.st_ino == inode_)
    ::unlink(path_.c_str());
}

Accepted ListeningSocket::accept() const {
  for (;;) {
    const int fd = ::accept4(fd_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd >= 0) return {.socket = UniqueFd(fd)};
    if (errno == EINTR || errno == ECONNABORTED) continue;
    return {.socket = UniqueFd(), .os_error = errno == EAGAIN ? 0 : errno};
  }
}

Result<UniqueFd> connect_unix(const std::string& path, std::chrono::milliseconds limit) {
  const Result<sockaddr_un> address = address_of(path);
  if (!address) return Failure(address.error());
  Result<UniqueFd> fd = new_socket(SOCK_NONBLOCK);
  if (!fd) return fd;
  const auto give_up = Clock::now() + limit;
  // A full queue cannot be waited for by poll(2): an unconnected socket never becomes ready.
  while (::connect(fd->get(), generic(*address), sizeof *address) != 0) {
    if (errno == EINTR) continue;
    if (errno == EAGAIN && Clock::now() < give_up) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
      continue;
    }
    const int why = errno == EAGAIN ? ETIMEDOUT : errno;
    Error error = Error::from_errno("connect to " + path, why);
    if (why == ENOENT || why == ECONNREFUSED)
      error = std::move(error).with_remedy("nobody listens there: is the manager running?");
    return Failure(std::move(error));
  }
  return fd;
}

Result<std::size_t> send_some(int socket, std::span<const std::byte> bytes, std::span<const int> fds) {
  CHECK(!bytes.empty() && fds.size() <= kFdsPerMessageMax);
  iovec part{.iov_base = const_cast<std::byte*>(bytes.data()), .iov_len = bytes.size()};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kFdsPerMessageMax * sizeof(int))> control{};
  if (!fds.empty()) {
    message.msg_control = control.data();
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
  }
  for (;;) {
    const ssize_t sent = ::sendmsg(socket, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent >= 0) return static_cast<std::size_t>(sent);
    if (errno == EINTR) continue;
    if (errno == EAGAIN) return std::size_t{0};
    return Failure(Error::from_errno("send", errno));
  }
}

Result<void> send_all(int socket, std::span<const std::byte> bytes, std::span<const int> fds,
                      std::chrono::milliseconds limit) {
  const auto give_up = Clock::now() + limit;
  while (!bytes.empty()) {
    const Result<std::size_t> sent = send_some(socket, bytes, fds);
    if (!sent) return Failure(sent.error());
    if (*sent > 0) {
      bytes = bytes.subspan(*sent);
      fds = {};
      continue;
    }
    if (Clock::now() >= give_up) return Failure(Error::from_errno("send", ETIMEDOUT));
    pollfd entry{.fd = socket, .events = POLLOUT, .revents = 0};
    if (::poll(&entry, 1, poll_ms(give_up)) < 0 && errno != EINTR)
      return Failure(Error::from_errno("wait to send", errno));
  }
  return {};
}

namespace {

Result<Piece> receive(int socket, std::span<std::byte> buffer, int flags) {
  CHECK(!buffer.empty());
  iovec part{.iov_base = buffer.data(), .iov_len = buffer.size()};
  alignas(cmsghdr) std::array<char, CMSG_SPACE(kFdsPerMessageMax * sizeof(int))> control;
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control.data();
  message.msg_controllen = control.size();
  ssize_t received = 0;
  do {
    received = ::recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC | flags);
  } while (received < 0 && errno == EINTR);
  if (received < 0 && errno == EAGAIN) return Piece{};
  if (received < 0) return Failure(Error::from_errno("receive", errno));
  Piece piece;
  piece.bytes = buffer.first(static_cast<std::size_t>(received));
  collect_fds(message, piece.fds);
  piece.fds_lost = (message.msg_flags & MSG_CTRUNC) != 0;
  piece.end = received == 0;
  return piece;
}

}  // namespace

Result<Piece> receive_some(int socket, std::span<std::byte> buffer) {
  return receive(socket, buffer, 0);
}

bool is_lost(const Error& error) {
  return error.os_error() == ECONNRESET || error.os_error() == EPIPE;
}

Result<Piece> peek_some(int socket, std::span<std::byte> buffer) {
  return receive(socket, buffer, MSG_PEEK);
}

Result<void> peek_from_start(int socket) {
  const int offset = 0;
  if (::setsockopt(socket, SOL_SOCKET, SO_PEEK_OFF, &offset, sizeof offset) != 0)
    return Failure(Error::from_errno("look at what a client has sent", errno));
  return {};
}

void drop_peeked(int socket, std::size_t bytes) {
  std::array<std::byte, 16'384> buffer;
  while (bytes > 0) {
    const Result<Piece> piece = receive_some(socket, std::span(buffer).first(std::min(bytes, buffer.size())));
    if (!piece || piece->bytes.empty()) return;
    bytes -= piece->bytes.size();
  }
}

std::uint64_t cookie_of(int socket) {
  std::uint64_t cookie = 0;
  socklen_t size = sizeof cookie;
  return ::getsockopt(socket, SOL_SOCKET, SO_COOKIE, &cookie, &size) == 0 ? cookie : 0;
}

std::string accepted_at(int socket) {
  sockaddr_un address{};
  socklen_t size = sizeof address;
  if (::getsockname(socket, reinterpret_cast<sockaddr*>(&address), &size) != 0 ||
      size <= offsetof(sockaddr_un, sun_path))
    return {};
  return {address.sun_path, ::strnlen(address.sun_path, size - offsetof(sockaddr_un, sun_path))};
}

Result<Peer> peer_of(int socket) {
  ucred credentials{};
  socklen_t size = sizeof credentials;
  if (::getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0)
    return Failure(Error::from_errno("ask who is at the other end of a socket", errno));
  Result<std::vector<gid_t>> groups = groups_of_peer(socket);
  if (!groups) return Failure(std::move(groups).error());
  Peer peer{.pid = credentials.pid,
            .uid = credentials.uid,
            .gid = credentials.gid,
            .groups = std::move(*groups),
            .pidfd = UniqueFd()};

  int pidfd = -1;
  size = sizeof pidfd;
  if (::getsockopt(socket, SOL_SOCKET, kSoPeerPidfd, &pidfd, &size) == 0) {
    peer.pidfd.reset(pidfd);
    return peer;
  }
  // EINVAL: kernels before 6.16 say so of a process that has been reaped.
  if (errno != ENOPROTOOPT)
    return Failure(
        Error::from_errno(fmt::format("watch process {}", peer.pid), errno == EINVAL ? ESRCH : errno));
  if (peer.pid == 0) return peer;
  pidfd = static_cast<int>(::syscall(SYS_pidfd_open, peer.pid, 0));
  if (pidfd < 0) return Failure(Error::from_errno(fmt::format("watch process {}", peer.pid), errno));
  peer.pidfd.reset(pidfd);
  return peer;
}

}  // namespace uffdkit
