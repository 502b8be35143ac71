// Clients that share one copy of an image.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <uffdkit/client.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <memory>
#include <random>
#include <thread>

#include "daemon/fixture.h"
#include "support/sanitizers.h"
#include "support/sigbus.h"

namespace uffdkit::test {
namespace {

template <class T>
T take(Result<T> result) {
  require(result.has_value(), result ? "" : result.error().text());
  return std::move(*result);
}
void succeed(const Result<void>& result) {
  require(result.has_value(), result ? "" : result.error().text());
}

std::span<const std::byte, 4096> page(const RemoteMapping& memory, std::size_t index) {
  return std::span<const std::byte, 4096>(memory.data() + index * 4096, 4096);
}

// Of one process, in bytes: its part of all that it maps.
std::uint64_t proportional_bytes(pid_t pid) {
  std::ifstream file("/proc/" + std::to_string(pid) + "/smaps_rollup");
  for (std::string word; file >> word;) {
    if (word != "Pss:") continue;
    std::uint64_t kib = 0;
    file >> kib;
    return kib * 1024;
  }
  throw std::runtime_error("no Pss in smaps_rollup");
}

// Parameter: whether pages that are given back have to read as zero, which needs the other mode.
class Clones : public ManagerTest, public testing::WithParamInterface<bool> {
 protected:
  static constexpr std::size_t kPages = 2048;  // 8 MiB

  void SetUp() override {
    ManagerTest::SetUp();
    const Result<KernelFeatures> kernel = probe_features();
    if (kernel && GetParam() && !kernel->available.has(Features(abi::kFeatureMinorShmem)))
      GTEST_SKIP() << "needs a kernel with minor faults of shared memory (5.14)";
  }
  std::vector<std::string> options() const {
    return {"--listen", socket_, "--image", "guest=" + image_.path()};
  }
  RemoteMapping clone(AttachOptions options = {}) const {
    options.sharing = AttachOptions::Share::if_possible;
    options.removed_reads_zero = GetParam();
    RemoteMapping memory = take(attach(socket_, "guest", options));
    require(memory.session().sharing() != SharingMode::none, "the image is not shared");
    require(!GetParam() || memory.session().sharing() == SharingMode::resolve, "the mode is wrong");
    return memory;
  }
  void check(const RemoteMapping& memory, std::size_t first, std::size_t count,
             std::size_t image_page = 0) const {
    for (std::size_t index = first; index < first + count; ++index)
      require(image_.holds(image_page + index, page(memory, index)),
              "page " + std::to_string(index) + " is wrong");
  }
  void check_all_at_random(const RemoteMapping& memory, std::uint64_t seed) const {
    std::vector<std::size_t> order(kPages);
    for (std::size_t i = 0; i < kPages; ++i) order[i] = i;
    std::mt19937_64 random(seed);
    std::ranges::shuffle(order, random);
    for (const std::size_t index : order) check(memory, index, 1);
  }
  void check_zero(const RemoteMapping& memory, std::size_t first, std::size_t count) const {
    for (std::size_t index = first; index < first + count; ++index)
      require(std::ranges::all_of(page(memory, index), [](std::byte b) { return b == std::byte{0}; }),
              "page " + std::to_string(index) + " is not zero");
  }
  // A process with a clone, which runs `work` and then waits until the test lets it end.
  std::unique_ptr<Child> clone_process(const std::function<void(RemoteMapping&)>& work) const {
    return std::make_unique<Child>([this, work](const Channel& channel) {
      alarm(60);
      RemoteMapping memory = clone();
      work(memory);
      channel.send(1);
      channel.receive();
      return 0;
    });
  }
  static std::uint64_t faults(const ManagerProcess& manager) { return manager.total("faults"); }

