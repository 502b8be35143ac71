// Programs that use the client library: attached, changed, resumed at a successor, detached.
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <array>
#include <bit>
#include <filesystem>
#include <variant>

#include "daemon/fixture.h"
#include "support/mapping.h"
#include "support/native_connection.h"
#include "wire/native.h"
#include "wire/unix_socket.h"

namespace uffdkit::test {
namespace {

class Native : public ManagerTest {
 protected:
  std::vector<std::string> options() const {
    return {"--listen", socket_, "--image", "guest=" + image_.path(), "--images", images_.path().string()};
  }
  std::span<const std::byte, 4096> page(const RemoteMapping& memory, std::size_t index) const {
    return std::span<const std::byte, 4096>(memory.data() + index * 4096, 4096);
  }
  // Touches pages of memory that shows the image from its page `image_page` on.
  void check(const RemoteMapping& memory, std::size_t first, std::size_t count,
             std::size_t image_page = 0) const {
    for (std::size_t index = first; index < first + count; ++index)
      require(image_.holds(image_page + index, page(memory, index)),
              "page " + std::to_string(index) + " is wrong");
  }
  void check_zero(const RemoteMapping& memory, std::size_t first, std::size_t count) const {
    for (std::size_t index = first; index < first + count; ++index)
      require(std::ranges::all_of(page(memory, index), [](std::byte b) { return b == std::byte{0}; }),
              "page " + std::to_string(index) + " is not zero");
  }
  static void give_back(const RemoteMapping& memory, std::size_t first, std::size_t count) {
    require(madvise(memory.data() + first * 4096, count * 4096, MADV_DONTNEED) == 0, "madvise");
  }
  void run(const std::function<void()>& work) {
    Child process = program([&](const Channel&) { work(); });
    EXPECT_EQ(process.wait(), 0);
  }

