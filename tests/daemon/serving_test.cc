// Pages arrive, and are the image's: however they are touched, and whatever is given back meanwhile.
#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <random>
#include <thread>

#include "daemon/fixture.h"
#include "support/huge_pages.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPages = 1024;  // 4 MiB

class Serving : public ManagerTest {
 protected:
  // Runs `work` in a client whose memory is this, to its end.
  void serve(const ClientShape& shape, const std::function<void(const ClientMemory&)>& work) {
    Child process =
        client(image_, shape, socket_, [&](const ClientMemory& memory, const Channel&) { work(memory); });
    EXPECT_EQ(process.wait(), 0) << manager_.log();
  }

  const Image image_{directory_ / "image", kPages};
  const std::string socket_ = directory_ / "fc.sock";
  ManagerProcess manager_{directory_, firecracker(socket_, image_)};
};

// ---- touching --------------------------------------------------------------------------------------------

TEST_F(Serving, EveryByteOfARegionIsTheImages) {
  serve(whole(image_), [](const ClientMemory& memory) { memory.check_all(1, 1); });
}

TEST_F(Serving, EveryByteIsTheImagesForFourThreadsAtOnce) {
  serve(whole(image_), [](const ClientMemory& memory) { memory.check_all(4, 2); });
}

const ClientShape kThreeRegions = {.regions = {{.pages = 100, .image_page = 900},
                                               {.pages = 301, .image_page = 7},
                                               {.pages = 64, .image_page = 256}}};

TEST_F(Serving, EveryByteOfThreeRegionsComesFromTheirOffsets) {
  serve(kThreeRegions, [](const ClientMemory& memory) { memory.check_all(1, 3); });
}

TEST_F(Serving, EveryByteOfThreeRegionsIsRightForFourThreadsAtOnce) {
  serve(kThreeRegions, [](const ClientMemory& memory) { memory.check_all(4, 4); });
}

TEST_F(Serving, TwoRegionsMayShowTheSamePages) {
  const ClientShape shape = {.regions = {{.pages = 64, .image_page = 3}, {.pages = 64, .image_page = 10}}};
  serve(shape, [](const ClientMemory& memory) {
    std::fill_n(memory.bytes(7).data(), 4096, std::byte{1});
    memory.check(64);  // the same page of the image
    memory.check(6);
  });
}

TEST_F(Serving, SharedMemoryIsServedLikePrivate) {
  ClientShape shape = whole(image_);
  shape.memory = ClientShape::Memory::shared;
  serve(shape, [](const ClientMemory& memory) { memory.check_all(2, 5); });
}

TEST_F(Serving, WhatIsWrittenToAMissingPageStays) {
  serve(whole(image_), [&](const ClientMemory& memory) {
    for (std::size_t page = 0; page < memory.pages(); ++page) {
      std::array<std::byte, 4096> expected;
      image_.fill(memory.image_page(page), expected);
      memory.bytes(page)[page] = expected[page] = std::byte{0xa5};
      require(std::equal(expected.begin(), expected.end(), memory.bytes(page).begin()), "a write is lost");
    }
  });
}

TEST_F(Serving, AnImageThatIsReadFromDiskIsRight) {
  image_.make_cold();
  serve(whole(image_), [](const ClientMemory& memory) { memory.check_all(4, 6); });
  ASSERT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
  if (manager_.total("fetches") == 0) GTEST_SKIP() << "needs a file system that lets go of its page cache";
}

TEST_F(Serving, SystemCallsFindTheImagesBytes) {
  serve(whole(image_), [](const ClientMemory& memory) {
    int ends[2];
    require(pipe2(ends, O_CLOEXEC) == 0, "pipe2");
    for (std::size_t page = 0; page < memory.pages(); ++page) {
      // Out of a missing page, and over the first half of the next one.
      require(write(ends[1], memory.bytes(page).data(), 4096) == 4096, "write from a missing page");
      std::array<std::byte, 4096> out;
      require(read(ends[0], out.data(), out.size()) == 4096, "read");
      require(std::equal(out.begin(), out.end(), memory.bytes(page).begin()), "wrong bytes were written");
      memory.check(page);
      if (++page == memory.pages()) break;
      require(write(ends[1], out.data(), 2048) == 2048, "write");
      require(read(ends[0], memory.bytes(page).data(), 2048) == 2048, "read into a missing page");
      require(std::equal(out.begin(), out.begin() + 2048, memory.bytes(page).begin()), "a read is lost");
    }
    close(ends[0]);
    close(ends[1]);
  });
}

