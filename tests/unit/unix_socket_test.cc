#include "wire/unix_socket.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <fstream>
#include <thread>

#include "support/pieces.h"
#include "support/temp_dir.h"

namespace uffdkit {
namespace {

using namespace std::chrono_literals;
using test::TempDir;
using test::WatchedFds;

bool exists(const std::string& path) {
  struct stat info;
  return ::lstat(path.c_str(), &info) == 0;
}

bool wait_readable(int fd) {
  pollfd entry{.fd = fd, .events = POLLIN, .revents = 0};
  return ::poll(&entry, 1, 10'000) == 1;
}

// A connected pair, {client, server}.
std::pair<UniqueFd, UniqueFd> connected() {
  int ends[2];
  EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends), 0);
  return {UniqueFd(ends[0]), UniqueFd(ends[1])};
}

std::span<const std::byte> bytes_of(std::string_view text) {
  return std::as_bytes(std::span(text));
}

// The socket file of a listener that is gone.
void leave_dead_socket(const std::string& path) {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.data(), path.size());
  const UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
  ASSERT_EQ(::bind(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof address), 0);
  ASSERT_EQ(::listen(fd.get(), 1), 0);
}

TEST(ListeningSocket, FileIsForItsOwnerAloneWhateverTheUmask) {
  const TempDir dir;
  // The umask belongs to the whole process, so a child changes it: other tests' threads must not see it.
  const pid_t child = ::fork();
  if (child == 0) {
    ::umask(0);
    struct stat info;
    const auto listener = ListeningSocket::open(dir / "s");
    const bool right = listener && ::lstat((dir / "s").c_str(), &info) == 0 && (info.st_mode & 07777) == 0600;
    ::_exit(right ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(ListeningSocket, RemovesItsFileAtTheEnd) {
  const TempDir dir;
  {
    ASSERT_TRUE(ListeningSocket::open(dir / "s"));
  }
  EXPECT_FALSE(exists(dir / "s"));
}

TEST(ListeningSocket, MovingKeepsTheFile) {
  const TempDir dir;
  auto first = ListeningSocket::open(dir / "a");
  auto second = ListeningSocket::open(dir / "b");
  ASSERT_TRUE(first && second);
  *second = std::move(*first);
  EXPECT_TRUE(exists(dir / "a"));
  EXPECT_FALSE(exists(dir / "b"));
  EXPECT_TRUE(connect_unix(dir / "a", 1s));
}

TEST(ListeningSocket, LeavesAFileThatIsNoLongerItsOwn) {
  const TempDir dir;
  {
    const auto listener = ListeningSocket::open(dir / "s");
    ASSERT_TRUE(listener);
    ASSERT_EQ(::unlink((dir / "s").c_str()), 0);
    leave_dead_socket(dir / "s");
  }
  EXPECT_TRUE(exists(dir / "s"));
}

TEST(ListeningSocket, ReplacesTheFileOfADeadListener) {
  const TempDir dir;
  leave_dead_socket(dir / "s");
  const auto listener = ListeningSocket::open(dir / "s");
  ASSERT_TRUE(listener) << listener.error().text();
  EXPECT_TRUE(connect_unix(dir / "s", 1s));
}

TEST(ListeningSocket, RefusesThePathOfALivingListener) {
  const TempDir dir;
  const auto first = ListeningSocket::open(dir / "s");
  ASSERT_TRUE(first);
  const auto second = ListeningSocket::open(dir / "s");
  ASSERT_FALSE(second);
  EXPECT_EQ(second.error().os_error(), EADDRINUSE);
  EXPECT_TRUE(connect_unix(dir / "s", 1s));
}

TEST(ListeningSocket, RefusesAFileThatIsNoSocketAndLeavesIt) {
  const TempDir dir;
  std::ofstream(dir / "image") << "precious";
  const auto listener = ListeningSocket::open(dir / "image");
  ASSERT_FALSE(listener);
  EXPECT_NE(listener.error().message().find("not a socket"), std::string::npos);
  EXPECT_EQ(std::filesystem::file_size(dir / "image"), 8u);
}

TEST(ListeningSocket, RefusesPathsThatCannotBe) {
  const TempDir dir;
  EXPECT_FALSE(ListeningSocket::open(""));
  EXPECT_FALSE(ListeningSocket::open(dir / std::string(200, 'x')));
  EXPECT_FALSE(ListeningSocket::open(dir / "missing/s"));
}

TEST(ListeningSocket, OfManyWhoReplaceADeadOneExactlyOneSucceeds) {
  const TempDir dir;
  for (int round = 0; round < 20; ++round) {
    leave_dead_socket(dir / "s");
    std::array<bool, 4> succeeded{};
    std::vector<ListeningSocket> kept[4];
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < succeeded.size(); ++i)
      threads.emplace_back([&, i] {
        auto listener = ListeningSocket::open(dir / "s");
        succeeded[i] = listener.has_value();
        if (listener) kept[i].push_back(std::move(*listener));
      });
    for (std::thread& thread : threads) thread.join();
    ASSERT_EQ(std::ranges::count(succeeded, true), 1);
    ASSERT_TRUE(connect_unix(dir / "s", 1s));
  }
}

TEST(ListeningSocket, AcceptDoesNotWait) {
  const TempDir dir;
  const auto listener = ListeningSocket::open(dir / "s");
  ASSERT_TRUE(listener);
  const Accepted none = listener->accept();
  EXPECT_FALSE(none.socket);
  EXPECT_EQ(none.os_error, 0);
  const auto client = connect_unix(dir / "s", 1s);
  ASSERT_TRUE(client);
  const Accepted one = listener->accept();
  ASSERT_TRUE(one.socket);
  EXPECT_NE(::fcntl(one.socket.get(), F_GETFL) & O_NONBLOCK, 0);
  EXPECT_NE(::fcntl(one.socket.get(), F_GETFD) & FD_CLOEXEC, 0);
}

TEST(ConnectUnix, SaysThatNobodyListens) {
  const TempDir dir;
  const auto missing = connect_unix(dir / "s", 1s);
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.error().os_error(), ENOENT);
  EXPECT_NE(missing.error().remedy().find("manager"), std::string::npos);
  leave_dead_socket(dir / "s");
  EXPECT_EQ(connect_unix(dir / "s", 1s).error().os_error(), ECONNREFUSED);
}

TEST(ConnectUnix, GivesUpOnAListenerThatNeverAccepts) {
  const TempDir dir;
  const auto listener = ListeningSocket::open(dir / "s");
  ASSERT_TRUE(listener);
  std::vector<UniqueFd> queued;
  for (;;) {
    auto client = connect_unix(dir / "s", 5ms);
    if (!client) {
      EXPECT_EQ(client.error().os_error(), ETIMEDOUT);
      break;
    }
    queued.push_back(std::move(*client));
    ASSERT_LT(queued.size(), 10'000u);
  }
}

TEST(Receive, DescriptorsComeWithTheBytesAndAreCloseOnExec) {
  const auto [client, server] = connected();
  WatchedFds watched;
  {
    const auto sent = watched.make(3);
    const std::array numbers = {sent[0].get(), sent[1].get(), sent[2].get()};
    ASSERT_EQ(send_some(client.get(), bytes_of("hello"), numbers).value(), 5u);
  }
  {
    std::array<std::byte, 16> buffer;
    const auto piece = receive_some(server.get(), buffer);
    ASSERT_TRUE(piece);
    EXPECT_EQ(piece->bytes.size(), 5u);
    EXPECT_EQ(piece->bytes.data(), buffer.data());
    EXPECT_FALSE(piece->end);
    EXPECT_FALSE(piece->fds_lost);
    ASSERT_EQ(piece->fds.size(), 3u);
    for (const UniqueFd& fd : piece->fds) EXPECT_NE(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, 0);
  }
  EXPECT_TRUE(watched.all_closed());
}

TEST(Receive, AsManyDescriptorsAsAMessageCanBringAreHandedOut) {
  const auto [client, server] = connected();
  WatchedFds watched;
  const auto sent = watched.make(253);
  std::vector<int> numbers;
  for (const UniqueFd& fd : sent) numbers.push_back(fd.get());
  ASSERT_EQ(send_some(client.get(), bytes_of("x"), numbers).value(), 1u);
  std::array<std::byte, 16> buffer;
  const auto piece = receive_some(server.get(), buffer);
  ASSERT_TRUE(piece);
  EXPECT_EQ(piece->fds.size(), 253u);
  EXPECT_FALSE(piece->fds_lost);
}

TEST(Receive, NothingWaitingIsNeitherAnErrorNorTheEnd) {
  const auto [client, server] = connected();
  std::array<std::byte, 16> buffer;
  const auto piece = receive_some(server.get(), buffer);
  ASSERT_TRUE(piece);
  EXPECT_TRUE(piece->bytes.empty());
  EXPECT_FALSE(piece->end);
}

TEST(Receive, TheEndIsSeenAfterTheLastBytes) {
  auto [client, server] = connected();
  ASSERT_TRUE(send_all(client.get(), bytes_of("bye"), {}, 1s));
  client.reset();
  std::array<std::byte, 16> buffer;
  EXPECT_EQ(receive_some(server.get(), buffer)->bytes.size(), 3u);
  EXPECT_TRUE(receive_some(server.get(), buffer)->end);
}

TEST(Receive, DescriptorsThatTheLimitOfOpenFilesTakesAwayAreReported) {
  auto [client, server] = connected();
  const auto sent = WatchedFds().make(4);
  const std::array numbers = {sent[0].get(), sent[1].get(), sent[2].get(), sent[3].get()};
  ASSERT_EQ(send_some(client.get(), bytes_of("x"), numbers).value(), 1u);
  // In a child: the limit belongs to the whole process. Room is left for two more.
  const pid_t child = ::fork();
  if (child == 0) {
    const int first = ::dup(0);
    const int second = ::dup(0);
    rlimit limit;
    if (::getrlimit(RLIMIT_NOFILE, &limit) != 0) ::_exit(2);
    limit.rlim_cur = static_cast<rlim_t>(std::max(first, second)) + 1;
    ::close(first);
    ::close(second);
    std::array<std::byte, 16> buffer;
    if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) ::_exit(2);
    const auto piece = receive_some(server.get(), buffer);
    ::_exit(piece && piece->fds_lost && piece->fds.size() == 2 && piece->bytes.size() == 1 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

// ---- looking at what waits, as at a handshake whose session is not recorded yet ---------------------------

class Peek : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(peek_from_start(server_.get())); }
  void send(std::string_view text, std::span<const int> fds = {}) {
    ASSERT_EQ(send_some(client_.get(), bytes_of(text), fds).value(), text.size());
  }
  std::string peek(std::size_t most = 16) {
    Result<Piece> piece = peek_some(server_.get(), std::span(buffer_).first(most));
    EXPECT_TRUE(piece);
    last_ = std::move(*piece);
    return text_of(last_);
  }
  std::string receive() {
    Result<Piece> piece = receive_some(server_.get(), buffer_);
    EXPECT_TRUE(piece);
    last_ = std::move(*piece);
    return text_of(last_);
  }
  static std::string text_of(const Piece& piece) {
    return {reinterpret_cast<const char*>(piece.bytes.data()), piece.bytes.size()};
  }

  std::pair<UniqueFd, UniqueFd> ends_ = connected();
  UniqueFd& client_ = ends_.first;
  UniqueFd& server_ = ends_.second;
  std::array<std::byte, 16> buffer_;
  Piece last_;
};

TEST_F(Peek, GoesOnBehindWhatWasPeekedAtAndTakesNothing) {
  send("one ");
  EXPECT_EQ(peek(), "one ");
  EXPECT_EQ(peek(), "");
  EXPECT_FALSE(last_.end);
  send("two");
  EXPECT_EQ(peek(2), "tw");
  EXPECT_EQ(peek(2), "o");
  EXPECT_EQ(receive(), "one two");
}

TEST_F(Peek, FromTheStartGivesAllOfItAgainAsTheNextProcessWants) {
  send("handshake");
  EXPECT_EQ(peek(4), "hand");
  ASSERT_TRUE(peek_from_start(server_.get()));
  EXPECT_EQ(peek(), "handshake");
}

TEST_F(Peek, DescriptorsComeEachTimeAndStay) {
  WatchedFds watched;
  {
    const auto sent = watched.make(2);
    send("with two", std::array{sent[0].get(), sent[1].get()});
  }
  for (int times = 0; times < 2; ++times) {
    ASSERT_TRUE(peek_from_start(server_.get()));
    EXPECT_EQ(peek(), "with two");
    ASSERT_EQ(last_.fds.size(), 2u);
    for (const UniqueFd& fd : last_.fds) EXPECT_NE(::fcntl(fd.get(), F_GETFD) & FD_CLOEXEC, 0);
  }
  EXPECT_EQ(receive(), "with two");
  EXPECT_EQ(last_.fds.size(), 2u);
  last_ = {};
  EXPECT_TRUE(watched.all_closed());
}

TEST_F(Peek, TheEndIsSeenBehindTheLastBytesWhichStay) {
  send("bye");
  client_.reset();
  EXPECT_EQ(peek(), "bye");
  EXPECT_EQ(peek(), "");
  EXPECT_TRUE(last_.end);
  EXPECT_EQ(receive(), "bye");
}

TEST_F(Peek, WhatIsDroppedIsSoMuchAndNoMore) {
  WatchedFds watched;
  {
    const auto sent = watched.make(1);
    send("dropped", std::array{sent[0].get()});
  }
  send(" kept");
  EXPECT_EQ(peek(7), "dropped");
  last_ = {};
  drop_peeked(server_.get(), 7);
  EXPECT_TRUE(watched.all_closed());
  EXPECT_EQ(receive(), " kept");
}

TEST(Send, ToAPeerThatIsGoneIsAnErrorAndNoSignal) {
  auto [client, server] = connected();
  server.reset();
  const auto sent = send_some(client.get(), bytes_of("x"), {});
  ASSERT_FALSE(sent);
  EXPECT_EQ(sent.error().os_error(), EPIPE);
}

TEST(Send, WaitsForRoomButNotForEver) {
  const auto [client, server] = connected();
  const std::vector<std::byte> much(1 << 20);
  while (send_some(client.get(), much, {}).value() > 0) {
  }
  const auto timed_out = send_all(client.get(), much, {}, 20ms);
  ASSERT_FALSE(timed_out);
  EXPECT_EQ(timed_out.error().os_error(), ETIMEDOUT);
}

TEST(Send, EverythingArrivesInOrderThroughASlowReader) {
  auto [client, server] = connected();
  std::vector<std::byte> much(3 << 20);
  for (std::size_t i = 0; i < much.size(); ++i) much[i] = static_cast<std::byte>(i * 7 / 5);
  std::thread sender([&, socket = client.get()] { EXPECT_TRUE(send_all(socket, much, {}, 10s)); });
  std::vector<std::byte> got;
  std::array<std::byte, 10'000> buffer;
  while (got.size() < much.size() && wait_readable(server.get())) {
    const auto piece = receive_some(server.get(), buffer);
    ASSERT_TRUE(piece);
    got.insert(got.end(), piece->bytes.begin(), piece->bytes.end());
  }
  sender.join();
  EXPECT_TRUE(got == much);
}

TEST(PeerOf, NamesTheProcessAndSeesItsEnd) {
  const TempDir dir;
  const auto listener = ListeningSocket::open(dir / "s");
  ASSERT_TRUE(listener);
  int go[2];
  ASSERT_EQ(::pipe2(go, O_CLOEXEC), 0);
  const UniqueFd go_read(go[0]);
  UniqueFd go_write(go[1]);
  const pid_t child = ::fork();
  if (child == 0) {
    go_write.reset();
    const auto client = connect_unix(dir / "s", 5s);
    char byte;
    [[maybe_unused]] const ssize_t end = ::read(go_read.get(), &byte, 1);
    ::_exit(0);
  }
  ASSERT_TRUE(wait_readable(listener->fd()));
  const Accepted accepted = listener->accept();
  const auto peer = peer_of(accepted.socket.get());
  ASSERT_TRUE(peer) << peer.error().text();
  EXPECT_EQ(peer->pid, child);
  EXPECT_EQ(peer->uid, ::getuid());
  EXPECT_EQ(peer->gid, ::getgid());
  pollfd entry{.fd = peer->pidfd.get(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(::poll(&entry, 1, 0), 0);
  go_write.reset();
  EXPECT_TRUE(wait_readable(peer->pidfd.get()));
  ASSERT_EQ(::waitpid(child, nullptr, 0), child);
  const auto gone = peer_of(accepted.socket.get());
  // Since 6.16 a process that has been reaped has a pidfd too.
  EXPECT_TRUE(gone || gone.error().os_error() == ESRCH);
}

}  // namespace
}  // namespace uffdkit