  const Image image_{directory_ / "image", 512};
  const TempDir images_;
  const std::string socket_ = directory_ / "native.sock";
};

TEST_F(Native, AttachingGivesTheWholeImage) {
  ManagerProcess manager(directory_, options());
  run([&] {
    const RemoteMapping memory = take(attach(socket_, "guest"));
    require(memory.size() == 512 * 4096, "the size is wrong");
    check(memory, 0, 512);
  });
}

// It has descriptors of its own: it is left alone, and hands them over again.
TEST_F(Native, AClientWhoseImageIsGoneWhenAWorkerTakesOverWaitsUntilItIsBack) {
  const ManagerProcess manager(directory_, options());
  Child process = program([&](const test::Channel& channel) {
    const RemoteMapping memory = take(attach(socket_, "guest"));
    check(memory, 0, 1);
    channel.send(1);
    channel.receive();
    check(memory, 0, 1);
    check(memory, 100, 1);
  });
  process.channel().receive();
  image_.cut(0);
  ::kill(manager.worker_pid(), SIGKILL);
  ASSERT_TRUE(eventually([&] { return manager.count("takeovers") == 1; }));
  EXPECT_EQ(manager.sessions(), 0u) << manager.log();
  process.channel().send(1);
  // Whole at once: half of an image would be served as what it is.
  const Image again(directory_ / "again", image_.pages());
  std::filesystem::rename(again.path(), image_.path());
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_F(Native, APartOfTheImageComesFromItsOffset) {
  ManagerProcess manager(directory_, options());
  run([&] {
    const RemoteMapping memory =
        take(attach(socket_, "guest", {.offset = StoreOffset(100 * 4096), .length = ByteCount(50 * 4096)}));
    check(memory, 0, 50, 100);
  });
}

TEST_F(Native, RegionsCanBeAddedAndDropped) {
  ManagerProcess manager(directory_, options());
  run([&] {
    RemoteMapping memory = take(attach(socket_, "guest", {.length = ByteCount(64 * 4096)}));
    const Mapping more = Mapping::anonymous(32 * 4096);
    succeed(memory.session().add(
        {.memory = more.range(), .offset = StoreOffset(200 * 4096), .page_size = kPage4K}));
    for (std::size_t index = 0; index < 16; ++index)
      require(image_.holds(200 + index, more.bytes(index)), "an added page is wrong");
    succeed(memory.session().drop(more.range()));
    require(image_.holds(200, more.bytes(0)), "a page that was there is gone");
    for (std::size_t index = 16; index < 32; ++index)
      require(more.read(index) == std::byte{0}, "a page came after its region was dropped");
    check(memory, 0, 64);
    const auto beyond = Mapping::anonymous(4096);
    require(!memory.session().add(
                {.memory = beyond.range(), .offset = StoreOffset(512 * 4096), .page_size = kPage4K}),
            "a region beyond the image was added");
  });
}

TEST_F(Native, ARegionThatIsAddedWhereOneIsServedTakesItsPlace) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const test::Channel&) {
    const ClientMemory memory(image_, whole(image_));
    const AddressRange start{Address(std::bit_cast<std::uintptr_t>(memory.bytes(0).data())),
                             ByteCount(64 * 4096)};
    NativeConnection connection(socket_);
    const native::Answer attached =
        connection.ask(native::Attach{.request = {.image = "guest", .regions = {{start, {}, kPage4K}}},
                                      .uffd = duplicate(memory.uffd().fd())});
    require(std::holds_alternative<native::Attached>(attached), "not attached");
    memory.check(0);
    memory.give_back(32, 1, MADV_DONTNEED);
    const native::AddRegions request{.regions = {{start, StoreOffset(100 * 4096), kPage4K}}};
    for (int time = 0; time < 2; ++time)
      require(std::holds_alternative<native::Ok>(connection.ask(request)), "not added");
    require(image_.holds(0, memory.bytes(0)), "a page that was there has changed");
    require(image_.holds(132, memory.bytes(32)), "a page is not the new region's");
    require(image_.holds(163, memory.bytes(63)), "a page is not the new region's");
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_F(Native, MoreRegionsThanASessionMayHaveAreRefusedAsALimit) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const test::Channel&) {
    const ClientMemory memory(image_, whole(image_));
    const auto page = [&](std::size_t number) {
      return RequestedRegion{
          .memory = {Address(std::bit_cast<std::uintptr_t>(memory.bytes(number).data())), ByteCount(4096)},
          .offset = StoreOffset(number * 4096),
          .page_size = kPage4K};
    };
    NativeConnection connection(socket_);
    require(std::holds_alternative<native::Attached>(connection.ask(native::Attach{
                .request = {.image = "guest", .regions = {page(0)}}, .uffd = duplicate(memory.uffd().fd())})),
            "not attached");
    // Mapped elsewhere than at the client: what is not there is not touched either.
    native::AddRegions many;
    for (std::uint64_t i = 0; i < 1000; ++i)
      many.regions.push_back({.memory = {Address((std::uint64_t{1} << 46) + i * 8192), ByteCount(4096)},
                              .offset = {},
                              .page_size = kPage4K});
    require(std::holds_alternative<native::Ok>(connection.ask(many)), "not added");
    for (RequestedRegion& region : many.regions) region.memory.start.value += std::uint64_t{1} << 40;
    const native::Answer answer = connection.ask(many);
    const auto* refused = std::get_if<native::Refused>(&answer);
    require(refused != nullptr && refused->code == native::ErrorCode::limit, "not refused as a limit");
    memory.check(0);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_F(Native, QueryTellsWhatWasServed) {
  ManagerProcess manager(directory_, options());
  run([&] {
    RemoteMapping memory = take(attach(socket_, "guest"));
    check(memory, 0, 512);
    // A page is counted just after its reader has it.
    require(eventually([&] {
              const RemoteStatus status = take(memory.query());
              return status.pages_served == 512 && status.faults_pending == 0;
            }),
            "the counts are wrong");
  });
}

TEST_F(Native, DetachingWithEverythingLeavesEveryByteAndNothingInTheManager) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel& channel) {
    RemoteMapping memory = take(attach(socket_, "guest"));
    check(memory, 10, 5);
    give_back(memory, 40, 8);
    succeed(memory.detach(DetachWay::populate));
    channel.send(1);
    channel.receive();
    check(memory, 0, 40);
    check_zero(memory, 40, 8);
    check(memory, 48, 512 - 48);
  });
  process.channel().receive();
  EXPECT_EQ(manager.sessions(), 0u);
  EXPECT_EQ(manager.stop(), 0);
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

TEST_F(Native, DetachingByReleaseLeavesWhatCameAndZerosElsewhere) {
  ManagerProcess manager(directory_, options());
  run([&] {
    RemoteMapping memory = take(attach(socket_, "guest"));
    check(memory, 0, 16);
    succeed(memory.detach(DetachWay::release));
    check(memory, 0, 16);
    check_zero(memory, 256, 256);
    require(manager.sessions() == 0, "the session is still there");
  });
}

TEST_F(Native, AClientThatIsDestroyedWithoutAWordLeavesNothingBehind) {
  ManagerProcess manager(directory_, options());
  run([&] { check(take(attach(socket_, "guest")), 0, 512); });
  ASSERT_TRUE(eventually([&] { return manager.sessions() == 0; }));
  const Footprint before = manager.footprint();
  for (int times = 0; times < 5; ++times) run([&] { check(take(attach(socket_, "guest")), 0, 512); });
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0 && manager.footprint().within(before); }))
      << before << " became " << manager.footprint();
}

