// Clients that move, cut, grow and give back the memory that is served: every byte is what a plain model
// says, after any sequence of changes, while pages are being fetched, and in children forked meanwhile.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "daemon/fixture.h"
#include "support/changing_memory.h"
#include "support/huge_pages.h"
#include "support/sanitizers.h"
#include "support/wall.h"

namespace uffdkit::test {
namespace {

using Kind = ChangingMemory::Kind;

struct Size {
  std::size_t pages;
  std::size_t arena_pages;
};
Size size_of(Kind kind) {
  const bool huge = kind == Kind::huge_pages || kind == Kind::shared_huge_pages;
  return huge ? Size{.pages = 6 * 512, .arena_pages = 14 * 512} : Size{.pages = 600, .arena_pages = 1600};
}

std::string name_of(Kind kind) {
  switch (kind) {
    case Kind::anonymous:
      return "Anonymous";
    case Kind::shared:
      return "Shared";
    case Kind::huge_pages:
      return "HugePages";
    case Kind::shared_huge_pages:
      return "SharedHugePages";
  }
  return "";
}

class Changes : public ManagerTest, public testing::WithParamInterface<Kind> {
 protected:
  void SetUp() override {
    const Result<Uffd> uffd = Uffd::create({.kernel_faults = true, .required = Features(kAllEvents)});
    if (!uffd) GTEST_SKIP() << "needs a userfaultfd that hears of all events: " << uffd.error().text();
    if (!is_huge()) return;
    // For the memory, for what forked children write, and for what is on its way back.
    pool_ = std::make_unique<HugePages>(24);
    if (!pool_->lacking().empty()) GTEST_SKIP() << pool_->lacking();
  }
  bool is_huge() const { return GetParam() == Kind::huge_pages || GetParam() == Kind::shared_huge_pages; }
  bool is_file() const { return GetParam() == Kind::shared || GetParam() == Kind::shared_huge_pages; }

  // A client with this memory; its exit code is 0 if the work found nothing wrong.
  Child changing_client(const std::function<void(ChangingMemory&, const Channel&)>& work) const {
    return program([&](const Channel& channel) {
      const Size size = size_of(GetParam());
      ChangingMemory memory(image_, GetParam(), size.pages, size.arena_pages);
      memory.hand_over(socket_);
      work(memory, channel);
    });
  }
  void run(const std::function<void(ChangingMemory&)>& work) const {
    Child process = changing_client([&](ChangingMemory& memory, const Channel&) { work(memory); });
    EXPECT_EQ(process.wait(), 0) << manager_->log();
  }
  void start_manager(const std::vector<std::string>& more = {}) {
    std::vector<std::string> options = firecracker(socket_, image_);
    options.insert(options.end(), more.begin(), more.end());
    manager_ = std::make_unique<ManagerProcess>(directory_, options);
  }
  // One whose reads of the image last for as long as there is a wall.
  void start_manager_with_wall() {
    start_manager({"--store-fault", "stall,image=" + image_.path() + ",while=" + wall_});
  }

  // In units of what the memory can be cut into.
  std::size_t units(std::size_t count) const { return is_huge() ? count * 512 : count; }

  const Image image_{directory_ / "image", 6 * 512};
  const std::string socket_ = directory_ / "fc.sock";
  const std::string wall_ = directory_ / "wall";
  std::unique_ptr<HugePages> pool_;
  std::unique_ptr<ManagerProcess> manager_;
};

INSTANTIATE_TEST_SUITE_P(, Changes,
                         testing::Values(Kind::anonymous, Kind::shared, Kind::huge_pages,
                                         Kind::shared_huge_pages),
                         [](const auto& test) { return name_of(test.param); });

// ---- one change -------------------------------------------------------------------------------------------

TEST_P(Changes, MovedMemoryShowsTheSamePagesOfTheImage) {
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.check(units(1));
    memory.move(units(1), units(3), units(9));
    memory.check(units(10) - 1);
    memory.move(units(10), units(1), units(7));
    memory.check_all();
  });
}

