#include "support/floods.h"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <random>
#include <thread>

namespace uffdkit::test {
namespace {

void storm(unsigned threads, const std::function<void(std::mt19937_64&)>& once) {
  std::vector<std::function<void()>> works;
  for (unsigned thread = 0; thread < threads; ++thread)
    works.emplace_back([&once, thread] {
      std::mt19937_64 random(thread);
      while (true) once(random);
    });
  at_once(works);
}

}  // namespace

void fault_under_signals(const ClientMemory& memory) {
  constexpr std::size_t kThreads = 4;
  struct sigaction action = {};
  action.sa_handler = [](int) {};
  action.sa_flags = SA_RESTART;
  require(sigaction(SIGUSR1, &action, nullptr) == 0, "sigaction");
  // Far from each other, and in no hole, which would be filled at once.
  std::vector<std::size_t> pages;
  for (std::size_t page = 0; page < memory.pages() && pages.size() < kThreads; page += 64)
    if (!Image::is_hole(memory.image_page(page))) pages.push_back(page);
  require(pages.size() == kThreads, "the image is too small");
  const UniqueFd file(open("/dev/shm", O_TMPFILE | O_RDWR | O_CLOEXEC, 0600));
  require(static_cast<bool>(file), "a file in memory");

  std::atomic<std::size_t> done = 0;
  std::atomic<std::size_t> right = 0;
  {
    std::vector<std::jthread> threads;
    for (const std::size_t page : pages)
      threads.emplace_back([&, page] {
        const auto at = static_cast<off_t>(page * 4096);
        if (pwrite(file.get(), memory.bytes(page).data(), 4096, at) == 4096) ++right;
        ++done;
      });
    // Once one has its signal within the fault it has it until the page comes; before that, it only handles
    // it.
    while (done < kThreads) {
      for (std::jthread& thread : threads) pthread_kill(thread.native_handle(), SIGUSR1);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  require(right == kThreads, "a write from a missing page");
  for (const std::size_t page : pages) memory.check(page);
}

void give_back_for_ever(const ClientMemory& memory) {
  storm(4, [&](std::mt19937_64& random) {
    const std::size_t first = random() % memory.pages();
    memory.give_back(first, 1 + random() % (memory.pages() - first), MADV_DONTNEED);
  });
}

void fault_for_ever(const ClientMemory& memory) {
  storm(32, [&](std::mt19937_64& random) {
    const std::size_t page = random() % memory.pages();
    (void)*static_cast<volatile std::byte*>(memory.bytes(page).data());
    memory.give_back(page, 1, MADV_DONTNEED);
  });
}

}  // namespace uffdkit::test