TEST_F(Serving, ThirtyTwoThreadsOnOnePageAreAnsweredByOneCopy) {
  const std::string socket = directory_ / "one.sock";
  const TempDir other;
  ManagerProcess manager(other, {"--firecracker", socket + "=" + image_.path(), "--fault-around", "1"});
  Child process = client(image_, whole(image_), socket, [](const ClientMemory& memory, const Channel&) {
    std::vector<std::function<void()>> works(32, [&] { memory.check(0); });
    at_once(works);
  });
  EXPECT_EQ(process.wait(), 0);
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
  EXPECT_EQ(manager.total("pages_copied"), 1u);
  EXPECT_GE(manager.total("faults"), 1u);
}

std::atomic<unsigned> alarms = 0;

TEST_F(Serving, AThreadThatSignalsStormInASystemCallIsAnsweredToo) {
  image_.make_cold();
  serve(whole(image_), [](const ClientMemory& memory) {
    struct sigaction action = {};
    action.sa_handler = [](int) { ++alarms; };
    action.sa_flags = SA_RESTART;
    require(sigaction(SIGALRM, &action, nullptr) == 0, "sigaction");
    const itimerval often{.it_interval = {0, 100}, .it_value = {0, 100}};
    const itimerval never{};
    const int null = open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600);
    require(null >= 0, "a file in memory");
    require(setitimer(ITIMER_REAL, &often, nullptr) == 0, "setitimer");
    for (std::size_t page = 0; page < memory.pages(); ++page)
      require(pwrite(null, memory.bytes(page).data(), 4096, 0) == 4096, "write from a missing page");
    require(setitimer(ITIMER_REAL, &never, nullptr) == 0, "setitimer");
    require(alarms > 0, "no signal came");
    for (std::size_t page = 0; page < memory.pages(); ++page) memory.check(page);
    close(null);
  });
}

// ---- giving back -----------------------------------------------------------------------------------------

class GivenBack : public Serving, public testing::WithParamInterface<int> {
 protected:
  ClientShape shape() const {
    ClientShape shape = whole(image_);
    if (GetParam() == MADV_REMOVE) shape.memory = ClientShape::Memory::shared;
    return shape;
  }
};
// By an advice that takes effect at once; with MADV_FREE the kernel chooses when it takes a page that is
// there, so its old bytes are right too.
class GivenBackAtOnce : public GivenBack {};

std::string name_of(const testing::TestParamInfo<int>& advice) {
  return advice.param == MADV_DONTNEED ? "DontNeed" : advice.param == MADV_FREE ? "Free" : "Remove";
}
INSTANTIATE_TEST_SUITE_P(Advice, GivenBack, testing::Values(MADV_DONTNEED, MADV_FREE, MADV_REMOVE), name_of);
INSTANTIATE_TEST_SUITE_P(Advice, GivenBackAtOnce, testing::Values(MADV_DONTNEED, MADV_REMOVE), name_of);

TEST_P(GivenBack, APageThatWasNeverTouchedReadsAsZeroEverAfter) {
  serve(shape(), [](const ClientMemory& memory) {
    memory.give_back(32, 70, GetParam());
    for (std::size_t page = 0; page < memory.pages(); ++page) {
      if (page >= 32 && page < 102) {
        memory.check_zero(page);
      } else {
        memory.check(page);
      }
    }
  });
}

TEST_P(GivenBackAtOnce, APageThatWasTouchedReadsAsZeroEverAfter) {
  serve(shape(), [](const ClientMemory& memory) {
    memory.check_all(1, 7);
    memory.give_back(5, 200, GetParam());
    for (int times = 0; times < 2; ++times)
      for (std::size_t page = 5; page < 205; ++page) memory.check_zero(page);
    memory.check(4);
    memory.check(205);
  });
}