TEST_P(Changes, MemoryThatIsMovedOverOtherTakesItsPlace) {
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.check(units(4));
    memory.move(units(0), units(2), units(3));
    memory.check_all();
    memory.move(units(3), units(2), units(10));
    memory.check_all();
  });
}

TEST_P(Changes, ShrunkMemoryShowsWhatIsLeft) {
  start_manager();
  run([&](ChangingMemory& memory) {
    require(memory.resize(units(0), units(6), units(4)), "no room");
    memory.check_all();
    memory.move(units(1), units(3), units(8), units(2), false);
    memory.check_all();
  });
}

TEST_P(Changes, GrownMemoryIsZeroBehindTheImage) {
  if (is_huge()) GTEST_SKIP() << "needs mremap(2) that makes mappings of huge pages longer";
  start_manager();
  run([&](ChangingMemory& memory) {
    require(memory.resize(600 - 5, 5, 5 + 33), "no room");
    memory.check_all();
    memory.write(610, 7);
    memory.move(590, 43, 800, 60, false);
    memory.check_all();
    memory.give_back(808, 40, is_file() ? MADV_REMOVE : MADV_DONTNEED);
    memory.check_all();
  });
}

TEST_P(Changes, MemoryThatAMoveLeavesBehindIsZero) {
  if (is_huge() || is_file()) GTEST_SKIP() << "needs private memory of small pages";
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.check(17);
    memory.move(10, 50, 700, 50, true);
    memory.check_all(0, 700);
    memory.check_all();
    memory.move(0, 20, 900, 20, true);
    memory.check_all();
  });
}

TEST_P(Changes, AFileThatAMoveLeavesMappedBehindShowsTheSamePagesInBothPlaces) {
  if (GetParam() != Kind::shared) GTEST_SKIP() << "needs shared memory of small pages";
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.check(17);
    memory.move(10, 50, 700, 50, true);
    memory.check(12);
    memory.write(14, 3);
    memory.check_all(700, 50);
    memory.check_all();
    memory.give_back(702, 9, MADV_REMOVE);
    memory.check_all();
  });
}

TEST_P(Changes, AFileThatIsMappedASecondTimeShowsTheSamePagesInBothPlaces) {
  if (GetParam() != Kind::shared) GTEST_SKIP() << "needs shared memory of small pages";
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.map_again(10, 50, 700);
    memory.check_all(705, 3);
    memory.write(720, 3);
    memory.give_back(730, 9, MADV_REMOVE);
    memory.check_all();
    memory.unmap(20, 10);
    memory.map_again(40, 5, 715);
    memory.check_all();
  });
}

TEST_P(Changes, AFilesMappingThatGrowsOverMoreOfTheImageShowsThat) {
  if (GetParam() != Kind::shared) GTEST_SKIP() << "needs shared memory of small pages";
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.move(300, 300, 900);
    require(memory.resize(250, 50, 50 + 100), "no room");
    memory.check_all(300, 50);
    memory.check_all(900, 100);
    memory.check_all();
  });
}

TEST_P(Changes, MemoryBesideWhatWasUnmappedOrMappedOverIsTheImage) {
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.check(units(3));
    memory.unmap(units(1), units(1));
    memory.map_over(units(3), units(2));
    memory.check_all();
    // What is not served any more changes nothing for what is.
    memory.write(units(3), 9);
    memory.give_back(units(3), units(2), MADV_DONTNEED);
    memory.check_all();
  });
}

TEST_P(Changes, PartsThatAreGivenBackAtOddOffsetsAreZero) {
  start_manager();
  run([&](ChangingMemory& memory) {
    const std::size_t last = size_of(GetParam()).pages - 1;
    memory.check(0);
    if (!is_huge()) {
      memory.give_back(3, 11, MADV_DONTNEED);
      memory.give_back(last - 40, 7, MADV_DONTNEED);
    }
    if (is_file()) {
      memory.give_back(1, 2, MADV_REMOVE);
      memory.give_back(units(1) - 1, 2, MADV_REMOVE);
      memory.give_back(units(2) + 1, units(1), MADV_REMOVE);
      memory.give_back(last, 1, MADV_REMOVE);
    } else {
      memory.give_back(units(1), units(2), MADV_DONTNEED);
      memory.give_back(units(5), units(1), MADV_DONTNEED);
    }
    memory.check_all();
    memory.move(units(0), units(4), units(8));
    memory.check_all();
  });
}