  const Image image_{directory_ / "image", kPages};
  const std::string socket_ = directory_ / "native.sock";
};

INSTANTIATE_TEST_SUITE_P(, Clones, testing::Bool(), [](const auto& test) {
  return std::string(test.param ? "RemovedReadsZero" : "RemovedReadsAnything");
});

TEST_P(Clones, TenClonesThatRunAtOnceReadEveryByteOfTheImage) {
  ManagerProcess manager(directory_, options());
  std::vector<std::unique_ptr<Child>> clones;
  for (std::uint64_t seed = 0; seed < 10; ++seed)
    clones.push_back(clone_process([&, seed](RemoteMapping& memory) { check_all_at_random(memory, seed); }));
  for (const auto& one : clones) one->channel().receive();
  // Each byte was read once, for all.
  EXPECT_LE(manager.total("bytes_read"), kPages * 4096);
  EXPECT_EQ(manager.total("pages_copied"), 0u);
  for (const auto& one : clones) one->channel().send(1);
  for (const auto& one : clones) EXPECT_EQ(one->wait(), 0) << manager.log();
}

TEST_P(Clones, ThreadsOfOneCloneReadEveryByteOfTheImage) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    const RemoteMapping memory = clone();
    std::vector<std::function<void()>> works;
    for (std::uint64_t seed = 0; seed < 4; ++seed)
      works.emplace_back([&, seed] { check_all_at_random(memory, seed); });
    at_once(works);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, TheMemoryOfAllClonesTogetherIsAboutOneCopy) {
  if (kSanitized) GTEST_SKIP() << "needs a build without sanitizers: they take memory of their own";
  ManagerProcess manager(directory_, options());
  std::vector<std::unique_ptr<Child>> clones;
  for (std::uint64_t seed = 0; seed < 10; ++seed)
    clones.push_back(clone_process([&, seed](RemoteMapping& memory) { check_all_at_random(memory, seed); }));
  for (const auto& one : clones) one->channel().receive();
  std::uint64_t together = 0;
  for (const auto& one : clones) together += proportional_bytes(one->pid());
  // Ten copies would be 80 MiB. Beside the image, each process has some of its own.
  EXPECT_LT(together, 40u << 20);
  EXPECT_GT(together, 8u << 20);
  for (const auto& one : clones) one->channel().send(1);
  for (const auto& one : clones) EXPECT_EQ(one->wait(), 0);
}

TEST_P(Clones, WhatOneCloneWritesNoOtherReads) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    const RemoteMapping writer = clone();
    const RemoteMapping reader = clone();
    // Some of them before anybody has read them, some after.
    check(reader, 0, 100);
    for (std::size_t index = 50; index < 150; ++index)
      std::fill_n(writer.data() + index * 4096, 4096, std::byte{0xee});
    check_all_at_random(reader, 1);
    check(writer, 0, 50);
    for (std::size_t index = 50; index < 150; ++index)
      require(page(writer, index)[17] == std::byte{0xee}, "what was written is gone");
    check(writer, 150, kPages - 150);
    check_all_at_random(clone(), 2);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, APartOfTheImageComesFromItsOffset) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    const RemoteMapping part = clone({.offset = StoreOffset(100 * 4096), .length = ByteCount(333 * 4096)});
    check(part, 0, 333, 100);
    const RemoteMapping other = clone({.offset = StoreOffset(37 * 4096), .length = ByteCount(500 * 4096)});
    check(other, 0, 500, 37);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, AKilledCloneHarmsNoOther) {
  ManagerProcess manager(directory_, options());
  image_.make_cold();
  for (int round = 0; round < 10; ++round) {
    Child victim([&](const Channel& channel) {
      const RemoteMapping memory = clone();
      channel.send(1);
      for (std::size_t index = static_cast<std::size_t>(round) * 64; index < kPages; ++index)
        check(memory, index, 1);
      channel.receive();
      return 0;
    });
    victim.channel().receive();
    std::this_thread::sleep_for(std::chrono::microseconds(100 * round));
    victim.kill();
  }
  Child process = program([&](const Channel&) { check_all_at_random(clone(), 3); });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, AReleasedOrDroppedCloneLeavesNoZerosToTheOthers) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    RemoteMapping released = clone();
    check(released, 0, 64);
    succeed(released.detach(DetachWay::release));
    check(released, 0, 64);
    // Whatever was missing is zero, also where it is touched only now.
    check_zero(released, kPages - 64, 64);
    released.data()[(kPages - 1) * 4096] = std::byte{1};
    {
      RemoteMapping dropped = clone();
      const Address start(reinterpret_cast<std::uintptr_t>(dropped.data()));
      succeed(dropped.session().drop({start + ByteCount(512 * 4096), ByteCount(256 * 4096)}));
      check_zero(dropped, 512, 256);
      check(dropped, 0, 512);
    }
    check_all_at_random(clone(), 4);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, AThreadThatWaitsWhenItsCloneIsDestroyedFillsNoHole) {
  if (kThreadSanitized)
    GTEST_SKIP() << "needs a build without the thread sanitizer: one thread touches what another unmaps";
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    // Its thread waits for a stopped manager; destroyed, the memory takes the process with it.
    Child victim([&](const Channel& channel) {
      auto memory = std::make_unique<RemoteMapping>(clone());
      const std::byte* missing = memory->data() + 1024 * 4096;
      std::thread waiting([missing] { (void)*static_cast<const volatile std::byte*>(missing); });
      channel.send(1);
      channel.receive();
      memory.reset();
      waiting.join();
      return 0;
    });
    victim.channel().receive();
    manager.signal(SIGSTOP);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    victim.channel().send(1);
    const int ended = victim.wait();
    manager.signal(SIGCONT);
    require(ended == -SIGSEGV || ended == 0, "it ended by " + std::to_string(ended));
    check_all_at_random(clone(), 5);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, AfterPopulatingEverythingIsThereWithoutTheManager) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    RemoteMapping memory = clone();
    memory.data()[5 * 4096] = std::byte{77};
    succeed(memory.detach(DetachWay::populate));
    manager.kill();
    check(memory, 0, 5);
    require(memory.data()[5 * 4096] == std::byte{77}, "what was written is gone");
    check(memory, 6, kPages - 6);
  });
  EXPECT_EQ(process.wait(), 0);
}