TEST_P(GivenBack, RangesThatGoWhileOthersAreTouchedReadAsZeroAndNoneElseDoes) {
  serve(shape(), [](const ClientMemory& memory) {
    // The odd groups of four pages go, the even ones are read meanwhile.
    const auto goes = [](std::size_t page) { return page / 4 % 2 == 1; };
    at_once({[&] {
               std::vector<std::size_t> groups;
               for (std::size_t page = 4; page < memory.pages(); page += 8) groups.push_back(page);
               std::shuffle(groups.begin(), groups.end(), std::mt19937_64(8));
               for (const std::size_t page : groups) memory.give_back(page, 4, GetParam());
             },
             [&] {
               for (std::size_t page = 0; page < memory.pages(); ++page)
                 if (!goes(page)) memory.check(page);
             },
             [&] {
               for (std::size_t page = memory.pages(); page-- > 0;)
                 if (!goes(page)) memory.check(page);
             }});
    for (std::size_t page = 0; page < memory.pages(); ++page)
      if (goes(page) && GetParam() != MADV_FREE) {
        memory.check_zero(page);
      } else if (!goes(page)) {
        memory.check(page);
      }
  });
}

TEST_P(GivenBackAtOnce, NoOldBytesArriveInAPageThatGoesWhileItIsFetched) {
  image_.make_cold();
  serve(shape(), [](const ClientMemory& memory) {
    for (std::size_t page = 0; page < memory.pages(); page += 16) {
      std::atomic<bool> begun = false;
      at_once({[&] {
                 begun = true;
                 // What is read now may be old or zero; nobody can say which came first.
                 (void)*static_cast<volatile std::byte*>(memory.bytes(page).data());
               },
               [&] {
                 while (!begun) std::this_thread::yield();
                 memory.give_back(page, 1, GetParam());
                 memory.check_zero(page);
               }});
      memory.check_zero(page);
      memory.check(page + 1);
    }
  });
}

TEST_F(Serving, AStormOfGivingBackDelaysNobodyForEverAndIsNotSpunOn) {
  const ClientShape shape = {.regions = {{.pages = kPages}, {.pages = 64}}};
  serve(shape, [&](const ClientMemory& memory) {
    std::atomic<bool> done = false;
    const auto storm = [&](std::size_t first) {
      while (!done) {
        memory.give_back(kPages + first, 32, MADV_DONTNEED);
        memory.check_zero(kPages + first);
      }
    };
    at_once({[&] { storm(0); }, [&] { storm(32); },
             [&] {
               for (std::size_t page = kPages; page-- > 0;) memory.check(page);
               done = true;
             }});
  });
  ASSERT_TRUE(eventually([&] { return manager_.sessions() == 0; }));
  // A loop that waits by trying again takes thousands of attempts for each fault.
  EXPECT_LT(manager_.total("retries"), 20 * manager_.total("faults") + 1000);
}

// ---- huge pages ------------------------------------------------------------------------------------------

class HugePagesServed : public ManagerTest {};

TEST_F(HugePagesServed, EveryByteIsTheImagesAndPartsGivenBackReadAsZero) {
  const HugePages pool(4);
  if (!pool.lacking().empty()) GTEST_SKIP() << pool.lacking();
  const Image image(directory_ / "image", 4 * 512);  // its third huge page is a hole
  const std::string socket = directory_ / "fc.sock";
  ManagerProcess manager(directory_, firecracker(socket, image));
  ClientShape shape = whole(image);
  shape.memory = ClientShape::Memory::huge_pages;
  Child process = client(image, shape, socket, [](const ClientMemory& memory, const Channel&) {
    memory.check_all(2, 9);
    memory.give_back(512, 512, MADV_DONTNEED);
    for (std::size_t page = 512; page < 1024; ++page) memory.check_zero(page);
    memory.check(511);
    memory.check(1024);
  });
  EXPECT_EQ(process.wait(), 0) << manager.log();
  EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
  EXPECT_GE(manager.total("pages_copied"), 3 * 512u);
}

}  // namespace
}  // namespace uffdkit::test