TEST_P(Changes, PagesThatWereThereAreZeroAfterAHoleIsPunchedInTheFile) {
  if (!is_file()) GTEST_SKIP() << "needs memory of a file";
  start_manager();
  run([&](ChangingMemory& memory) {
    memory.check_all();
    memory.punch(units(1), units(2));
    memory.punch(units(4) + 1, 1);
    memory.check_all();
    memory.write(units(1), 3);
    memory.check_all();
  });
}

// ---- while pages are fetched ------------------------------------------------------------------------------

// A thread waits for a page whose fetch is under way while `change` changes the memory; then all is as it
// must be.
struct Meanwhile {
  std::string name;
  std::function<void(ChangingMemory&, std::size_t unit)> change;
};

TEST_P(Changes, NoFetchInstallsOldBytesIntoWhatChangesMeanwhile) {
  if (kThreadSanitized)
    GTEST_SKIP() << "needs a build without the thread sanitizer: one thread touches what another unmaps";
  start_manager_with_wall();
  const std::vector<Meanwhile> all = {
      {"given back",
       [&](ChangingMemory& memory, std::size_t unit) {
         memory.give_back(unit, 2 * unit, is_file() ? MADV_REMOVE : MADV_DONTNEED);
       }},
      {"partly given back",
       [&](ChangingMemory& memory, std::size_t unit) {
         if (!is_huge() || is_file())
           memory.give_back(unit + unit / 3, 1, is_file() ? MADV_REMOVE : MADV_DONTNEED);
       }},
      {"moved", [&](ChangingMemory& memory, std::size_t unit) { memory.move(unit, 3 * unit, 8 * unit); }},
      {"moved and back",
       [&](ChangingMemory& memory, std::size_t unit) {
         memory.move(unit, 2 * unit, 8 * unit);
         memory.move(8 * unit, 2 * unit, unit);
       }},
      {"moved one on",
       [&](ChangingMemory& memory, std::size_t unit) {
         memory.move(unit, 2 * unit, 8 * unit);
         memory.move(8 * unit, 2 * unit, 2 * unit);
       }},
      {"moved over by what was given back and is there again",
       [&](ChangingMemory& memory, std::size_t unit) {
         memory.give_back(2 * unit, unit, is_file() ? MADV_REMOVE : MADV_DONTNEED);
         memory.write(2 * unit, 5);
         memory.move(2 * unit, unit, unit);
       }},
      {"unmapped", [&](ChangingMemory& memory, std::size_t unit) { memory.unmap(unit, unit); }},
      {"mapped over", [&](ChangingMemory& memory, std::size_t unit) { memory.map_over(unit, 2 * unit); }},
      {"mapped over and registered again", [&](ChangingMemory& memory, std::size_t unit) {
         memory.map_over(unit, 2 * unit);
         const AddressRange range{Address(reinterpret_cast<std::uintptr_t>(memory.at(unit))),
                                  ByteCount(2 * unit * 4096)};
         require(memory.uffd().register_range(range, kMissing).has_value(), "register");
       }}};
  for (const Meanwhile& meanwhile : all) {
    SCOPED_TRACE(meanwhile.name);
    run([&](ChangingMemory& memory) {
      const std::size_t unit = memory.pages_per_unit();
      int ends[2];
      require(pipe2(ends, O_CLOEXEC) == 0, "pipe2");
      {
        std::jthread waiting;
        Wall wall(wall_);
        waiting = std::jthread([&] { (void)memory.touch(unit, ends); });
        require(eventually([&] {
                  return manager_->total("fetches") > 0 &&
                         manager_->status().at("sessions")[0].at("pending") == 1;
                }),
                "no fetch");
        meanwhile.change(memory, unit);
        wall.take_down();
      }
      memory.check_all();
    });
    ASSERT_TRUE(eventually([&] { return manager_->sessions() == 0; }));
  }
}

// ---- the manager's end ------------------------------------------------------------------------------------

