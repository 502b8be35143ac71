#include "support/criu_restorer.h"

#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>
#include <span>
#include <stdexcept>
#include <system_error>
#include <thread>
#include <utility>

#include "base/clock.h"
#include "support/criu_checkpoint.h"

namespace uffdkit::test {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kTasksMax = 64;
constexpr unsigned kThreads = 4;

// Where the bytes of a page of an area were at the checkpoint.
enum class Origin : std::uint8_t { lazy, lazy_before, placed, never };

Origin origin(const CriuArea& area, std::size_t page) {
  if (area.dense) return Origin::lazy;
  switch (page % 16) {
    case 3:
    case 4:
      return Origin::lazy_before;
    case 7:
      return Origin::placed;
    case 12:
    case 13:
      return Origin::never;
    default:
      return Origin::lazy;
  }
}

// The words of the page that was at `address` of task `pid`.
std::uint64_t word(std::int32_t pid, std::uint64_t address, std::size_t index) {
  return (address + static_cast<std::uint64_t>(pid) * 8 + 1) * 0x9e3779b97f4a7c15 + index;
}

using Words = std::array<std::uint64_t, kPage / 8>;

Words page_words(std::int32_t pid, std::uint64_t address) {
  Words words;
  for (std::size_t i = 0; i < words.size(); ++i) words[i] = word(pid, address, i);
  return words;
}

[[noreturn]] void fail(const char* call) {
  throw std::system_error(errno, std::generic_category(), call);
}

[[noreturn]] void die(const char* what) {
  std::fprintf(stderr, "restored task: %s: %s\n", what, std::strerror(errno));
  _exit(1);
}

int exit_code_of(pid_t pid) {
  int status = 0;
  if (waitpid(pid, &status, 0) != pid) fail("waitpid");
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

bool waits_for_completion(CriuWork work) {
  return work == CriuWork::idle || work == CriuWork::forks;
}

}  // namespace

// ---- the checkpoint ---------------------------------------------------------------------------------------

void write_criu_checkpoint(const std::string& directory, const std::vector<CriuTask>& tasks) {
  const std::string before = directory + "/before";
  std::filesystem::create_directories(before);
  std::filesystem::create_symlink("before", directory + "/parent");
  std::vector<std::int32_t> pids;
  for (const CriuTask& task : tasks) pids.push_back(task.pid);
  for (const std::string& place : {directory, before}) {
    write_file(place + "/inventory.img", criu_inventory());
    write_file(place + "/pstree.img", criu_pstree(pids));
  }
  for (const CriuTask& task : tasks) {
    if (task.work == CriuWork::zombie) continue;
    const std::string number = std::to_string(task.pid);
    std::vector<CriuVma> vmas;
    std::vector<CriuEntry> entries;
    std::vector<CriuEntry> before_entries;
    std::ofstream pages(directory + "/pages-" + number + ".img", std::ios::binary);
    std::ofstream before_pages(before + "/pages-" + number + ".img", std::ios::binary);
    for (const CriuArea& area : task.areas) {
      vmas.push_back({.memory = {area.address, ByteCount(area.pages * kPage)}});
      for (std::size_t page = 0; page < area.pages; ++page) {
        const Address address(area.address.value + page * kPage);
        const Origin from = origin(area, page);
        if (from == Origin::never) continue;
        const Words words = page_words(task.pid, address.value);
        std::ofstream& file = from == Origin::lazy_before ? before_pages : pages;
        file.write(reinterpret_cast<const char*>(words.data()), kPage);
        const std::uint32_t flags = from == Origin::placed        ? kCriuPresent
                                    : from == Origin::lazy_before ? kCriuLazy | kCriuParent
                                                                  : kCriuLazy | kCriuPresent;
        const auto add = [&](std::vector<CriuEntry>& list, std::uint32_t with) {
          const bool goes_on = !list.empty() && list.back().flags == with && list.back().pages.value < 256 &&
                               list.back().address + ByteCount(list.back().pages.value * kPage) == address;
          if (goes_on)
            list.back().pages = list.back().pages + PageCount(1);
          else
            list.push_back({.address = address, .pages = PageCount(1), .flags = with});
        };
        add(entries, flags);
        if (from == Origin::lazy_before) add(before_entries, kCriuPresent);
      }
    }
    if (!pages.flush() || !before_pages.flush()) throw std::runtime_error("cannot write the checkpoint");
    const auto id = static_cast<std::uint32_t>(task.pid);
    write_file(directory + "/mm-" + number + ".img", criu_mm(vmas));
    write_file(directory + "/pagemap-" + number + ".img", criu_pagemap(id, entries));
    // A page map of the format before lazy pages.
    write_file(before + "/pagemap-" + number + ".img", criu_old_pagemap(id, before_entries));
  }
}

// ---- what all processes see -------------------------------------------------------------------------------

struct CriuRestore::Shared {
  pthread_mutex_t connection;  // one task at a time
  std::int64_t released_ns;
  std::array<std::int64_t, kTasksMax> done_ns;