TEST_P(Clones, MovedMemoryGoesOnShowingTheImage) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    const RemoteMapping memory = clone();
    check(memory, 0, 32);
    const Mapping place = Mapping::map(nullptr, 256 * 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
    void* moved = mremap(memory.data() + 256 * 4096, 256 * 4096, 256 * 4096, MREMAP_MAYMOVE | MREMAP_FIXED,
                         place.data());
    require(moved == place.data(), "mremap");
    for (std::size_t index = 0; index < 256; ++index)
      require(image_.holds(256 + index, place.bytes(index)), "a moved page is wrong");
    check(memory, 0, 256);
    check(memory, 512, kPages - 512);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, WithASuccessorClonesGoOnWithPrivateCopies) {
  auto manager = std::make_unique<ManagerProcess>(directory_, options());
  std::vector<std::unique_ptr<Child>> clones;
  for (int i = 0; i < 2; ++i)
    clones.push_back(std::make_unique<Child>([&](const Channel& channel) {
      alarm(60);
      const RemoteMapping memory = clone();
      check(memory, 0, 700);
      channel.send(1);
      channel.receive();
      check(memory, 0, kPages);
      channel.send(memory.session().connection().resumes);
      return 0;
    }));
  for (const auto& one : clones) one->channel().receive();
  manager->kill();
  manager = std::make_unique<ManagerProcess>(directory_, options());
  for (const auto& one : clones) one->channel().send(1);
  for (const auto& one : clones) {
    EXPECT_EQ(one->channel().receive(), 1u);
    EXPECT_EQ(one->wait(), 0) << manager->log();
  }
  EXPECT_EQ(manager->total("pages_shared"), 0u);
}

TEST_P(Clones, PagesThatCannotBeReadRaiseSigbusInEachCloneAndTheOthersAreServed) {
  if (const std::string lacking = poisoning_lacks(); !lacking.empty()) GTEST_SKIP() << lacking;
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    const RemoteMapping early = clone();
    const RemoteMapping late = clone();
    check(early, 0, 64);
    image_.cut(100);
    const auto check_what_is_left = [&](const RemoteMapping& memory) {
      // Bad pages do not condemn the good ones of their window.
      check(memory, 0, 100);
      for (std::size_t index = 100; index < 192; ++index) {
        if (Image::is_hole(index)) {
          check(memory, index, 1);
        } else {
          require(raises_sigbus(page(memory, index).data()),
                  "page " + std::to_string(index) + " can be read");
        }
      }
    };
    check_what_is_left(early);
    check_what_is_left(late);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(Clones, TheLastCloneTakesTheSharedMemoryWithIt) {
  ManagerProcess manager(directory_, options());
  const auto no_shared_memory = [&] { return manager.status().at("shared_images").empty(); };
  ASSERT_TRUE(no_shared_memory());
  // The image itself stays open for a while after its first use, at one descriptor.
  Child first = program([&](const Channel&) { check(clone(), 0, 64); });
  ASSERT_EQ(first.wait(), 0);
  ASSERT_TRUE(eventually([&] { return no_shared_memory() && manager.sessions() == 0; }));
  const Footprint before = manager.footprint();

  std::vector<std::unique_ptr<Child>> clones;
  for (int i = 0; i < 2; ++i)
    clones.push_back(clone_process([&](RemoteMapping& memory) { check(memory, 0, kPages); }));
  for (const auto& one : clones) one->channel().receive();
  const nlohmann::json shared = manager.status().at("shared_images");
  ASSERT_EQ(shared.size(), 1u);
  EXPECT_EQ(shared.at(0).at("filled_pages").get<std::size_t>(), kPages);
  EXPECT_EQ(shared.at(0).at("bytes").get<std::size_t>(), kPages * 4096);

  clones[0]->channel().send(1);
  EXPECT_EQ(clones[0]->wait(), 0);
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 1; }));
  EXPECT_FALSE(no_shared_memory());
  clones[1]->kill();
  EXPECT_TRUE(eventually([&] { return no_shared_memory() && manager.footprint().within(before); }))
      << manager.footprint() << " after " << before;
}

