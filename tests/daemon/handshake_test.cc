// What Firecracker's handshake may look like, and what is refused without harm to anybody else.
#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <functional>

#include "daemon/fixture.h"

namespace uffdkit::test {
namespace {

class Handshake : public ManagerTest {
 protected:
  // Runs a client that says `say` for its hand-over, and then checks all of its memory.
  void expect_served(const ClientShape& shape,
                     const std::function<void(const ClientMemory&, int socket)>& say) {
    Child process = program([&](const Channel&) {
      const ClientMemory memory(image_, shape);
      const UniqueFd connection = connect_to(socket_);
      say(memory, connection.get());
      memory.check_all(1, 1);
    });
    EXPECT_EQ(process.wait(), 0) << manager_.log();
  }

  const Image image_{directory_ / "image", 600};
  const std::string socket_ = directory_ / "fc.sock";
  ManagerProcess manager_{directory_, firecracker(socket_, image_)};
};

void send_handshake(const ClientMemory& memory, const nlohmann::json& handshake, int socket) {
  const int fd = memory.uffd().fd();
  send_with_fds(socket, handshake.dump(), {&fd, 1});
}

// Closed by the manager.
void wait_refused(int socket) {
  pollfd entry{.fd = socket, .events = POLLIN, .revents = 0};
  require(poll(&entry, 1, 30'000) == 1, "the connection was not closed");
  char byte;
  require(read(socket, &byte, 1) <= 0, "the manager says something");
}

// ---- accepted --------------------------------------------------------------------------------------------

TEST_F(Handshake, MayComeInPieces) {
  expect_served(whole(image_), [](const ClientMemory& memory, int socket) {
    const std::string text = memory.handshake().dump();
    const int fd = memory.uffd().fd();
    send_with_fds(socket, text.substr(0, 10), {&fd, 1});
    usleep(2000);
    send_with_fds(socket, text.substr(10, 50), {});
    usleep(2000);
    send_with_fds(socket, text.substr(60), {});
  });
}

TEST_F(Handshake, MayComeByteByByte) {
  expect_served(whole(image_), [](const ClientMemory& memory, int socket) {
    const std::string text = memory.handshake().dump();
    const int fd = memory.uffd().fd();
    send_with_fds(socket, text.substr(0, 1), {&fd, 1});
    for (std::size_t i = 1; i < text.size(); ++i) send_with_fds(socket, text.substr(i, 1), {});
  });
}

TEST_F(Handshake, MayHaveTheNewPageSizeKeyOnly) {
  expect_served(whole(image_), [](const ClientMemory& memory, int socket) {
    nlohmann::json handshake = memory.handshake();
    handshake[0].erase("page_size_kib");
    send_handshake(memory, handshake, socket);
  });
}

TEST_F(Handshake, MayHaveTheOldPageSizeKeyOnly) {
  expect_served(whole(image_), [](const ClientMemory& memory, int socket) {
    nlohmann::json handshake = memory.handshake();
    handshake[0].erase("page_size");
    send_handshake(memory, handshake, socket);
  });
}

TEST_F(Handshake, MayHaveNoPageSizeKey) {
  expect_served(whole(image_), [](const ClientMemory& memory, int socket) {
    nlohmann::json handshake = memory.handshake();
    handshake[0].erase("page_size");
    handshake[0].erase("page_size_kib");
    send_handshake(memory, handshake, socket);
  });
}

TEST_F(Handshake, MayHaveKeysThatNobodyKnows) {
  expect_served(whole(image_), [](const ClientMemory& memory, int socket) {
    nlohmann::json handshake = memory.handshake();
    handshake[0]["of_a_fork"] = {{"nested", {1, 2, "]["}}};
    send_handshake(memory, handshake, socket);
  });
}

TEST_F(Handshake, MayHaveFiveHundredAndNineRegions) {
  ClientShape shape;
  for (std::size_t i = 0; i < 509; ++i) shape.regions.push_back({.pages = 1, .image_page = 508 - i});
  expect_served(shape, [](const ClientMemory& memory, int socket) {
    send_handshake(memory, memory.handshake(), socket);
  });
}

TEST_F(Handshake, ItsConnectionMayBeClosedAtOnce) {
  Child process = program([&](const Channel&) {
    const ClientMemory memory(image_, whole(image_));
    memory.hand_over(socket_).reset();
    memory.check_all(1, 1);
  });
  EXPECT_EQ(process.wait(), 0) << manager_.log();
}

TEST_F(Handshake, FurtherDescriptorsAreClosed) {
  expect_served(whole(image_), [](const ClientMemory& memory, int socket) {
    int ends[2];
    require(pipe2(ends, O_CLOEXEC) == 0, "pipe2");
    const std::array<int, 3> fds = {memory.uffd().fd(), ends[1], ends[1]};
    send_with_fds(socket, memory.handshake().dump(), fds);
    close(ends[1]);
    // The end comes when nobody can write any more.
    pollfd entry{.fd = ends[0], .events = POLLIN, .revents = 0};
    require(poll(&entry, 1, 30'000) == 1 && (entry.revents & POLLHUP) != 0, "a descriptor is still open");
    close(ends[0]);
  });
}

// ---- refused ---------------------------------------------------------------------------------------------

struct Refusal {
  std::string name;
  std::string logged;  // part of the reason
  std::function<void(const ClientMemory&, int socket)> say;
};

std::ostream& operator<<(std::ostream& out, const Refusal& refusal) {
  return out << refusal.name;
}

class Refused : public Handshake, public testing::WithParamInterface<Refusal> {};

// The handshake with a member of its first region set to `value`.
std::function<void(const ClientMemory&, int)> with(const char* key, const nlohmann::json& value) {
  return [=](const ClientMemory& memory, int socket) {
    nlohmann::json handshake = memory.handshake();
    handshake[0][key] = value;
    send_handshake(memory, handshake, socket);
  };
}

std::function<void(const ClientMemory&, int)> text(const std::string& text) {
  return [=](const ClientMemory& memory, int socket) {
    const int fd = memory.uffd().fd();
    send_with_fds(socket, text, {&fd, 1});
  };
}

void send_other_descriptor(const ClientMemory& memory, int socket, int fd) {
  send_with_fds(socket, memory.handshake().dump(), {&fd, 1});
}

const Refusal kRefusals[] = {
    {"WithoutADescriptor", "descriptor",
     [](const ClientMemory& memory, int socket) { send_with_fds(socket, memory.handshake().dump(), {}); }},
    {"Garbage", "Firecracker handshake", text("GET / HTTP/1.1\r\n\r\n")},
    {"AnObject", "Firecracker handshake", text(R"({"base_host_virt_addr":0})")},
    {"NoRegion", "region", text("[]")},
    {"BrokenJson", "Firecracker handshake", text(R"([{"base_host_virt_addr":,}])")},
    {"MoreAfterTheArray", "Firecracker handshake",
     [](const ClientMemory& memory, int socket) { text(memory.handshake().dump() + "[]")(memory, socket); }},
    {"TooLarge", "Firecracker handshake",
     [](const ClientMemory& memory, int socket) {
       const int fd = memory.uffd().fd();
       const std::string part = "[" + std::string(300'000, ' ');
       // It may hang up before it has all of it.
       (void)!write(socket, part.data(), 1);
       try {
         send_with_fds(socket, part.substr(1), {&fd, 1});
       } catch (const std::runtime_error&) {
       }
     }},
    {"TooManyRegions", "region",
     [](const ClientMemory& memory, int socket) {
       nlohmann::json handshake = nlohmann::json::array();
       for (int i = 0; i < 1001; ++i) handshake.push_back(memory.handshake()[0]);
       send_handshake(memory, handshake, socket);
     }},
    {"OverlappingRegions", "overlap",
     [](const ClientMemory& memory, int socket) {
       nlohmann::json handshake = memory.handshake();
       handshake.push_back(handshake[0]);
       send_handshake(memory, handshake, socket);
     }},
    {"UnalignedAddress", "region 0", with("base_host_virt_addr", 0x7f0000000001)},
    {"UnalignedSize", "region 0", with("size", 4097)},
    {"UnalignedOffset", "region 0", with("offset", 512)},
    {"EmptyRegion", "region 0", with("size", 0)},
    {"BeyondTheImage", "region 0", with("offset", 600 * 4096)},
    {"EndsBeyondTheImage", "region 0", with("size", 601 * 4096)},
    {"OffsetAtTheEndOfNumbers", "region 0", with("offset", 0xfffffffffffff000)},
    {"AddressOfTheKernel", "region 0", with("base_host_virt_addr", 0xffff800000000000)},
    {"NegativeNumber", "region 0", with("size", -4096)},
    {"FractionalNumber", "region 0", with("size", 4096.5)},
    {"StrangePageSize", "region 0", with("page_size", 16384)},
    {"ContradictingPageSizes", "region 0", with("page_size_kib", 2 << 20)},
    {"APipe", "userfaultfd",
     [](const ClientMemory& memory, int socket) {
       int ends[2];
       require(pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0, "pipe2");
       send_other_descriptor(memory, socket, ends[0]);
       close(ends[0]);
       close(ends[1]);
     }},
    {"ADirectory", "userfaultfd",
     [](const ClientMemory& memory, int socket) {
       const UniqueFd directory(open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
       send_other_descriptor(memory, socket, directory.get());
     }},
    {"ABlockingUserfaultfd", "blocking",
     [](const ClientMemory& memory, int socket) {
       const Result<Uffd> uffd = Uffd::create({.non_blocking = false});
       send_other_descriptor(memory, socket, uffd->fd());
     }},
    {"TheEndBeforeTheArrays", "Firecracker handshake",
     [](const ClientMemory& memory, int socket) {
       text("[{")(memory, socket);
       require(shutdown(socket, SHUT_WR) == 0, "shutdown");
     }},
};

INSTANTIATE_TEST_SUITE_P(Handshake, Refused, testing::ValuesIn(kRefusals),
                         [](const testing::TestParamInfo<Refusal>& refusal) { return refusal.param.name; });

TEST_P(Refused, HasAReasonInTheLogAndCostsNobodyAnything) {
  Child neighbour =
      client(image_, whole(image_), socket_, [](const ClientMemory& memory, const Channel& channel) {
        for (std::size_t page = 0; page < 100; ++page) memory.check(page);
        channel.send(1);
        channel.receive();
        memory.check_all(2, 1);
      });
  neighbour.channel().receive();
  const Footprint before = manager_.footprint();
  {
    const ClientMemory memory(image_, whole(image_));
    for (int times = 0; times < 10; ++times) {
      const UniqueFd connection = connect_to(socket_);
      GetParam().say(memory, connection.get());
      wait_refused(connection.get());
    }
  }
  EXPECT_TRUE(eventually([&] { return manager_.footprint().within(before); }))
      << before << " became " << manager_.footprint();
  EXPECT_EQ(manager_.count("clients_refused"), 10u);
  EXPECT_EQ(manager_.sessions(), 1u);
  const std::string log = manager_.log();
  const std::size_t refused = log.find("refused: " + socket_);
  ASSERT_NE(refused, std::string::npos) << log;
  EXPECT_NE(log.find(GetParam().logged, refused + socket_.size() + 9), std::string::npos) << log;
  neighbour.channel().send(1);
  EXPECT_EQ(neighbour.wait(), 0) << manager_.log();
}

TEST_F(Handshake, ASilentClientIsSentAwayAtTheDeadline) {
  const TempDir directory;
  const std::string socket = directory / "fc.sock";
  ManagerProcess manager(directory,
                         {"--firecracker", socket + "=" + image_.path(), "--handshake-seconds", "0.1"});
  const Footprint before = manager.footprint();
  const UniqueFd silent = connect_to(socket);
  const UniqueFd slow = connect_to(socket);
  send_with_fds(slow.get(), "[", {});
  wait_refused(silent.get());
  wait_refused(slow.get());
  EXPECT_EQ(manager.count("clients_refused"), 2u);
  EXPECT_TRUE(manager.logged("did not say")) << manager.log();
  EXPECT_TRUE(manager.logged("refused: " + socket + ": client pid " + std::to_string(getpid())))
      << manager.log();
  EXPECT_TRUE(eventually([&] { return manager.footprint().within(before); }));
  // A silent one keeps nobody waiting meanwhile.
  const UniqueFd another_silent = connect_to(socket);
  Child process = client(image_, whole(image_), socket,
                         [](const ClientMemory& memory, const Channel&) { memory.check_all(1, 1); });
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Handshake, OneWhoseDescriptorsWereLostOnTheWayIsRefused) {
  const TempDir directory;
  const std::string socket = directory / "fc.sock";
  ManagerProcess manager(directory, {"--firecracker", socket + "=" + image_.path()}, {.descriptors_max = 64});
  const Footprint before = manager.footprint();
  const ClientMemory memory(image_, whole(image_));
  {
    const UniqueFd connection = connect_to(socket);
    const std::vector<int> fds(120, memory.uffd().fd());
    send_with_fds(connection.get(), memory.handshake().dump(), fds);
    wait_refused(connection.get());
  }
  EXPECT_TRUE(manager.logged("refused: " + socket)) << manager.log();
  EXPECT_TRUE(eventually([&] { return manager.footprint().within(before); }));
  Child process = client(image_, whole(image_), socket,
                         [](const ClientMemory& served, const Channel&) { served.check_all(1, 1); });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_F(Handshake, WhereNoDescriptorIsLeftClientsWaitUntilOneIs) {
  const TempDir directory;
  const std::string socket = directory / "fc.sock";
  ManagerProcess manager(directory, {"--firecracker", socket + "=" + image_.path()}, {.descriptors_max = 80});
  // Started first, so that it holds no copies of the connections below.
  Child process = program([&](const Channel& channel) {
    channel.receive();
    const ClientMemory memory(image_, whole(image_));
    const UniqueFd connection = memory.hand_over(socket);
    memory.check_all(1, 1);
  });
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 40; ++i) silent.push_back(connect_to(socket));
  process.channel().send(1);
  EXPECT_TRUE(eventually([&] { return manager.logged("no descriptors for more clients"); })) << manager.log();
  EXPECT_EQ(manager.count("clients_refused"), 0u);
  silent.clear();
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

}  // namespace
}  // namespace uffdkit::test
