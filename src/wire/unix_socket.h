// Unix stream sockets that carry descriptors: listening, connecting, sending, receiving, and who the peer is.
//
// All sockets made here are close-on-exec and non-blocking. Threads: a socket's calls may come from any one
// thread at a time.
#pragma once

#include <sys/types.h>
#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "wire/piece.h"

namespace uffdkit {

// Longest path that fits sockaddr_un with its terminating zero: unix(7).
inline constexpr std::size_t kSocketPathBytesMax = 107;

// What came of accepting.
struct Accepted {
  UniqueFd socket;   // empty: nobody waits, or an error
  int os_error = 0;  // EMFILE, ENFILE, ENOMEM, ENOBUFS: the connection stays queued; try again later, not at
                     // once
};

// A socket file of mode 0600 with a listener behind it.
class ListeningSocket {
 public:
  // Binds `path` and listens. The file never has wider permissions than 0600. The file of a listener that is
  // dead is replaced; one whose listener lives is refused, and so is whatever is not a socket. Of several
  // processes that open the same path at once, one succeeds.
  // Errors: path empty or too long; in use; not a socket; the directory is missing or closed to us.
  static Result<ListeningSocket> open(const std::string& path);

  // The same listener in another process, by what it has said of itself.
  static ListeningSocket take_up(UniqueFd fd, std::string path, dev_t device, ino_t inode) {
    return {std::move(fd), std::move(path), device, inode};
  }

  ListeningSocket(ListeningSocket&& other) noexcept;
  ListeningSocket& operator=(ListeningSocket&& other) noexcept;
  // Removes the file if it is still the one that open() made.
  ~ListeningSocket();

  int fd() const { return fd_.get(); }
  const std::string& path() const { return path_; }
  // Of the file that open() made.
  dev_t device() const { return device_; }
  ino_t inode() const { return inode_; }

  // One waiting connection, if there is one.
  Accepted accept() const;

 private:
  ListeningSocket(UniqueFd fd, std::string path, dev_t device, ino_t inode)
      : fd_(std::move(fd)), path_(std::move(path)), device_(device), inode_(inode) {}
  void remove_file();

  UniqueFd fd_;
  std::string path_;
  dev_t device_;
  ino_t inode_;
};

// Connects to a listener. Waits at most `limit` while its queue is full.
// Errors: path empty or too long; ENOENT, ECONNREFUSED (nobody listens), EACCES; ETIMEDOUT.
Result<UniqueFd> connect_unix(const std::string& path, std::chrono::milliseconds limit);

// Sends what can be sent without waiting; returns how many bytes that was, 0 if none. The descriptors go with
// the first byte, so are sent exactly if the result is not 0; they stay the caller's. `bytes` is not empty,
// `fds` at most 253 (unix(7), SCM_RIGHTS). Errors: EPIPE or ECONNRESET (the peer is gone; no signal is
// raised).
Result<std::size_t> send_some(int socket, std::span<const std::byte> bytes, std::span<const int> fds);

// Sends everything, waiting at most `limit` for the peer to make room. Errors: those of send_some, ETIMEDOUT.
Result<void> send_all(int socket, std::span<const std::byte> bytes, std::span<const int> fds,
                      std::chrono::milliseconds limit);

// One recvmsg(2) that does not wait. `buffer` is not empty; the piece's bytes lie in it.
// Errors: ECONNRESET (the peer went away with our bytes unread), or a bug's EBADF, ENOTSOCK.
Result<Piece> receive_some(int socket, std::span<std::byte> buffer);

// Whether an error of these means that the peer is gone, so that a request may be made to whoever is there
// next.
bool is_lost(const Error& error);

// The same, but what it gives stays in the socket, its descriptors too, for whoever receives next. Each call
// goes on behind the one before, from where peek_from_start() has set it. A descriptor may come more than
// once.
Result<Piece> peek_some(int socket, std::span<std::byte> buffer);
Result<void> peek_from_start(int socket);
// Takes `bytes` out of the socket, which have been peeked at, and drops them with their descriptors.
void drop_peeked(int socket, std::size_t bytes);

// Tells a connection from all others that this machine has had since it was started; 0 if there can be none.
std::uint64_t cookie_of(int socket);
// The path of the listener that has accepted a connection; empty if it has none.
std::string accepted_at(int socket);

// Who is at the other end of a connection, as of when it connected.
struct Peer {
  pid_t pid;  // in our pid namespace; 0 if it is not visible there
  uid_t uid;
  gid_t gid;
  std::vector<gid_t> groups;  // the supplementary ones
  UniqueFd pidfd;  // readable once the process has ended; empty if `pid` is 0 on kernels before 6.5
};

// The peer of a connected socket, by SO_PEERCRED, SO_PEERGROUPS (4.13), and SO_PEERPIDFD (6.5) or else
// pidfd_open(2) (5.3), which could name a newer process of the same pid if the peer is gone already.
// Errors: ESRCH: the process that connected is gone.
Result<Peer> peer_of(int socket);

}  // namespace uffdkit
