// A manager is after many clients what it was before.
//
// UFFDKIT_CYCLES in the environment for another number of them.
#include <unistd.h>

#include <bit>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "daemon/fixture.h"
#include "support/native_connection.h"
#include "support/sanitizers.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kCyclesOfAProcess = 250;
constexpr std::size_t kCycles = kSanitized ? 500 : 10'000;
// What the allocator keeps shifts by some hundred; ten thousand cycles that lose 128 bytes each are more.
constexpr std::uint64_t kGrowthKibMax = 1024;

std::size_t cycles_wanted() {
  const char* text = std::getenv("UFFDKIT_CYCLES");
  return text != nullptr ? std::strtoul(text, nullptr, 10) : kCycles;
}

// Of the manager's own memory, in KiB.
std::uint64_t memory_of(pid_t pid) {
  std::ifstream status("/proc/" + std::to_string(pid) + "/status");
  for (std::string word; status >> word;) {
    if (word != "RssAnon:") continue;
    std::uint64_t kib = 0;
    status >> kib;
    return kib;
  }
  return 0;
}

class Cycles : public ManagerTest {
 protected:
  // One client after the other in one process: attached, served and gone, by each way that there is.
  void run(std::size_t cycles) const {
    for (std::size_t done = 0; done < cycles; done += kCyclesOfAProcess) {
      Child process = program([&](const Channel&) {
        for (std::size_t i = 0; i < kCyclesOfAProcess; ++i) one_cycle(i);
      });
      ASSERT_EQ(process.wait(), 0);
    }
  }
  void one_cycle(std::size_t number) const {
    const ClientMemory memory(image_, {.regions = {{.pages = 16}}});
    const AddressRange range{Address(std::bit_cast<std::uintptr_t>(memory.bytes(0).data())),
                             ByteCount(16 * 4096)};
    NativeConnection connection(native_);
    const native::Answer answer = connection.ask(native::Attach{
        .request = {.image = "guest", .regions = {{.memory = range, .offset = {}, .page_size = kPage4K}}},
        .uffd = duplicate(memory.uffd().fd())});
    require(std::holds_alternative<native::Attached>(answer), "not attached");
    memory.check(number % 16);
    if (number % 4 == 3) return;  // without a word
    const auto mode = number % 2 == 0 ? native::DetachMode::release : native::DetachMode::populate;
    require(std::holds_alternative<native::Ok>(connection.ask(native::Detach{.mode = mode})), "not detached");
  }

  const Image image_{directory_ / "image", 16};
  const std::string native_ = directory_ / "native.sock";
};

TEST_F(Cycles, LeaveAManagersDescriptorsThreadsAndMemoryAsTheyWere) {
  const ManagerProcess manager(directory_, {"--listen", native_, "--image", "guest=" + image_.path()});
  const auto is_at_rest = [&] { return manager.sessions() == 0; };
  // What is made once, and pools that fill.
  run(kCyclesOfAProcess);
  ASSERT_TRUE(eventually(is_at_rest));
  const Footprint before = manager.footprint();
  const std::uint64_t memory_before = memory_of(manager.worker_pid());
  run(cycles_wanted());
  ASSERT_TRUE(eventually(is_at_rest));
  EXPECT_TRUE(eventually([&] { return manager.footprint().within(before); }))
      << before << " became " << manager.footprint();
  // Sanitizers keep what was freed.
  if (!kSanitized) {
    EXPECT_LE(memory_of(manager.worker_pid()), memory_before + kGrowthKibMax) << "KiB, of " << memory_before;
  }
  EXPECT_EQ(manager.count("sessions_ended"), kCyclesOfAProcess + cycles_wanted());
  std::printf("%zu cycles; memory %llu KiB before, %llu KiB after\n", cycles_wanted(),
              static_cast<unsigned long long>(memory_before),
              static_cast<unsigned long long>(memory_of(manager.worker_pid())));
}

}  // namespace
}  // namespace uffdkit::test