  static Shared* make() {
    void* memory = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) fail("mmap");
    auto* shared = static_cast<Shared*>(memory);
    pthread_mutexattr_t attributes;
    pthread_mutexattr_init(&attributes);
    pthread_mutexattr_setpshared(&attributes, PTHREAD_PROCESS_SHARED);
    pthread_mutex_init(&shared->connection, &attributes);
    return shared;
  }
};

// ---- a task -----------------------------------------------------------------------------------------------

// Runs in the task's process.
class CriuRestore::Task {
 public:
  Task(const CriuTask& plan, std::uint32_t seed) : plan_(plan), random_(seed) {
    for (const CriuArea& area : plan.areas)
      for (std::size_t page = 0; page < area.pages; ++page) {
        const std::uint64_t address = area.address.value + page * kPage;
        pages_.push_back({.address = address,
                          .value = origin(area, page) == Origin::never ? 0 : address,
                          .zero = origin(area, page) == Origin::never});
      }
  }

  void restore(int connection, Shared& shared) {
    const int uffd = static_cast<int>(syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK));
    if (uffd < 0) die("userfaultfd");
    uffdio_api api{.api = UFFD_API, .features = 0x4e, .ioctls = 0};
    if (ioctl(uffd, UFFDIO_API, &api) != 0) die("UFFDIO_API");
    pthread_mutex_lock(&shared.connection);
    send_pid(connection, plan_.pid);
    send_descriptor(connection, uffd);
    pthread_mutex_unlock(&shared.connection);
    for (const CriuArea& area : plan_.areas) put_into_place(area, uffd);
    close(uffd);
    for (unsigned i = 0; i < plan_.early_faults; ++i) check(pages_[random_() % pages_.size()]);
  }

  void work(int completed) {
    switch (plan_.work) {
      case CriuWork::idle:
        wait_for(completed);
        return check_all();
      case CriuWork::sequential:
        return check_all();
      case CriuWork::random:
        return check_shuffled(static_cast<std::uint32_t>(random_()));
      case CriuWork::threads: {
        std::vector<std::thread> threads;
        for (unsigned i = 0; i < kThreads; ++i) threads.emplace_back([this, i] { check_share(i); });
        for (std::thread& thread : threads) thread.join();
        return;
      }
      case CriuWork::forks:
        return work_forks(completed);
      case CriuWork::changes:
        return work_changes();
      case CriuWork::executes:
        execl("/bin/true", "true", nullptr);
        die("exec");
      case CriuWork::is_killed: {
        std::thread reader([this] { check_all(); });
        kill(getpid(), SIGKILL);
        reader.join();
        return;
      }
      case CriuWork::exits:
      case CriuWork::zombie:
        return;
    }
  }

 private:
  struct Page {
    std::uint64_t address;  // where it is
    std::uint64_t value;    // where it was at the checkpoint, or what was written
    bool zero;              // it must read as zero
    bool mapped = true;
  };

  static void send_pid(int connection, std::int32_t pid) {
    if (send(connection, &pid, sizeof pid, MSG_NOSIGNAL) != sizeof pid) die("send");
  }

  static void send_descriptor(int connection, int fd) {
    char byte = 0;
    iovec part{.iov_base = &byte, .iov_len = 1};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    cmsghdr* header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof fd);
    if (sendmsg(connection, &message, MSG_NOSIGNAL) != 1) die("sendmsg");
  }

  void put_into_place(const CriuArea& area, int uffd) const {
    const std::size_t bytes = area.pages * kPage;
    void* elsewhere = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (elsewhere == MAP_FAILED) die("mmap");
    madvise(elsewhere, bytes, MADV_NOHUGEPAGE);
    for (std::size_t page = 0; page < area.pages; ++page) {
      if (origin(area, page) != Origin::placed) continue;
      const Words words = page_words(plan_.pid, area.address.value + page * kPage);
      std::memcpy(static_cast<char*>(elsewhere) + page * kPage, words.data(), kPage);
    }
    void* place = reinterpret_cast<void*>(area.address.value);
    if (mremap(elsewhere, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place) die("mremap");
    uffdio_register args{};
    args.range = {.start = area.address.value, .len = bytes};
    args.mode = UFFDIO_REGISTER_MODE_MISSING;
    if (ioctl(uffd, UFFDIO_REGISTER, &args) != 0) die("UFFDIO_REGISTER");
  }

  static void wait_for(int completed) {
    char byte;
    if (read(completed, &byte, 1) != 0) die("wait for the memory to be complete");
  }

  void check(const Page& page) const {
    if (!page.mapped) return;
    const auto* words = reinterpret_cast<const volatile std::uint64_t*>(page.address);
    for (std::size_t i = 0; i < kPage / 8; ++i) {
      const std::uint64_t expected = page.zero ? 0 : word(plan_.pid, page.value, i);
      const std::uint64_t found = words[i];
      if (found == expected) continue;
      std::fprintf(stderr, "restored task %d: word %zu of the page at %#lx is %#lx instead of %#lx\n",
                   plan_.pid, i, page.address, found, expected);
      _exit(1);
    }
  }

  void write_page(Page& page, std::uint64_t value) const {
    if (!page.mapped) return;
    auto* words = reinterpret_cast<std::uint64_t*>(page.address);
    for (std::size_t i = 0; i < kPage / 8; ++i) words[i] = word(plan_.pid, value, i);
    page.value = value;
    page.zero = false;
  }

  void check_all() const {
    for (const Page& page : pages_) check(page);
  }

  void check_shuffled(std::uint32_t seed) const { check_order(0, pages_.size(), seed); }

  void check_share(unsigned thread) const {
    check_order(pages_.size() * thread / kThreads, pages_.size() * (thread + 1) / kThreads, thread + 1);
  }

  void check_order(std::size_t from, std::size_t end, std::uint32_t seed) const {
    std::vector<std::uint32_t> order;
    for (std::size_t i = from; i < end; ++i) order.push_back(static_cast<std::uint32_t>(i));
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    for (const std::uint32_t i : order) check(pages_[i]);
  }

  // Reads and writes some pages of its own copy.
  void touch_some(std::size_t count, std::uint64_t value) {
    for (std::size_t i = 0; i < count; ++i) {
      Page& page = pages_[random_() % pages_.size()];
      check(page);
      if (i % 2 == 0) write_page(page, value + i);
    }
  }

  void work_forks(int completed) {
    constexpr int kForks = 24;
    const pid_t stays = fork();
    if (stays < 0) die("fork");
    if (stays == 0) {
      wait_for(completed);
      check_all();
      _exit(0);
    }
    for (int i = 0; i < kForks; ++i) {
      const pid_t child = fork();
      if (child < 0) die("fork");
      if (child == 0) {
        random_.seed(static_cast<std::uint32_t>(i));
        touch_some(50, 1000);
        const pid_t grandchild = i % 3 == 0 ? fork() : -1;
        touch_some(50, 2000);
        if (grandchild > 0 && exit_code_of(grandchild) != 0) _exit(1);
        _exit(0);
      }
      touch_some(100, 3000);
      if (exit_code_of(child) != 0) die("a child");
    }
    check_all();
    if (exit_code_of(stays) != 0) die("the child that stayed");
    check_all();
  }

  // Pages [first, first + count) that lie in a row, all mapped, of a random area; count 0 if none was found.
  std::pair<std::size_t, std::size_t> pick() {
    const std::size_t first = random_() % pages_.size();
    std::size_t count = 0;
    const std::size_t wanted = 1 + random_() % 40;
    while (count < wanted && first + count < pages_.size() && pages_[first + count].mapped &&
           pages_[first + count].address == pages_[first].address + count * kPage)
      ++count;
    return {first, count};
  }

  void work_changes() {
    for (int round = 0; round < 200; ++round) {
      const auto [first, count] = pick();
      if (count == 0) continue;
      void* memory = reinterpret_cast<void*>(pages_[first].address);
      const auto those = std::span(pages_).subspan(first, count);
      switch (random_() % 5) {
        case 0:
          if (madvise(memory, count * kPage, MADV_DONTNEED) != 0) die("madvise");
          for (Page& page : those) page.zero = true;
          break;
        case 1:
          if (count > 4) break;
          if (munmap(memory, count * kPage) != 0) die("munmap");
          for (Page& page : those) page.mapped = false;
          break;
        case 2: {
          // One by one: they may lie in several mappings (a daemon may have unregistered some), and mremap(2)
          // of those moves a part and then fails.
          auto* room = static_cast<std::byte*>(reserve(count));
          for (Page& page : those) {
            void* place = room + static_cast<std::size_t>(&page - those.data()) * kPage;
            if (mremap(reinterpret_cast<void*>(page.address), kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED,
                       place) != place)
              die("mremap");
            page.address = reinterpret_cast<std::uint64_t>(place);
          }
          break;
        }
        case 3:
          for (Page& page : those) write_page(page, page.address);
          break;
        default:
          for (const Page& page : those) check(page);
      }
    }
    check_all();
  }

  // Room at which `count` pages may be put.
  static void* reserve(std::size_t count) {
    void* room = mmap(nullptr, count * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (room == MAP_FAILED) die("mmap");
    return room;
  }

  const CriuTask& plan_;
  std::mt19937 random_;
  std::vector<Page> pages_;
};

// ---- the restorer -----------------------------------------------------------------------------------------

// Runs in a process of its own, the parent of the tasks.
class CriuRestore::Restorer {
 public:
  Restorer(Shared& shared, const std::vector<CriuTask>& tasks, Setting setting)
      : shared_(shared), tasks_(tasks), setting_(setting) {}

  int run(const std::string& directory, const Channel& test) {
    connect_to(directory);
    make_pipes();
    for (std::size_t i = 0; i < tasks_.size(); ++i) start(i);
    ready_[1].reset();
    go_[0].reset();
    completed_[0].reset();
    // Every task closes its end when it has touched its first pages.
    char byte;
    if (read(ready_[0].get(), &byte, 1) != 0) fail("wait for the tasks");
    if (setting_.fails) return end_tasks();
    const std::uint32_t finished = 0x52535446;
    if (send(connection_.get(), &finished, sizeof finished, MSG_NOSIGNAL) != sizeof finished) fail("send");
    connection_.reset();
    shared_.released_ns = monotonic_ns();
    go_[1].reset();
    test.send(0);
    const bool worked = reap(false);
    test.send(0);
    (void)test.receive();
    completed_[1].reset();
    return reap(true) && worked ? 0 : 1;
  }

 private:
  void connect_to(const std::string& directory) {
    connection_.reset(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    sockaddr_un address{.sun_family = AF_UNIX, .sun_path = {}};
    std::snprintf(address.sun_path, sizeof address.sun_path, "%s/lazy-pages.socket", directory.c_str());
    if (connect(connection_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0)
      fail("connect");
  }

  void make_pipes() {
    for (std::array<UniqueFd, 2>* ends : {&ready_, &go_, &completed_}) {
      int fds[2];
      if (pipe2(fds, O_CLOEXEC) != 0) fail("pipe2");
      (*ends)[0].reset(fds[0]);
      (*ends)[1].reset(fds[1]);
    }
  }

  void start(std::size_t index) {
    const CriuTask& plan = tasks_[index];
    if (plan.work == CriuWork::zombie) {
      const std::int32_t number = -plan.pid;
      pthread_mutex_lock(&shared_.connection);
      if (send(connection_.get(), &number, sizeof number, MSG_NOSIGNAL) != sizeof number) fail("send");
      pthread_mutex_unlock(&shared_.connection);
      return;
    }
    const pid_t parent = getpid();
    const pid_t pid = fork();
    if (pid < 0) fail("fork");
    if (pid > 0) {
      running_.push_back({.pid = pid, .index = index});
      return;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    if (getppid() != parent) _exit(98);
    go_[1].reset();
    completed_[1].reset();
    Task task(plan, setting_.seed + static_cast<std::uint32_t>(index));
    task.restore(connection_.get(), shared_);
    connection_.reset();
    ready_[1].reset();
    char byte;
    if (read(go_[0].get(), &byte, 1) != 0) die("wait to be released");
    task.work(completed_[0].get());
    shared_.done_ns[index] = monotonic_ns();
    _exit(0);
  }

  int end_tasks() {
    connection_.reset();
    for (const Running& task : running_) {
      kill(task.pid, SIGKILL);
      (void)exit_code_of(task.pid);
    }
    return 0;
  }

  // Whether those that wait for completion, or the others, ended as they should.
  bool reap(bool waiting) {
    bool good = true;
    for (const Running& task : running_) {
      const CriuWork work = tasks_[task.index].work;
      if (waits_for_completion(work) != waiting) continue;
      good = exit_code_of(task.pid) == (work == CriuWork::is_killed ? -SIGKILL : 0) && good;
    }
    return good;
  }

  struct Running {
    pid_t pid;
    std::size_t index;
  };

  Shared& shared_;
  const std::vector<CriuTask>& tasks_;
  const Setting setting_;
  UniqueFd connection_;
  std::array<UniqueFd, 2> ready_;
  std::array<UniqueFd, 2> go_;
  std::array<UniqueFd, 2> completed_;
  std::vector<Running> running_;
};

// ---- what tests see ---------------------------------------------------------------------------------------

CriuRestore::CriuRestore(const std::string& work_directory, std::vector<CriuTask> tasks, Setting setting)
    : shared_(Shared::make()) {
  if (tasks.size() > kTasksMax) throw std::invalid_argument("too many tasks");
  child_ = std::make_unique<Child>([&](const Channel& channel) {
    return Restorer(*shared_, tasks, setting).run(work_directory, channel);
  });
}

CriuRestore::~CriuRestore() {
  child_.reset();
  munmap(shared_, sizeof(Shared));
}

bool CriuRestore::wait_released() {
  try {
    (void)child_->channel().receive();
    return true;
  } catch (const std::system_error&) {
    return false;
  }
}

bool CriuRestore::wait_worked() {
  return wait_released();
}

int CriuRestore::finish() {
  try {
    child_->channel().send(0);
  } catch (const std::system_error&) {
    // It has ended already; its exit code says how.
  }
  return child_->wait();
}

std::uint64_t CriuRestore::work_ns(std::size_t index) const {
  return static_cast<std::uint64_t>(shared_->done_ns[index] - shared_->released_ns);
}

std::int64_t CriuRestore::released_at_ns() const {
  return shared_->released_ns;
}

}  // namespace uffdkit::test
