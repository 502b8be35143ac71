// A client that floods the manager with messages gets what it asks for, costs no more memory, descriptors and
// log than any other, and its neighbours are served meanwhile.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "daemon/fixture.h"
#include "support/floods.h"
#include "support/sanitizers.h"
#include "support/wall.h"

namespace uffdkit::test {
namespace {

// More threads than the faults of one session that are kept.
constexpr std::size_t kWaitingMax = 1024;
constexpr std::size_t kCrowd = kWaitingMax + 128;
// Buffers of fetches that are under way and what malloc keeps of them; the sanitizers' own on top.
constexpr std::uint64_t kGrowthMax = (kSanitized ? 512u : 24u) << 20;
// Lines of clients that come and go.
constexpr std::size_t kLogMax = 16u << 10;

class Floods : public ManagerTest {
 protected:
  Child flood(const std::function<void(const ClientMemory&)>& work) const {
    return client(image_, whole(image_), socket_,
                  [&](const ClientMemory& memory, const Channel&) { work(memory); });
  }

  // What the manager holds before the flood, a first client of each image being gone.
  void SetUp() override {
    ManagerTest::SetUp();
    if (IsSkipped()) return;
    serve_a_neighbour();
    Child first = flood([](const ClientMemory& memory) { memory.check_all(4, 1); });
    ASSERT_EQ(first.wait(), 0) << manager_.log();
    ASSERT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
    before_ = manager_.footprint();
    resident_before_ = resident_bytes();
  }

  void serve_a_neighbour() const {
    Child neighbour = client(other_, whole(other_), other_socket_,
                             [](const ClientMemory& memory, const Channel&) { memory.check_all(2, 2); });
    EXPECT_EQ(neighbour.wait(), 0) << manager_.log();
  }

  // What must hold while `floods` sessions flood it: neighbours come, touch all of their memory and go.
  void expect_harmless(std::size_t floods) const {
    for (int round = 0; round < 3; ++round) {
      serve_a_neighbour();
      EXPECT_GE(manager_.sessions(), floods) << "the flood is over already";
      expect_bounded(floods);
    }
  }

  void expect_bounded(std::size_t sessions) const {
    // One for the session, and for the process; a connection that asks for the status.
    constexpr std::size_t kPerSession = 4;
    // The neighbour may not have been forgotten yet.
    EXPECT_TRUE(eventually([&] {
      const Footprint now = manager_.footprint();
      return now.descriptors <= before_.descriptors + kPerSession * sessions &&
             now.state_mappings <= before_.state_mappings + kPerSession * sessions;
    })) << manager_.footprint()
        << ", before the flood " << before_;
    EXPECT_LE(resident_bytes(), resident_before_ + kGrowthMax);
    EXPECT_LE(manager_.log().size(), kLogMax) << manager_.log();
  }

  std::uint64_t resident_bytes() const {
    std::ifstream file("/proc/" + std::to_string(manager_.worker_pid()) + "/statm");
    std::uint64_t all_pages = 0;
    std::uint64_t resident_pages = 0;
    file >> all_pages >> resident_pages;
    return resident_pages * static_cast<std::uint64_t>(sysconf(_SC_PAGESIZE));
  }

  void expect_nothing_is_left() const {
    // Workers that were started because all others were held up stay.
    EXPECT_TRUE(eventually([&] {
      const Footprint now = manager_.footprint();
      return manager_.sessions() == 0 && now.descriptors <= before_.descriptors &&
             now.state_mappings <= before_.state_mappings;
    })) << manager_.footprint()
        << ", before the flood " << before_;
    expect_bounded(0);
  }

  std::uint64_t waiting() const {
    std::uint64_t most = 0;
    const nlohmann::json status = manager_.status();
    for (const auto& session : status.at("sessions"))
      most = std::max(most, session.at("pending").get<std::uint64_t>());
    return most;
  }

  const Image image_{directory_ / "flooded", 2048};
  const Image other_{directory_ / "other", 512, 9};
  const std::string socket_ = directory_ / "flooded.sock";
  const std::string other_socket_ = directory_ / "other.sock";
  const std::string wall_ =
      directory_ / "wall";  // while it stands, reads of the flooding client's image last
  ManagerProcess manager_{
      directory_,
      {"--firecracker", socket_ + "=" + image_.path(), "--firecracker", other_socket_ + "=" + other_.path(),
       "--store-fault", "stall,image=" + image_.path() + ",while=" + wall_}};
  Footprint before_{};
  std::uint64_t resident_before_ = 0;
};

// ---- duplicates -------------------------------------------------------------------------------------------

TEST_F(Floods, DuplicatesOfThreadsWithPendingSignalsCostNothingThatStays) {
  Wall wall(wall_);
  Child flooding = flood(fault_under_signals);
  ASSERT_TRUE(eventually([&] { return manager_.total("faults_merged") > 1000; }));
  expect_harmless(1);
  EXPECT_LE(waiting(), 4u);
  wall.take_down();
  EXPECT_EQ(flooding.wait(), 0) << manager_.log();
  expect_nothing_is_left();
}

// ---- giving back ------------------------------------------------------------------------------------------

TEST_F(Floods, MemoryThatFourThreadsGiveBackForEverCostsNothingThatStays) {
  Child flooding = flood(give_back_for_ever);
  ASSERT_TRUE(eventually([&] { return manager_.total("events") > 500; }));
  expect_harmless(1);
  flooding.kill();
  expect_nothing_is_left();
}

TEST_F(Floods, SeveralFloodsOfGivingBackHoldUpNoNeighbour) {
  Child first = flood(give_back_for_ever);
  Child second = flood(give_back_for_ever);
  Child third = flood(give_back_for_ever);
  ASSERT_TRUE(eventually([&] { return manager_.total("events") > 500 && manager_.sessions() == 3; }));
  expect_harmless(3);
  first.kill();
  second.kill();
  third.kill();
  expect_nothing_is_left();
}

// ---- faults -----------------------------------------------------------------------------------------------

TEST_F(Floods, FaultsOfManyThreadsForEverCostNothingThatStays) {
  Child flooding = flood(fault_for_ever);
  ASSERT_TRUE(eventually([&] { return manager_.total("faults") > 1000; }));
  expect_harmless(1);
  flooding.kill();
  expect_nothing_is_left();
}

TEST_F(Floods, MoreThreadsThanFaultsAreKeptWaitForASlowStoreAndAllAreAnswered) {
  Wall wall(wall_);
  Child flooding = flood([](const ClientMemory& memory) {
    // A thread for each page, none of them in a hole, which would be answered at once.
    std::vector<std::function<void()>> works;
    for (std::size_t page = 0; works.size() < kCrowd; ++page)
      if (!Image::is_hole(page)) works.emplace_back([&, page] { memory.check(page); });
    at_once(works);
  });
  ASSERT_TRUE(eventually([&] { return waiting() == kWaitingMax; }));
  expect_harmless(1);
  EXPECT_LE(waiting(), kWaitingMax);
  wall.take_down();
  EXPECT_EQ(flooding.wait(), 0) << manager_.log();
  expect_nothing_is_left();
}

}  // namespace
}  // namespace uffdkit::test