TEST_F(Native, ASuccessorServesTheClientsOfAManagerThatWasKilled) {
  ManagerProcess killed(directory_, options());
  Child process = program([&](const Channel& channel) {
    RemoteMapping memory = take(attach(socket_, "guest"));
    check(memory, 0, 100);
    give_back(memory, 20, 30);
    check_zero(memory, 20, 10);
    channel.send(1);
    // The manager is killed about now; these wait for its successor.
    at_once({[&] { check(memory, 100, 412); }, [&] { check_zero(memory, 30, 20); },
             [&] {
               channel.receive();
               require(eventually([&] { return memory.session().connection().resumes >= 1; }), "not resumed");
             }});
    give_back(memory, 300, 4);
    check_zero(memory, 300, 4);
    check_zero(memory, 20, 30);
    check(memory, 0, 20);
    check(memory, 50, 250);
  });
  process.channel().receive();
  killed.kill();
  ManagerProcess successor(directory_, options());
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0) << successor.log();
}

TEST_F(Native, AManagerThatEndsLeavesItsClientsToASuccessor) {
  ManagerProcess first(directory_, options());
  Child process = program([&](const Channel& channel) {
    RemoteMapping memory = take(attach(socket_, "guest"));
    check(memory, 0, 64);
    give_back(memory, 8, 8);
    channel.send(1);
    channel.receive();
    check_zero(memory, 8, 8);
    check(memory, 64, 448);
  });
  process.channel().receive();
  EXPECT_EQ(first.stop(), 0) << first.log();
  process.channel().send(1);
  ManagerProcess second(directory_, options());
  EXPECT_EQ(process.wait(), 0) << second.log();
}

TEST_F(Native, ASessionIsServedOnceWhateverNumberAResumeGivesIt) {
  ManagerProcess manager(directory_, options());
  run([&] {
    const ClientMemory memory(image_, whole(image_));
    const auto attach_request = [&] {
      return native::Attach{
          .request = {.image = "guest",
                      .regions = {{.memory = {.start = Address(
                                                  reinterpret_cast<std::uint64_t>(memory.bytes(0).data())),
                                              .length = ByteCount(memory.pages() * 4096)},
                                   .offset = StoreOffset(0),
                                   .page_size = kPage4K}}},
          .uffd = duplicate(memory.uffd().fd())};
    };
    NativeConnection first(socket_);
    const auto attached = std::get<native::Attached>(first.ask(attach_request()));
    const auto resume = [&](NativeConnection& connection, std::uint64_t number) {
      return connection.ask(native::Resume{.session = static_cast<native::SessionId>(number),
                                           .uffd = duplicate(memory.uffd().fd()),
                                           .state_file = duplicate(attached.state_file.get())});
    };
    NativeConnection second(socket_);
    const auto refused = std::get<native::Refused>(resume(second, 1000));
    require(refused.code == native::ErrorCode::busy, refused.message);
    require(manager.sessions() == 1, "it is served twice");
    memory.check_all(1, 1);
  });
}

