#include "manager/log.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>

namespace uffdkit {
namespace {

// What can be read now, and no more.
std::string read_all(int fd) {
  EXPECT_EQ(fcntl(fd, F_SETFL, O_NONBLOCK), 0);
  std::string text;
  std::array<char, 64 * 1024> buffer;
  for (ssize_t bytes; (bytes = read(fd, buffer.data(), buffer.size())) > 0;)
    text.append(buffer.data(), static_cast<std::size_t>(bytes));
  return text;
}

// The parameter: whether it is a socket, as under systemd, or a pipe.
class SlowReader : public testing::TestWithParam<bool> {
 protected:
  SlowReader() {
    std::array<int, 2> ends;
    if (GetParam()) {
      EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()), 0);
    } else {
      EXPECT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
    }
    reader_.reset(ends[0]);
    writer_.reset(ends[1]);
  }
  UniqueFd reader_;
  UniqueFd writer_;
};

INSTANTIATE_TEST_SUITE_P(Log, SlowReader, testing::Bool(), [](const testing::TestParamInfo<bool>& socket) {
  return socket.param ? "Socket" : "Pipe";
});

TEST_P(SlowReader, HoldsNobodyUpAndIsToldHowMuchWasLeftOut) {
  Log log(writer_.get());
  const std::string long_text(1000, 'x');
  // Much more than a pipe or a socket takes.
  for (int i = 0; i < 10'000; ++i) log.write(long_text);
  const std::string first = read_all(reader_.get());
  EXPECT_TRUE(first.starts_with("uffdkit: xxx"));
  log.write("the end");
  const std::string rest = read_all(reader_.get());
  EXPECT_NE(rest.find(" messages were left out"), std::string::npos) << rest;
  EXPECT_TRUE(rest.ends_with("\nuffdkit: the end\n")) << rest;
  // No line is cut: each is whole, or not there.
  const std::string all = first + rest;
  std::size_t whole_lines = 0;
  for (std::size_t at = 0; (at = all.find("uffdkit: " + long_text + "\n", at)) != std::string::npos; ++at)
    ++whole_lines;
  std::size_t lines = 0;
  for (const char byte : all) lines += byte == '\n' ? 1 : 0;
  EXPECT_EQ(lines, whole_lines + 2);
  log.write("once more");
  EXPECT_EQ(read_all(reader_.get()), "uffdkit: once more\n");
}

TEST_P(SlowReader, ThatIsGoneIsNoHarm) {
  ASSERT_NE(signal(SIGPIPE, SIG_IGN), SIG_ERR);
  Log log(writer_.get());
  reader_.reset();
  for (int i = 0; i < 10; ++i) log.write("nobody reads this");
  EXPECT_EQ(fcntl(writer_.get(), F_GETFL) & O_NONBLOCK, 0) << "others who share it would notice";
}

TEST_P(SlowReader, GetsNoLinesThatAClientMadeUp) {
  Log log(writer_.get());
  log.write("no image a\nuffdkit: session 1\x1b[2J");
  EXPECT_EQ(read_all(reader_.get()), "uffdkit: no image a\n  uffdkit: session 1?[2J\n");
}

}  // namespace
}  // namespace uffdkit
