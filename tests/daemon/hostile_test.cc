// A client that may have one image, and tries to get more: at a manager that goes on, for a neighbour that
// must not notice.
#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <filesystem>
#include <functional>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "daemon/fixture.h"
#include "engine/session_state.h"
#include "support/native_connection.h"
#include "support/user.h"
#include "wire/unix_socket.h"

namespace uffdkit::test {
namespace {

using native::ErrorCode;

constexpr uid_t kHostile = 61002;
constexpr std::size_t kPages = 512;

// Where the hostile client finds what it may try.
struct Target {
  std::string native;
  std::string firecracker;
  std::string control;
  const Image& image;       // that it may have, as "own"
  std::uint64_t neighbour;  // where the neighbour's memory lies
};

struct Attack {
  std::string name;
  std::function<void(const Target&)> run;
};
std::ostream& operator<<(std::ostream& out, const Attack& attack) {
  return out << attack.name;
}

std::vector<RequestedRegion> region_at(std::uint64_t start, std::size_t pages) {
  return {{.memory = {Address(start), ByteCount(pages * 4096)}, .offset = {}, .page_size = kPage4K}};
}
std::vector<RequestedRegion> all_of(const ClientMemory& memory) {
  return region_at(std::bit_cast<std::uintptr_t>(memory.bytes(0).data()), memory.pages());
}
native::Attach attach_with(int fd, std::vector<RequestedRegion> regions, const std::string& image = "own") {
  return {.request = {.image = image, .regions = std::move(regions)}, .uffd = duplicate(fd)};
}
void refuse(bool refused, const std::string& what) {
  require(refused, what + " was not refused");
}

// Whether the other end hangs up within half a minute, whatever it says before.
bool hangs_up(int socket) {
  std::array<char, 4096> buffer;
  while (true) {
    pollfd entry{.fd = socket, .events = POLLIN, .revents = 0};
    if (poll(&entry, 1, 30'000) != 1) return false;
    if (read(socket, buffer.data(), buffer.size()) <= 0) return true;
  }
}

// Sends what goes without waiting; the manager may have hung up.
void throw_at(int socket, std::span<const std::byte> bytes, std::span<const int> fds = {}) {
  while (!bytes.empty()) {
    const Result<std::size_t> sent = send_some(socket, bytes, fds);
    if (!sent || *sent == 0) return;
    bytes = bytes.subspan(*sent);
    fds = {};
  }
}

// ---- descriptors that are no userfaultfd of this client's -------------------------------------------------

// Hands this over in every way that there is.
void hand_over_everywhere(const Target& target, int fd, const std::string& what) {
  const auto regions = region_at(0x7e0000000000, 16);
  NativeConnection connection(target.native);
  refuse(connection.is_refused(attach_with(fd, regions), ErrorCode::bad_descriptor) ||
             connection.is_refused(attach_with(fd, regions), ErrorCode::invalid),
         what);
  const SessionState state = take(SessionState::create("own"));
  refuse(connection.is_refused(
             native::Resume{.session = {}, .uffd = duplicate(fd), .state_file = duplicate(state.fd())},
             ErrorCode::bad_descriptor),
         what + " with a state file");
}

void descriptors_of_all_kinds(const Target& target) {
  int ends[2];
  require(pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0, "pipe2");
  const UniqueFd read_end(ends[0]);
  const UniqueFd write_end(ends[1]);
  hand_over_everywhere(target, read_end.get(), "a pipe");
  hand_over_everywhere(target, UniqueFd(open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC)).get(), "a directory");
  hand_over_everywhere(target, UniqueFd(open("/dev/zero", O_RDWR | O_CLOEXEC)).get(), "a device");
  hand_over_everywhere(target, UniqueFd(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)).get(), "an eventfd");
  hand_over_everywhere(target, connect_to(target.native).get(), "a socket");
  const UniqueFd memory(memfd_create("API:\taa:80000000:", MFD_CLOEXEC));
  hand_over_everywhere(target, memory.get(), "a memory file with a name like one");
  const UniqueFd pidfd(static_cast<int>(syscall(SYS_pidfd_open, getpid(), 0)));
  hand_over_everywhere(target, pidfd.get(), "a pidfd");
}

void userfaultfds_that_cannot_be_served(const Target& target) {
  const UniqueFd raw(linux_system_calls().userfaultfd(O_CLOEXEC | O_NONBLOCK | abi::kUserModeOnly));
  hand_over_everywhere(target, raw.get(), "one that is not enabled");
  const Uffd blocking = take(Uffd::create({.kernel_faults = false, .non_blocking = false}));
  NativeConnection connection(target.native);
  require(std::holds_alternative<native::Refused>(
              connection.ask(attach_with(blocking.fd(), region_at(0x7e0000000000, 16)))),
          "a blocking one is served");
}

// Its memory is gone: at most it is taken for a client that ends at once.
void a_userfaultfd_of_a_dead_process(const Target& target) {
  Child child([](const Channel& parent) {
    const Result<Uffd> uffd = Uffd::create({.kernel_faults = false});
    if (!uffd) return 1;
    parent.send_fd(0, uffd->fd());
    parent.receive();
    return 0;
  });
  std::uint64_t ignored = 0;
  const UniqueFd uffd = child.channel().receive_fd(ignored);
  child.kill();
  NativeConnection connection(target.native);
  connection.ask(attach_with(uffd.get(), region_at(0x7e0000000000, 16)));
}

// ---- addresses and images of others -----------------------------------------------------------------------

// A region at the neighbour's addresses is one of the client's own memory, where nothing lies.
void the_addresses_of_the_neighbour(const Target& target) {
  const ClientMemory memory(target.image, whole(target.image));
  NativeConnection connection(target.native);
  require(std::holds_alternative<native::Attached>(
              connection.ask(attach_with(memory.uffd().fd(), region_at(target.neighbour, 64)))),
          "not attached");
  (void)connection.ask(native::Detach{.mode = native::DetachMode::populate});
}

void images_of_others(const Target& target) {
  const ClientMemory memory(target.image, whole(target.image));
  NativeConnection connection(target.native);
  for (const char* name : {"secret", "guest", "folder/secret", "folder/../folder/secret", "../secret",
                           "./own", "/etc/passwd", "link", "own/../secret", "OWN", "own ", "*"}) {
    constexpr ErrorCode kCode = ErrorCode::not_permitted;
    refuse(connection.is_refused(native::ImageInfo{.image = name}, kCode), name);
    refuse(connection.is_refused(native::ShareImage{.image = name}, kCode), name);
    refuse(connection.is_refused(attach_with(memory.uffd().fd(), all_of(memory), name), kCode), name);
    const SessionState state = take(SessionState::create(name));
    refuse(connection.is_refused(
               native::Resume{
                   .session = {}, .uffd = duplicate(memory.uffd().fd()), .state_file = duplicate(state.fd())},
               kCode),
           std::string(name) + " by a state file");
  }
  const UniqueFd firecracker = connect_to(target.firecracker);
  refuse(hangs_up(firecracker.get()), "the neighbour's socket");
  const UniqueFd control = connect_to(target.control);
  const std::string request = "{\"command\":\"status\"}\n";
  throw_at(control.get(), std::as_bytes(std::span(request)));
  refuse(hangs_up(control.get()), "the control socket");
}

void the_memory_that_clients_share(const Target& target) {
  NativeConnection connection(target.native);
  native::Answer answer = connection.ask(native::ShareImage{.image = "own"});
  const auto* shared = std::get_if<native::ImageMemory>(&answer);
  if (shared == nullptr) return;
  const int fd = shared->memory.get();
  const std::string byte = "x";
  require(pwrite(fd, byte.data(), 1, 0) < 0, "it can be written to");
  require(ftruncate(fd, 0) != 0, "it can be cut");
  require(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED,
          "it can be mapped to write");
  require(!UniqueFd(open(("/proc/self/fd/" + std::to_string(fd)).c_str(), O_RDWR | O_CLOEXEC)),
          "it can be opened again to write");
  require(fchmod(fd, 0666) != 0, "its mode can be changed");
}

// ---- state files ------------------------------------------------------------------------------------------

void state_files_of_all_kinds(const Target& target) {
  const ClientMemory memory(target.image, whole(target.image));
  NativeConnection connection(target.native);
  const auto refused = [&](int state, const std::string& what) {
    const native::Answer answer = connection.ask(
        native::Resume{.session = {}, .uffd = duplicate(memory.uffd().fd()), .state_file = duplicate(state)});
    refuse(std::holds_alternative<native::Refused>(answer), what);
  };
  refused(memory.uffd().fd(), "a userfaultfd as a state file");
  refused(UniqueFd(open("/dev/zero", O_RDWR | O_CLOEXEC)).get(), "a device as a state file");
  refused(UniqueFd(memfd_create("empty", MFD_CLOEXEC | MFD_ALLOW_SEALING)).get(), "an empty one");
  std::mt19937_64 random(7);
  for (int times = 0; times < 50; ++times) {
    const SessionState good = take(SessionState::create("own"));
    // The header and the first records, at random.
    const std::uint64_t at = random() % 640;
    const auto value = static_cast<unsigned char>(random());
    (void)pwrite(good.fd(), &value, 1, static_cast<off_t>(at));
    const UniqueFd unsealed(memfd_create("copy", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    std::array<char, 4096> bytes{};
    (void)pread(good.fd(), bytes.data(), bytes.size(), 0);
    (void)ftruncate(unsealed.get(), 1 << 27);
    (void)pwrite(unsealed.get(), bytes.data(), bytes.size(), 0);
    refused(unsealed.get(), "one that can be cut");
  }
}

// A session goes on from a file that its client keeps writing to, and can spoil only itself.
void a_state_file_that_changes_meanwhile(const Target& target) {
  const ClientMemory memory(target.image, whole(target.image));
  SessionState own = take(SessionState::create("own"));
  require(own.add_region(all_of(memory)[0].memory, StoreOffset(0), kPage4K, SharingMode::none).has_value(),
          "");
  NativeConnection connection(target.native);
  const native::Answer answer = connection.ask(native::Resume{
      .session = {}, .uffd = duplicate(memory.uffd().fd()), .state_file = duplicate(own.fd())});
  if (!std::holds_alternative<native::Attached>(answer)) return;
  std::mt19937_64 random(11);
  std::vector<std::byte> noise(1 << 16);
  for (int times = 0; times < 200; ++times) {
    for (std::byte& byte : noise) byte = static_cast<std::byte>(random());
    (void)pwrite(own.fd(), noise.data(), noise.size(), static_cast<off_t>(random() % 3 * (1 << 16)));
    (void)connection.ask(native::Query{});
    (void)connection.ask(native::DropRegions{.ranges = {{all_of(memory)[0].memory.start, ByteCount(4096)}}});
  }
}

// ---- bytes ------------------------------------------------------------------------------------------------

void frames_of_noise(const Target& target) {
  std::mt19937_64 random(3);
  std::vector<std::byte> noise(5000);
  for (int times = 0; times < 100; ++times) {
    for (std::byte& byte : noise) byte = static_cast<std::byte>(random());
    const UniqueFd connection = connect_to(target.native);
    throw_at(connection.get(), std::span(noise).first(1 + random() % noise.size()));
  }
}

void half_frames_and_silence(const Target& target) {
  std::vector<UniqueFd> silent;
  for (int i = 0; i < 200; ++i) {
    silent.push_back(connect_to(target.native));
    const native::OutgoingFrame hello = native::encode_request(1, native::Hello{});
    throw_at(silent.back().get(),
             std::span(hello.bytes).first(static_cast<std::size_t>(i) % hello.bytes.size() + 1));
  }
}

void requests_whose_answers_are_not_read(const Target& target) {
  const UniqueFd connection = connect_to(target.native);
  std::vector<std::byte> bytes = native::encode_request(1, native::Hello{}).bytes;
  for (std::uint32_t i = 2; i < 3000; ++i) {
    const native::OutgoingFrame frame = native::encode_request(i, native::ImageInfo{.image = "own"});
    bytes.insert(bytes.end(), frame.bytes.begin(), frame.bytes.end());
  }
  throw_at(connection.get(), bytes);
}

void descriptors_without_end(const Target& target) {
  const UniqueFd null(open("/dev/null", O_RDWR | O_CLOEXEC));
  const std::vector<int> many(200, null.get());
  const native::OutgoingFrame hello = native::encode_request(1, native::Hello{});
  for (int times = 0; times < 50; ++times) {
    const UniqueFd connection = connect_to(target.native);
    throw_at(connection.get(), hello.bytes, many);
  }
}

// ---- more than its share ----------------------------------------------------------------------------------

void more_sessions_than_it_may_have(const Target& target) {
  std::vector<NativeConnection> connections;
  std::vector<std::unique_ptr<ClientMemory>> memories;
  std::size_t attached = 0;
  for (int i = 0; i < 20; ++i) {
    memories.push_back(std::make_unique<ClientMemory>(target.image, whole(target.image)));
    connections.emplace_back(target.native);
    const native::Answer answer =
        connections.back().ask(attach_with(memories.back()->uffd().fd(), all_of(*memories.back())));
    attached += std::holds_alternative<native::Attached>(answer) ? 1u : 0u;
  }
  require(attached == 4, std::to_string(attached) + " sessions");
}

void the_same_session_again_and_again(const Target& target) {
  const ClientMemory memory(target.image, whole(target.image));
  NativeConnection connection(target.native);
  auto attached = std::get<native::Attached>(connection.ask(attach_with(memory.uffd().fd(), all_of(memory))));
  for (int times = 0; times < 50; ++times) {
    NativeConnection another(target.native);
    refuse(another.is_refused(native::Resume{.session = attached.session,
                                             .uffd = duplicate(memory.uffd().fd()),
                                             .state_file = duplicate(attached.state_file.get())},
                              ErrorCode::busy),
           "a session that is served");
    refuse(connection.is_refused(attach_with(memory.uffd().fd(), all_of(memory)), ErrorCode::invalid),
           "a second session");
    refuse(connection.is_refused(native::Hello{}, ErrorCode::invalid), "a second HELLO");
  }
  // What it holds of the session is for reading only.
  require(pwrite(attached.state_file.get(), "x", 1, 0) < 0, "the state file can be written to");
}

// ---- the test ---------------------------------------------------------------------------------------------

const Attack kAttacks[] = {
    {"DescriptorsOfAllKinds", descriptors_of_all_kinds},
    {"UserfaultfdsThatCannotBeServed", userfaultfds_that_cannot_be_served},
    {"AUserfaultfdOfADeadProcess", a_userfaultfd_of_a_dead_process},
    {"TheAddressesOfTheNeighbour", the_addresses_of_the_neighbour},
    {"ImagesOfOthers", images_of_others},
    {"TheMemoryThatClientsShare", the_memory_that_clients_share},
    {"StateFilesOfAllKinds", state_files_of_all_kinds},
    {"AStateFileThatChangesMeanwhile", a_state_file_that_changes_meanwhile},
    {"FramesOfNoise", frames_of_noise},
    {"HalfFramesAndSilence", half_frames_and_silence},
    {"RequestsWhoseAnswersAreNotRead", requests_whose_answers_are_not_read},
    {"DescriptorsWithoutEnd", descriptors_without_end},
    {"MoreSessionsThanItMayHave", more_sessions_than_it_may_have},
    {"TheSameSessionAgainAndAgain", the_same_session_again_and_again},
};

class Hostile : public ManagerTest, public testing::WithParamInterface<Attack> {
 protected:
  void SetUp() override {
    if (geteuid() != 0) GTEST_SKIP() << "needs root, to become another user";
    ManagerTest::SetUp();
  }
  const Image neighbours_{directory_ / "neighbour", kPages, 1};
  const Image own_{directory_ / "own", kPages, 2};
  const TempDir images_;
};

INSTANTIATE_TEST_SUITE_P(Attacks, Hostile, testing::ValuesIn(kAttacks),
                         [](const testing::TestParamInfo<Attack>& attack) { return attack.param.name; });

TEST_P(Hostile, GetsNothingAndItsNeighbourDoesNotNotice) {
  std::filesystem::create_directory(images_ / "folder");
  std::filesystem::copy_file(neighbours_.path(), images_ / "secret");
  std::filesystem::copy_file(neighbours_.path(), images_ / "folder/secret");
  std::filesystem::create_symlink(neighbours_.path(), images_ / "link");
  const std::string native = directory_ / "native.sock";
  const std::string firecracker = directory_ / "fc.sock";
  ManagerProcess manager(directory_, {"--listen", native, "--image", "own=" + own_.path(), "--image",
                                      "guest=" + neighbours_.path(), "--images", images_.path().string(),
                                      "--firecracker", firecracker + "=" + neighbours_.path(), "--allow",
                                      "user:61002=own", "--user-sessions", "4", "--handshake-seconds", "1"});
  ASSERT_EQ(chmod(directory_.path().c_str(), 0711), 0);
  for (const std::string& socket : {native, firecracker, manager.control()})
    ASSERT_EQ(chmod(socket.c_str(), 0666), 0);
  Child neighbour = client(neighbours_, whole(neighbours_), firecracker,
                           [](const ClientMemory& memory, const Channel& channel) {
                             for (std::size_t page = 0; page < kPages / 2; ++page) memory.check(page);
                             channel.send(std::bit_cast<std::uintptr_t>(memory.bytes(0).data()));
                             // Touches pages until it is told to come to its end.
                             for (std::size_t page = kPages / 2; channel.receive() == 1; ++page) {
                               memory.check(page % kPages);
                               channel.send(1);
                             }
                             memory.check_all(2, 1);
                           });
  const Target target{.native = native,
                      .firecracker = firecracker,
                      .control = manager.control(),
                      .image = own_,
                      .neighbour = neighbour.channel().receive()};
  const Footprint before = manager.footprint();
  Child hostile = program([&](const Channel& channel) {
    become(kHostile);
    GetParam().run(target);
    channel.send(1);
    channel.receive();
  });
  // While it is at it, and when it is done but still there.
  for (int times = 0; times < 50; ++times) {
    neighbour.channel().send(1);
    ASSERT_EQ(neighbour.channel().receive(), 1u) << manager.log();
  }
  bool went_well = true;
  try {
    hostile.channel().receive();
  } catch (const std::exception&) {
    went_well = false;
  }
  neighbour.channel().send(1);
  EXPECT_EQ(neighbour.channel().receive(), 1u);
  EXPECT_TRUE(went_well) << manager.log();
  hostile.kill();
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 1 && manager.footprint().within(before); }))
      << before << " became " << manager.footprint() << "\n"
      << manager.log();
  neighbour.channel().send(0);
  EXPECT_EQ(neighbour.wait(), 0) << manager.log();
}

}  // namespace
}  // namespace uffdkit::test
