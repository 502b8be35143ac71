// What one user may have of a manager, and that another has its own.
#include <poll.h>
#include <sys/stat.h>
#include <unistd.h>

#include <bit>
#include <optional>
#include <vector>

#include "daemon/fixture.h"
#include "support/native_connection.h"
#include "support/user.h"
#include "wire/unix_socket.h"

namespace uffdkit::test {
namespace {

using native::ErrorCode;

constexpr uid_t kOther = 61002;

class Quota : public ManagerTest {
 protected:
  ManagerProcess manager_with(const std::vector<std::string>& limits) const {
    std::vector<std::string> arguments = {"--listen",      socket_,
                                          "--image",       "guest=" + image_.path(),
                                          "--firecracker", firecracker_ + "=" + image_.path()};
    arguments.insert(arguments.end(), limits.begin(), limits.end());
    return ManagerProcess(directory_, arguments);
  }
  // Regions of so many pages each, from this page of the client's on.
  static std::vector<RequestedRegion> regions(const ClientMemory& memory, std::size_t first,
                                              std::size_t count, std::size_t pages = 1) {
    std::vector<RequestedRegion> list;
    for (std::size_t i = 0; i < count; ++i)
      list.push_back(
          {.memory = {Address(std::bit_cast<std::uintptr_t>(memory.bytes(first + i * pages).data())),
                      ByteCount(pages * 4096)},
           .offset = StoreOffset((first + i * pages) * 4096),
           .page_size = kPage4K});
    return list;
  }
  static native::Attach attach_request(const ClientMemory& memory, std::vector<RequestedRegion> regions) {
    return {.request = {.image = "guest", .regions = std::move(regions)},
            .uffd = duplicate(memory.uffd().fd())};
  }
  static nlohmann::json user(const ManagerProcess& manager, uid_t uid) {
    const nlohmann::json status = manager.status();
    for (const auto& entry : status.at("users"))
      if (entry.at("uid") == uid) return entry;
    return nullptr;
  }
  // Whether the other end closes the connection without a word.
  static bool is_closed(int socket) {
    pollfd entry{.fd = socket, .events = POLLIN, .revents = 0};
    char byte;
    return poll(&entry, 1, 30'000) == 1 && read(socket, &byte, 1) <= 0;
  }
  void run(const std::function<void()>& work) const {
    Child process = program([&](const Channel&) { work(); });
    EXPECT_EQ(process.wait(), 0);
  }

  const Image image_{directory_ / "image", 64};
  const std::string socket_ = directory_ / "native.sock";
  const std::string firecracker_ = directory_ / "fc.sock";
};

TEST_F(Quota, AUserHasSoManySessionsByWhateverSocketAndAnotherUserItsOwn) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to become another user";
  const ManagerProcess manager = manager_with({"--user-sessions", "2", "--allow", "user:61002=*"});
  ASSERT_EQ(chmod(directory_.path().c_str(), 0711), 0);
  ASSERT_EQ(chmod(socket_.c_str(), 0666), 0);
  Child process = program([&](const Channel&) {
    const ClientMemory first(image_, whole(image_));
    const ClientMemory second(image_, whole(image_));
    const ClientMemory third(image_, whole(image_));
    NativeConnection native(socket_);
    require(std::holds_alternative<native::Attached>(native.ask(attach_request(first, regions(first, 0, 1)))),
            "not attached");
    const UniqueFd connection = second.hand_over(firecracker_);
    second.check(0);
    NativeConnection another(socket_);
    require(another.is_refused(attach_request(third, regions(third, 0, 1)), ErrorCode::limit), "attached");
    const UniqueFd refused = third.hand_over(firecracker_);
    require(is_closed(refused.get()), "a third session is served");
    require(manager.sessions() == 2, "not two sessions");
    require(user(manager, 0).at("refused_by_quota") == 2, "the refusals are not counted");
    become(kOther);
    NativeConnection others(socket_);
    require(std::holds_alternative<native::Attached>(others.ask(attach_request(third, regions(third, 0, 1)))),
            "another user is not served");
    third.check(0);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
  EXPECT_TRUE(manager.logged("user 0 would have more than 2 sessions")) << manager.log();
  // The place of one that has ended is free again.
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
  run([&] {
    const ClientMemory memory(image_, whole(image_));
    const UniqueFd connection = memory.hand_over(firecracker_);
    memory.check_all(1, 1);
  });
}

TEST_F(Quota, RegionsAndMemoryAreCountedWhenAttachedAddedAndDropped) {
  const ManagerProcess manager = manager_with({"--user-regions", "10", "--user-memory", "64K"});
  run([&] {
    const ClientMemory memory(image_, whole(image_));
    NativeConnection connection(socket_);
    require(connection.is_refused(attach_request(memory, regions(memory, 0, 11)), ErrorCode::limit),
            "11 regions");
    require(connection.is_refused(attach_request(memory, regions(memory, 0, 1, 17)), ErrorCode::limit),
            "17 pages");
    require(std::holds_alternative<native::Attached>(
                connection.ask(attach_request(memory, regions(memory, 0, 8)))),
            "8 regions are refused");
    require(connection.is_refused(native::AddRegions{.regions = regions(memory, 8, 3)}, ErrorCode::limit),
            "11 regions, with those that were added");
    require(connection.is_refused(native::AddRegions{.regions = regions(memory, 8, 1, 9)}, ErrorCode::limit),
            "17 pages, with those that were added");
    const native::AddRegions two{.regions = regions(memory, 8, 2, 4)};
    require(std::holds_alternative<native::Ok>(connection.ask(two)), "10 regions of 16 pages are refused");
    require(connection.is_refused(native::AddRegions{.regions = regions(memory, 16, 1)}, ErrorCode::limit),
            "11");
    const nlohmann::json used = user(manager, geteuid());
    require(used.at("regions") == 10 && used.at("memory_bytes") == 65536, used.dump());
    require(used.at("refused_by_quota") == 5, used.dump());
    const native::DropRegions drop{.ranges = {regions(memory, 0, 1, 4)[0].memory}};
    require(std::holds_alternative<native::Ok>(connection.ask(drop)), "not dropped");
    require(std::holds_alternative<native::Ok>(
                connection.ask(native::AddRegions{.regions = regions(memory, 16, 4)})),
            "what was dropped cannot be had again");
    for (std::size_t page = 4; page < 20; ++page) memory.check(page);
  });
}

TEST_F(Quota, RegionsThatAreAskedForAtOnceAreCountedBeforeTheyAreThere) {
  const ManagerProcess manager = manager_with({"--user-regions", "10"});
  run([&] {
    const ClientMemory memory(image_, whole(image_));
    NativeConnection connection(socket_);
    require(std::holds_alternative<native::Attached>(
                connection.ask(attach_request(memory, regions(memory, 0, 1)))),
            "not attached");
    // Without waiting for an answer.
    std::vector<std::byte> bytes;
    for (std::uint32_t i = 0; i < 20; ++i) {
      const native::OutgoingFrame frame =
          native::encode_request(100 + i, native::AddRegions{.regions = regions(memory, 1 + i, 1)});
      bytes.insert(bytes.end(), frame.bytes.begin(), frame.bytes.end());
    }
    succeed(send_all(connection.fd(), bytes, {}, std::chrono::seconds(30)));
    // One that is just done may count twice for a moment, so fewer than ten may have been granted; not more.
    require(eventually([&] {
              const nlohmann::json used = user(manager, geteuid());
              const auto regions = used.at("regions").get<std::uint64_t>();
              return regions <= 10 && regions + used.at("refused_by_quota").get<std::uint64_t>() == 21;
            }),
            manager.status().dump());
  });
}

TEST_F(Quota, WhoAsksTooOftenIsRefusedAndServedLater) {
  const ManagerProcess manager = manager_with({"--user-requests", "20"});
  run([&] {
    NativeConnection connection(socket_);
    std::size_t refused = 0;
    for (int i = 0; i < 100; ++i)
      if (connection.is_refused(native::ImageInfo{.image = "guest"}, ErrorCode::limit)) ++refused;
    require(refused > 0, "a hundred requests were answered");
    require(user(manager, geteuid()).at("refused_by_quota") == refused, manager.status().dump());
    require(eventually([&] {
              return std::holds_alternative<native::ImageSize>(
                  connection.ask(native::ImageInfo{.image = "guest"}));
            }),
            "it is never served again");
  });
  // The log is not filled with it.
  std::size_t lines = 0;
  for (std::size_t at = 0; (at = manager.log().find("makes more than 20 requests", at)) != std::string::npos;
       ++at)
    ++lines;
  EXPECT_LE(lines, 60u);
  EXPECT_GE(lines, 1u);
}

}  // namespace
}  // namespace uffdkit::test