// Where the kernel puts no huge pages into memory files.
class PageCacheClones : public Clones {};
INSTANTIATE_TEST_SUITE_P(, PageCacheClones, testing::Values(false),
                         [](const auto&) { return std::string("RemovedReadsAnything"); });

TEST_P(PageCacheClones, LaterClonesCostTheManagerNoFault) {
  ManagerProcess manager(directory_, options());
  const auto first = clone_process([&](RemoteMapping& memory) { check_all_at_random(memory, 1); });
  first->channel().receive();
  const auto one = manager.status().at("sessions").at(0);
  if (one.at("sharing") != "page cache")
    GTEST_SKIP() << "needs a machine without huge pages of shared memory";
  const std::uint64_t before = faults(manager);
  EXPECT_GT(before, 0u);
  const auto second = clone_process([&](RemoteMapping& memory) { check_all_at_random(memory, 2); });
  second->channel().receive();
  EXPECT_EQ(faults(manager), before);
  for (const Child* process : {first.get(), second.get()}) process->channel().send(1);
  EXPECT_EQ(first->wait(), 0);
  EXPECT_EQ(second->wait(), 0);
}

TEST_P(PageCacheClones, PagesThatAreGivenBackAreTheImageAgain) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel& channel) {
    const RemoteMapping memory = clone();
    channel.send(memory.session().sharing() == SharingMode::page_cache ? 1 : 0);
    if (memory.session().sharing() != SharingMode::page_cache) return;
    std::fill_n(memory.data() + 20 * 4096, 30 * 4096, std::byte{0xee});
    require(madvise(memory.data() + 20 * 4096, 60 * 4096, MADV_DONTNEED) == 0, "madvise");
    require(madvise(memory.data() + 1024 * 4096, 60 * 4096, MADV_DONTNEED) == 0, "madvise");
    check_all_at_random(memory, 1);
  });
  if (process.channel().receive() == 0) GTEST_SKIP() << "needs a machine without huge pages of shared memory";
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

// Where they asked for it.
class ResolvedClones : public Clones {};
INSTANTIATE_TEST_SUITE_P(, ResolvedClones, testing::Values(true),
                         [](const auto&) { return std::string("RemovedReadsZero"); });

TEST_P(ResolvedClones, PagesThatAreGivenBackReadAsZeroAndStaySo) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    const RemoteMapping other = clone();
    check(other, 0, kPages);
    RemoteMapping memory = clone();
    check(memory, 0, 40);
    memory.data()[25 * 4096] = std::byte{0xee};
    require(madvise(memory.data() + 20 * 4096, 40 * 4096, MADV_DONTNEED) == 0, "madvise");
    check(memory, 0, 20);
    check_zero(memory, 20, 20);
    // Written and given back again.
    memory.data()[30 * 4096] = std::byte{1};
    require(madvise(memory.data() + 30 * 4096, 4096, MADV_DONTNEED) == 0, "madvise");
    // The rest of them is not touched before everything is brought in.
    succeed(memory.detach(DetachWay::populate));
    check(memory, 0, 20);
    check_zero(memory, 20, 40);
    check(memory, 60, kPages - 60);
    check(other, 0, kPages);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(ResolvedClones, PopulatingBringsWhatIsMissingBehindPagesThatWereGivenBack) {
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    RemoteMapping memory = clone();
    check(memory, 0, 1);
    require(madvise(memory.data() + 100 * 4096, 10 * 4096, MADV_DONTNEED) == 0, "madvise");
    succeed(memory.detach(DetachWay::populate));
    check(memory, 0, 100);
    check_zero(memory, 100, 10);
    check(memory, 110, kPages - 110);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

TEST_P(ResolvedClones, ZerosThatAnotherClientPutIntoTheImagesMemoryAreNotSeen) {
  if (geteuid() != 0) GTEST_SKIP() << "needs root, to map the image's memory a second time";
  ManagerProcess manager(directory_, options());
  Child process = program([&](const Channel&) {
    const RemoteMapping memory = clone();
    check(memory, 0, 64);
    // A client that does not keep the rules: a mapping of its own, which nobody serves.
    std::string file;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);)
      if (line.find("uffdkit-image") != std::string::npos) file = line.substr(0, line.find(' '));
    require(!file.empty(), "the image's memory is not mapped");
    const UniqueFd fd(open(("/proc/self/map_files/" + file).c_str(), O_RDONLY | O_CLOEXEC));
    require(fd.get() >= 0, "the image's memory cannot be opened");
    const Mapping rude = Mapping::of_file(fd.get(), kPages * 4096, MAP_PRIVATE);
    for (std::size_t index = 64; index < kPages; ++index)
      require(rude.read(index) == std::byte{0}, "a hole is not zero");
    check(memory, 0, kPages);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
}

}  // namespace
}  // namespace uffdkit::test