TEST_F(Native, ASessionIsResumedWhenItsImageHasBeenReplacedAndGoesOnWithTheOldOne) {
  const std::string name = "replaced";
  std::filesystem::copy_file(image_.path(), images_ / name);
  ManagerProcess manager(directory_, options());
  run([&] {
    const ClientMemory memory(image_, whole(image_));
    const auto region = [&](std::size_t first, std::size_t count) {
      return RequestedRegion{
          .memory = {.start = Address(reinterpret_cast<std::uint64_t>(memory.bytes(first).data())),
                     .length = ByteCount(count * 4096)},
          .offset = StoreOffset(first * 4096),
          .page_size = kPage4K};
    };
    std::optional<NativeConnection> first(socket_);
    const auto attached = std::get<native::Attached>(first->ask(native::Attach{
        .request = {.image = name, .regions = {region(0, 256)}}, .uffd = duplicate(memory.uffd().fd())}));
    std::filesystem::remove(images_ / name);
    first.reset();
    NativeConnection second(socket_);
    native::Answer resumed = native::Ok{};
    const auto is_busy = [&] {
      const auto* refused = std::get_if<native::Refused>(&resumed);
      return refused != nullptr && refused->code == native::ErrorCode::busy;
    };
    // The end of the first connection may not have been seen yet.
    require(eventually([&] {
              resumed = second.ask(native::Resume{.session = attached.session,
                                                  .uffd = duplicate(memory.uffd().fd()),
                                                  .state_file = duplicate(attached.state_file.get())});
              return !is_busy();
            }),
            "it stays busy");
    require(std::holds_alternative<native::Attached>(resumed), "it is not resumed");
    require(std::holds_alternative<native::Ok>(second.ask(native::AddRegions{.regions = {region(256, 256)}})),
            "nothing can be added");
    memory.check_all(1, 1);
  });
}

