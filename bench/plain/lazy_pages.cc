// A plain daemon for lazy restores, to compare with: one thread, one message at a time, one page for a fault,
// and a background copy that waits until nobody asks for anything.
//
// That is how criu 4.2 goes about it, whose Debian version does not run on current kernels: each request
// walks the page map from its start; what is still missing is a list of ranges, searched from its head and
// split at each fault; while no message waits, the first task that misses something gets a chunk of 64 KiB,
// of 64 KiB more each time up to 4 MiB, and of 64 KiB again after a fault. Pages are read into a buffer and
// copied from there. Only checkpoints of which no page is in an earlier one are served.
//
//   plain_lazy_pages -D DIRECTORY --status-fd FD
#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <uffdkit/message.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "manager/criu_image.h"
#include "wire/criu_images.h"
#include "wire/criu_protocol.h"
#include "wire/unix_socket.h"

namespace uffdkit {
namespace {

constexpr std::uint64_t kPage = 4096;
constexpr std::uint64_t kChunkFirst = 64u << 10;
constexpr std::uint64_t kChunkMax = 4u << 20;

[[noreturn]] void fail(const std::string& what) {
  std::fprintf(stderr, "plain: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

template <class T>
T value_or_fail(Result<T> result) {
  if (!result) fail(result.error().text());
  return std::move(*result);
}

// Memory that is missing, and where it was at the checkpoint.
struct Missing {
  std::uint64_t start;
  std::uint64_t end;
  std::uint64_t image;
};

struct Images {
  criu::Pagemap pagemap;
  UniqueFd pages;
};

struct Task {
  Uffd uffd;
  std::shared_ptr<Images> images;
  std::list<Missing> missing;
  std::uint64_t chunk = kChunkFirst;
  bool gone = false;
};

class Plain {
 public:
  explicit Plain(const std::string& directory)
      : directory_(value_or_fail(criu::ImageDirectory::open(directory))),
        listener_(value_or_fail(ListeningSocket::open(directory + "/lazy-pages.socket"))),
        epoll_(epoll_create1(EPOLL_CLOEXEC)),
        buffer_(kChunkMax) {}

  int run(int status_fd) {
    const char byte = 0;
    if (write(status_fd, &byte, 1) != 1) fail("write to the status descriptor");
    close(status_fd);
    connection_.reset(accept4(listener_fd(), nullptr, nullptr, SOCK_CLOEXEC));
    if (!connection_) fail("accept");
    receive_tasks();
    while (true) {
      if (serve_messages()) continue;
      if (!finished_) continue;
      if (!copy_chunk()) return 0;
    }
  }

 private:
  int listener_fd() const {
    // accept() is to wait.
    fcntl(listener_.fd(), F_SETFL, 0);
    return listener_.fd();
  }

  void watch(int fd) const {
    epoll_event event{};
    event.events = EPOLLIN;
    event.data.fd = fd;
    if (epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) != 0) fail("epoll_ctl");
  }

  void receive(bool wait) {
    std::array<std::byte, 64> buffer;
    if (wait) {
      char byte;
      (void)recv(connection_.get(), &byte, 1, MSG_PEEK);
    }
    auto messages = value_or_fail(decoder_.feed(value_or_fail(receive_some(connection_.get(), buffer))));
    for (criu::RestoreMessage& message : messages) {
      if (auto* task = std::get_if<criu::TaskRestored>(&message)) add(std::move(*task));
      finished_ = finished_ || std::holds_alternative<criu::RestoreFinished>(message);
      ++heard_;
    }
  }

  void receive_tasks() {
    const std::size_t expected = value_or_fail(directory_.tasks()).size();
    while (heard_ < expected) receive(true);
    watch(connection_.get());
  }

  void add(criu::TaskRestored restored) {
    auto images = std::make_shared<Images>();
    images->pagemap = value_or_fail(directory_.pagemap(restored.pid));
    images->pages = value_or_fail(directory_.open_pages(images->pagemap.pages_id));
    std::list<Missing> missing;
    for (const criu::PagemapRun& run :
         lazy_runs(images->pagemap.runs, value_or_fail(directory_.vmas(restored.pid))))
      missing.push_back(
          {.start = run.memory.start.value, .end = run.memory.end().value, .image = run.memory.start.value});
    add_task({.uffd = value_or_fail(Uffd::receive(restored.uffd.release())),
              .images = images,
              .missing = std::move(missing)});
  }

  void add_task(Task task) {
    const int fd = task.uffd.fd();
    tasks_.push_back(std::move(task));
    by_fd_[fd] = std::prev(tasks_.end());
    watch(fd);
  }

  // False if nothing waits.
  bool serve_messages() {
    std::array<epoll_event, 64> events;
    const int count = epoll_wait(epoll_.get(), events.data(), events.size(), finished_ ? 0 : -1);
    for (int i = 0; i < count; ++i) {
      const int fd = events[static_cast<std::size_t>(i)].data.fd;
      if (fd == connection_.get())
        hear_connection();
      else
        serve_message(*by_fd_.at(fd));
    }
    return count > 0;
  }

  void hear_connection() {
    receive(false);
    if (!finished_) return;
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, connection_.get(), nullptr);
  }

  void serve_message(Task& task) {
    std::array<abi::Msg, 1> raw;
    if (task.uffd.read(raw).messages == 0) return;
    const Message message = decode(raw[0]);
    if (const auto* fault = std::get_if<Fault>(&message)) {
      serve_fault(task, fault->address.value / kPage * kPage);
    } else if (const auto* forked = std::get_if<ForkEvent>(&message)) {
      add_task(
          {.uffd = task.uffd.adopt_child(forked->child_fd), .images = task.images, .missing = task.missing});
    } else if (const auto* moved = std::get_if<RemapEvent>(&message)) {
      std::list<Missing> taken = take(task, moved->from.start.value, moved->from.end().value);
      for (Missing& part : taken) {
        part.start += moved->to.value - moved->from.start.value;
        part.end += moved->to.value - moved->from.start.value;
      }
      task.missing.splice(task.missing.end(), taken);
    } else if (const auto* removed = std::get_if<RemoveEvent>(&message)) {
      (void)task.uffd.unregister_range(removed->range);
      take(task, removed->range.start.value, removed->range.end().value);
    } else if (const auto* unmapped = std::get_if<UnmapEvent>(&message)) {
      take(task, unmapped->range.start.value, unmapped->range.end().value);
    }
  }

  void serve_fault(Task& task, std::uint64_t address) {
    std::list<Missing> page = take(task, address, address + kPage);
    if (page.empty()) {
      // Lazy and copied already, or never there.
      const Stop stop = task.uffd.zero({Address(address), ByteCount(kPage)}).stop;
      if (stop == Stop::present) (void)task.uffd.wake({Address(address), ByteCount(kPage)});
      if (stop == Stop::changing) deferred(task, address);
      return;
    }
    task.chunk = kChunkFirst;
    fill(task, page.front());
  }

  // A zero page that the kernel put off: tried until it takes it, else the thread would wait for ever.
  void deferred(Task& task, std::uint64_t address) {
    while (task.uffd.zero({Address(address), ByteCount(kPage)}).stop == Stop::changing) serve_message(task);
    (void)task.uffd.wake({Address(address), ByteCount(kPage)});
  }

  // Takes what of [start, end) is missing out of the list.
  static std::list<Missing> take(Task& task, std::uint64_t start, std::uint64_t end) {
    std::list<Missing> taken;
    std::uint64_t left = end - start;
    for (auto part = task.missing.begin(); part != task.missing.end() && left > 0;) {
      if (part->end <= start || part->start >= end) {
        ++part;
        continue;
      }
      const std::uint64_t from = std::max(part->start, start);
      const std::uint64_t to = std::min(part->end, end);
      taken.push_back({.start = from, .end = to, .image = part->image + (from - part->start)});
      left -= to - from;
      if (part->start < from)
        task.missing.insert(part, {.start = part->start, .end = from, .image = part->image});
      if (to < part->end) {
        part->image += to - part->start;
        part->start = to;
        ++part;
      } else {
        part = task.missing.erase(part);
      }
    }
    return taken;
  }

  // Where in the pages file an address is: found from the start of the page map.
  static std::uint64_t offset_of(const Images& images, std::uint64_t address) {
    for (const criu::PagemapRun& run : images.pagemap.runs)
      if (run.memory.contains(Address(address)))
        return (run.offset + (Address(address) - run.memory.start)).value;
    fail("a page is in no image");
  }

  void fill(Task& task, Missing part) {
    const std::uint64_t bytes = part.end - part.start;
    std::uint64_t read = 0;
    while (read < bytes) {
      const ssize_t got = pread(task.images->pages.get(), buffer_.data() + read, bytes - read,
                                static_cast<off_t>(offset_of(*task.images, part.image) + read));
      if (got <= 0) fail("read pages");
      read += static_cast<std::uint64_t>(got);
    }
    std::uint64_t done = 0;
    while (done < bytes) {
      const Outcome outcome =
          task.uffd.copy(Address(part.start + done), std::span(buffer_).subspan(done, bytes - done));
      done += outcome.done.value;
      switch (outcome.stop) {
        case Stop::complete:
        case Stop::cut_short:
          break;
        case Stop::changing:
          task.missing.push_front({.start = part.start + done, .end = part.end, .image = part.image + done});
          return;
        case Stop::present:
        case Stop::not_ready:
          (void)task.uffd.wake({Address(part.start + done), ByteCount(kPage)});
          done += kPage;
          break;
        default:
          task.gone = true;
          return;
      }
    }
  }

  // A chunk of the first task that misses something. False if none is left that does.
  bool copy_chunk() {
    for (auto task = tasks_.begin(); task != tasks_.end();) {
      if (task->gone || task->missing.empty()) {
        by_fd_.erase(task->uffd.fd());
        task = tasks_.erase(task);
        continue;
      }
      Missing& first = task->missing.front();
      const std::uint64_t end = std::min(first.end, first.start + task->chunk);
      const std::list<Missing> chunk = take(*task, first.start, end);
      task->chunk = std::min(task->chunk + kChunkFirst, kChunkMax);
      fill(*task, chunk.front());
      return true;
    }
    return false;
  }

  criu::ImageDirectory directory_;
  ListeningSocket listener_;
  UniqueFd epoll_;
  std::vector<std::byte> buffer_;
  UniqueFd connection_;
  criu::RestoreDecoder decoder_;
  std::size_t heard_ = 0;
  bool finished_ = false;
  std::list<Task> tasks_;
  std::map<int, std::list<Task>::iterator> by_fd_;
};

}  // namespace
}  // namespace uffdkit

int main(int argc, char** argv) {
  if (argc != 5) {
    std::fprintf(stderr, "usage: %s -D DIRECTORY --status-fd FD\n", argv[0]);
    return 2;
  }
  uffdkit::Plain plain(argv[2]);
  return plain.run(std::atoi(argv[4]));
}
