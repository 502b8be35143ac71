#include "support/child.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <exception>
#include <system_error>

namespace uffdkit::test {
namespace {

[[noreturn]] void fail(const char* call) {
  throw std::system_error(errno, std::generic_category(), call);
}

std::array<UniqueFd, 2> socket_pair() {
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends) != 0) fail("socketpair");
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

void send_message(int socket, std::uint64_t value, const int* fd) {
  iovec part{.iov_base = &value, .iov_len = sizeof value};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (fd != nullptr) {
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), fd, sizeof(int));
  }
  if (sendmsg(socket, &message, MSG_NOSIGNAL) != sizeof value) fail("sendmsg");
}

}  // namespace

void Channel::send(std::uint64_t value) const {
  send_message(socket_.get(), value, nullptr);
}

void Channel::send_fd(std::uint64_t value, int fd) const {
  send_message(socket_.get(), value, &fd);
}

std::uint64_t Channel::receive() const {
  std::uint64_t value = 0;
  const ssize_t bytes = recv(socket_.get(), &value, sizeof value, 0);
  if (bytes == 0) errno = EPIPE;  // the peer has ended
  if (bytes != sizeof value) fail("recv");
  return value;
}

UniqueFd Channel::receive_fd(std::uint64_t& value) const {
  iovec part{.iov_base = &value, .iov_len = sizeof value};
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  message.msg_control = control;
  message.msg_controllen = sizeof control;
  if (recvmsg(socket_.get(), &message, MSG_CMSG_CLOEXEC) != sizeof value) fail("recvmsg");
  const cmsghdr* header = CMSG_FIRSTHDR(&message);
  if (header == nullptr || header->cmsg_type != SCM_RIGHTS) fail("recvmsg: no descriptor");
  int fd = -1;
  std::memcpy(&fd, CMSG_DATA(header), sizeof fd);
  return UniqueFd(fd);
}

void Channel::wait_closed() const {
  char byte;
  if (recv(socket_.get(), &byte, 1, 0) != 0) fail("recv: the peer is still there");
}

Child::Child(const std::function<int(const Channel&)>& run) : channel_(UniqueFd()) {
  std::array<UniqueFd, 2> ends = socket_pair();
  const pid_t parent = getpid();
  pid_ = fork();
  if (pid_ < 0) fail("fork");
  if (pid_ > 0) {
    channel_ = Channel(std::move(ends[0]));
    return;
  }
  // A test program that is killed must not leave the child behind.
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent) _exit(98);
  ends[0].reset();
  try {
    const Channel to_parent(std::move(ends[1]));
    _exit(run(to_parent));
  } catch (const std::exception&) {
    _exit(99);
  }
}

Child::~Child() {
  kill();
}

bool Child::has_ended() const {
  siginfo_t info{};
  return pid_ > 0 && waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOHANG | WNOWAIT) == 0 &&
         info.si_pid == pid_;
}

int Child::wait() {
  int status = 0;
  if (waitpid(pid_, &status, 0) != pid_) fail("waitpid");
  pid_ = -1;
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

void Child::kill() {
  if (pid_ < 0) return;
  ::kill(pid_, SIGKILL);
  waitpid(pid_, nullptr, 0);
  pid_ = -1;
}

}  // namespace uffdkit::test