TEST_P(Changes, NoThreadWaitsForEverWhenTheManagerHasEnded) {
  start_manager();
  Child process = changing_client([&](ChangingMemory& memory, const Channel& channel) {
    memory.move(units(4), units(1), units(8));
    if (!is_huge()) {
      require(memory.resize(0, 4, 4), "no room");
      memory.unmap(590, 10);
      require(memory.resize(580, 10, 77), "no room");
      memory.move(100, 30, 800, 300, false);
      if (!is_huge()) memory.move(200, 30, 1200, 30, true);
      if (is_file()) memory.map_again(400, 30, 1300);
      memory.check(600);
    }
    channel.send(1);
    channel.receive();
    memory.check_all();
    memory.give_back(units(0), units(1), MADV_DONTNEED);
    memory.check_all();
  });
  process.channel().receive();
  EXPECT_EQ(manager_->stop(), 0) << manager_->log();
  process.channel().send(1);
  EXPECT_EQ(process.wait(), 0);
}

// ---- at random --------------------------------------------------------------------------------------------

// So many seeds each, printed with what they found wrong.
constexpr std::uint64_t kSeeds = 12;
constexpr int kChanges = 60;

TEST_P(Changes, AnySequenceOfThemLeavesEveryByteRight) {
  start_manager({"--store-fault", "delay,rate=0.1,ms=1,image=" + image_.path()});
  for (std::uint64_t seed = 1; seed <= kSeeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    run([&](ChangingMemory& memory) {
      std::mt19937_64 random(seed);
      for (int i = 0; i < kChanges; ++i) {
        memory.change(random);
        memory.use(random);
      }
      memory.check_all();
    });
  }
}

TEST_P(Changes, AnySequenceOfThemWhileFetchesStallAndOthersTouchLeavesEveryByteRight) {
  if (kThreadSanitized)
    GTEST_SKIP() << "needs a build without the thread sanitizer: one thread touches what another unmaps";
  start_manager_with_wall();
  const std::size_t arena_pages = size_of(GetParam()).arena_pages;
  for (std::uint64_t seed = 101; seed < 101 + kSeeds; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    run([&](ChangingMemory& memory) {
      std::mt19937_64 random(seed);
      std::atomic<bool> done = false;
      const auto touch = [&](std::uint64_t thread) {
        int ends[2];
        require(pipe2(ends, O_CLOEXEC) == 0, "pipe2");
        std::mt19937_64 own(seed * 10 + thread);
        while (!done) (void)memory.touch(own() % arena_pages, ends);
      };
      const auto change = [&] {
        for (int i = 0; i < kChanges / 4; ++i) {
          Wall wall(wall_);
          for (int changes = 0; changes < 4; ++changes) {
            memory.change(random);
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
          }
          wall.take_down();
          memory.use(random);
        }
      };
      at_once({[&] { touch(1); }, [&] { touch(2); },
               [&] {
                 try {
                   change();
                 } catch (...) {
                   done = true;
                   throw;
                 }
                 done = true;
               }});
      memory.check_all();
    });
  }
}

TEST_P(Changes, ChildrenForkedInBetweenReadWhatTheMemoryHeldThen) {
  if (is_file())
    GTEST_SKIP() << "needs private memory: what is shared, children and parents change for each other";
  start_manager({"--store-fault", "delay,rate=0.1,ms=1,image=" + image_.path()});
  for (std::uint64_t seed = 201; seed < 201 + kSeeds / 2; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    run([&](ChangingMemory& memory) {
      std::mt19937_64 random(seed);
      for (int i = 0; i < kChanges / 10; ++i) {
        for (int changes = 0; changes < 5; ++changes) memory.change(random);
        memory.use(random);
        // It checks while the parent goes on.
        Child child = program([&](const Channel&) {
          for (int changes = 0; changes < 3; ++changes) memory.change(random);
          memory.use(random);
          memory.check_all();
        });
        for (int changes = 0; changes < 5; ++changes) memory.change(random);
        memory.use(random);
        require(child.wait() == 0, "a child failed");
      }
      memory.check_all();
    });
  }
}

}  // namespace
}  // namespace uffdkit::test
