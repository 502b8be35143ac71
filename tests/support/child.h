// A forked child that runs a function of the test, and a socket between the two.
// The child ends with _exit when the function returns; it is killed and reaped at the latest by the
// destructor, and with the thread that started it. Start it before the test starts threads: the function runs
// on in a copy of this process.
#pragma once

#include <sys/types.h>
#include <uffdkit/unique_fd.h>

#include <cstdint>
#include <functional>
#include <utility>

namespace uffdkit::test {

// One end of the socket. Every call waits; a peer that is gone makes them throw, which fails the test.
class Channel {
 public:
  explicit Channel(UniqueFd socket) : socket_(std::move(socket)) {}

  void send(std::uint64_t value) const;
  std::uint64_t receive() const;
  // A value together with a descriptor, which stays open here.
  void send_fd(std::uint64_t value, int fd) const;
  // The descriptor that came with a value. The caller owns it.
  UniqueFd receive_fd(std::uint64_t& value) const;
  // Waits until the peer's end is closed: by its exit, and by its exec.
  void wait_closed() const;

 private:
  UniqueFd socket_;
};

class Child {
 public:
  // `run` returns the exit code; an exception in it gives 99.
  explicit Child(const std::function<int(const Channel&)>& run);
  ~Child();
  Child(const Child&) = delete;
  Child& operator=(const Child&) = delete;

  pid_t pid() const { return pid_; }
  const Channel& channel() const { return channel_; }
  // Whether it has ended, and nobody has waited for that.
  bool has_ended() const;
  // Waits for its end. Returns its exit code, or minus the signal that ended it.
  int wait();
  // Ends it by SIGKILL and reaps it.
  void kill();

 private:
  Channel channel_;
  pid_t pid_ = -1;
};

}  // namespace uffdkit::test