TEST_F(Native, RequestsThatDoNotWaitForAnswersAreAnsweredInOrder) {
  ManagerProcess manager(directory_, options());
  const UniqueFd socket = connect_to(socket_);
  std::vector<std::byte> bytes;
  const auto add = [&](std::uint32_t number, native::Request request) {
    const native::OutgoingFrame frame = native::encode_request(number, std::move(request));
    bytes.insert(bytes.end(), frame.bytes.begin(), frame.bytes.end());
  };
  add(1, native::Hello{});
  add(2, native::ImageInfo{.image = "guest"});
  add(3, native::Query{});
  add(4, native::ImageInfo{.image = "missing"});
  add(5, native::ImageInfo{.image = "guest"});
  succeed(send_all(socket.get(), bytes, {}, std::chrono::seconds(30)));
  native::FrameReader reader(native::FrameReader::Reads::answers);
  std::vector<std::uint32_t> numbers;
  std::vector<std::size_t> kinds;
  while (numbers.size() < 5) {
    std::array<std::byte, 4096> buffer;
    pollfd entry{.fd = socket.get(), .events = POLLIN, .revents = 0};
    ASSERT_EQ(poll(&entry, 1, 30'000), 1);
    for (native::Frame& frame : take(reader.feed(take(receive_some(socket.get(), buffer))))) {
      numbers.push_back(frame.request_id);
      kinds.push_back(take(native::decode_answer(std::move(frame))).index());
    }
  }
  EXPECT_EQ(numbers, (std::vector<std::uint32_t>{1, 2, 3, 4, 5}));
  const std::size_t size = native::Answer(native::ImageSize{}).index();
  const std::size_t refused = native::Answer(native::Refused{}).index();
  EXPECT_EQ(kinds, (std::vector<std::size_t>{native::Answer(native::Welcome{}).index(), size, refused,
                                             refused, size}));
}

TEST_F(Native, ASecondHelloIsRefusedAndTheConnectionGoesOn) {
  ManagerProcess manager(directory_, options());
  NativeConnection connection(socket_);
  const native::Answer second = connection.ask(native::Hello{});
  const auto* refused = std::get_if<native::Refused>(&second);
  ASSERT_NE(refused, nullptr);
  EXPECT_EQ(refused->code, native::ErrorCode::invalid);
  EXPECT_EQ(std::get<native::ImageSize>(connection.ask(native::ImageInfo{.image = "guest"})).size,
            ByteCount(512 * 4096));
  EXPECT_EQ(manager.count("clients_refused"), 1u);
}

TEST_F(Native, AnUnknownImageIsRefusedByName) {
  ManagerProcess manager(directory_, options());
  const auto memory = attach(socket_, "other");
  ASSERT_FALSE(memory.has_value());
  EXPECT_NE(memory.error().text().find("other"), std::string::npos) << memory.error().text();
  EXPECT_EQ(manager.count("clients_refused"), 1u);
}

TEST_F(Native, AnImageBelowADirectoryIsFoundAndOneOutsideOrBehindALinkIsNot) {
  std::filesystem::create_directory(images_.path() / "deep");
  std::filesystem::copy_file(image_.path(), images_.path() / "deep" / "image");
  std::filesystem::create_symlink(image_.path(), images_.path() / "link");
  std::filesystem::create_directory_symlink(directory_.path(), images_.path() / "folder");
  ManagerProcess manager(directory_, options());
  run([&] {
    check(take(attach(socket_, "deep/image")), 0, 64);
    const std::string outside = "../" + directory_.path().filename().string() + "/image";
    for (const std::string& name : {outside, std::string("link"), std::string("folder/image"), image_.path(),
                                    std::string("deep"), std::string("deep/../../") + outside})
      require(!attach(socket_, name).has_value(), name + " was served");
    require(manager.sessions() <= 1, "a refused client has a session");
  });
}

TEST_F(Native, ManyClientsAttachAtOnce) {
  ManagerProcess manager(directory_, options());
  run([&] {
    const std::vector<std::function<void()>> works(12,
                                                   [&] { check(take(attach(socket_, "guest")), 0, 512); });
    at_once(works);
  });
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
}

// ---- fork -------------------------------------------------------------------------------------------------

TEST_F(Native, AForkedChildThatAttachesItselfHasTheImageAndItsParentWhatItWrote) {
  ManagerProcess manager(directory_, options());
  run([&] {
    const RemoteMapping memory = take(attach(socket_, "guest"));
    check(memory, 0, 100);
    std::fill_n(memory.data() + 7 * 4096, 4096, std::byte{0xee});
    Child child = program([&](const Channel&) {
      const RemoteMapping own = take(attach(socket_, "guest"));
      check(own, 0, 512);
      // And where its parent's is.
      const Mapping same = Mapping::map(memory.data(), memory.size(), PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1);
      Uffd uffd = take(Uffd::create({.required = Features(abi::kFeatureEventRemove)}));
      take(uffd.register_range(same.range(), kMissing));
      const RequestedRegion region{.memory = same.range(), .offset = StoreOffset(0), .page_size = kPage4K};
      const RemoteSession session = take(attach_memory(socket_, "guest", std::move(uffd), {&region, 1}));
      check(memory, 0, 512);
    });
    check(memory, 100, 412);
    require(child.wait() == 0, "the child failed");
    require(page(memory, 7)[5] == std::byte{0xee}, "what the parent wrote is gone");
    check(memory, 0, 7);
  });
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
  EXPECT_EQ(manager.count("sessions_ended"), 3u);
}

}  // namespace
}  // namespace uffdkit::test
