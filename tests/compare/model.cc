// The programs on the model.
#include <fmt/format.h>
#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <set>

#include "base/check.h"
#include "compare/driver.h"

namespace uffdkit::differential {
namespace {

class Model final : public Driver {
 public:
  Model(std::uint64_t seed, bool huge, const sim::KernelOptions& like)
      : kernel_({.seed = seed,
                 .version = like.version,
                 .huge_pages = 64,
                 .reads_map_zero_page = like.reads_map_zero_page}),
        target_(kernel_.spawn()),
        manager_(target_.clone_with_files()),
        huge_(huge) {
    for (int i = 0; i < kThreads; ++i) threads_[static_cast<std::size_t>(i)] = &target_.spawn_thread();
    agent_ = &target_.spawn_thread();
    // As in the real target: these pages keep the page tables there.
    for (const std::uint64_t anchor : {kAnchor, kHugeAnchor}) {
      CHECK(target_.map({.length = ByteCount(4096), .fixed = Address(anchor)}));
      agent_->access({.address = Address(anchor), .write = true});
      CHECK(kernel_.run());
    }
    for (int place = 0; place < kAreas; ++place)
      files_.push_back(kernel_.make_shmem(ByteCount(kAreaPages * 4096)));
    for (int place = 0; huge && place < kHugeAreas; ++place)
      files_.push_back(kernel_.make_hugetlb(ByteCount(kHugeAreaPages * (2u << 20))));
    const std::size_t bytes = huge ? 4u << 20 : 20 * 4096;
    memory_ = mmap(nullptr, bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(memory_ != MAP_FAILED);
    source_ = {static_cast<std::byte*>(memory_), bytes};
    CHECK(mprotect(source_.data() + bytes, 4096, PROT_NONE) == 0);
  }
  ~Model() override { munmap(memory_, source_.size() + 4096); }

  bool order_is_open(int uffd) override {
    const int fd = uffds()[static_cast<std::size_t>(uffd)];
    return fd >= 0 && open_.contains(fd);
  }

 private:
  Buffers& buffers() override { return buffers_; }
  std::span<std::byte> source() override { return source_; }

  int create(int flags) override { return target_.system_calls().userfaultfd(flags); }
  int ioctl(bool by_target, int fd, unsigned long request, void* args) override {
    return (by_target ? target_ : manager_)
        .system_calls()
        .ioctl(fd, request, reinterpret_cast<std::uintptr_t>(args));
  }
  std::ptrdiff_t read(int fd, std::span<abi::Msg> messages) override {
    return manager_.system_calls().read(fd, messages.data(), messages.size_bytes());
  }
  int poll(int fd) override { return manager_.system_calls().poll_readable(fd, 0); }
  void close(int fd) override {
    manager_.system_calls().close(fd);
    open_.erase(fd);
  }
  int open_pagemap() override {
    const int fd = manager_.system_calls().open(fmt::format("/proc/{}/pagemap", target_.pid()).c_str(), 0);
    CHECK(fd >= 0);
    return fd;
  }
  std::string waiting(int fd) override {
    const auto [pending, total] = counts(fd);
    return fmt::format("{} of {} unread", pending, total);
  }

  std::pair<int, int> counts(int fd) {
    SystemCalls& calls = manager_.system_calls();
    const int info = calls.open(fmt::format("/proc/self/fdinfo/{}", fd).c_str(), 0);
    CHECK(info >= 0);
    std::array<char, 512> text{};
    CHECK(calls.read(info, text.data(), text.size() - 1) > 0);
    calls.close(info);
    int pending = -1;
    int total = -1;
    CHECK(std::sscanf(std::strstr(text.data(), "pending:"), "pending: %d total: %d", &pending, &total) == 2);
    return {pending, total};
  }

  void start(int index, const Operation& o, int new_thread) override {
    sim::Thread& thread = *threads_[static_cast<std::size_t>(index)];
    const AddressRange range{Address(o.start), ByteCount(o.length)};
    switch (o.verb) {
      case Verb::access:
        return thread.access({.address = Address(o.start + offset_of_thread(index)),
                              .write = o.write,
                              .kernel_mode = o.kernel_mode,
                              .value = std::byte{o.value}});
      case Verb::map:
        return thread.map({.memory = o.memory,
                           .length = ByteCount(o.length),
                           .object = o.memory == sim::Memory::anonymous
                                         ? nullptr
                                         : files_.at(static_cast<std::size_t>(o.place)),
                           .fixed = Address(o.start),
                           .writable = o.writable});
      case Verb::advise:
        return thread.advise(range, static_cast<sim::Advice>(o.mode));
      case Verb::unmap:
        return thread.unmap(range);
      case Verb::protect:
        return thread.protect(range, o.readable, o.writable);
      case Verb::remap:
        return thread.remap({.from = range,
                             .new_length = ByteCount(o.new_length),
                             .may_move = o.may_move,
                             .dont_unmap = o.dont_unmap,
                             .to = o.fixed ? std::optional(Address(o.other)) : std::nullopt});
      case Verb::fork:
        forks_[&thread] = new_thread;
        return thread.fork();
      default:
        CHECK(false);
    }
  }

  void send_signal(int thread) override { threads_[static_cast<std::size_t>(thread)]->signal(); }

  void settle() override {
    // More than one thread that goes to sleep in the same settling: who was first is the scheduler's choice.
    int slept = 0;
    std::map<sim::Thread*, sim::Thread::State> before;
    for (;;) {
      before.clear();
      for (sim::Thread* thread : threads_)
        if (thread != nullptr) before[thread] = thread->state();
      if (!kernel_.step()) break;
      for (const auto& [thread, state] : before)
        if (state == sim::Thread::State::runnable && thread->state() == sim::Thread::State::fault_sleep)
          ++slept;
    }
    for (const int fd : uffds()) {
      if (fd < 0) continue;
      if (counts(fd).first == 0)
        open_.erase(fd);
      else if (slept > 1)
        open_.insert(fd);
    }
    for (auto it = forks_.begin(); it != forks_.end();) {
      const auto last = it->first->last();
      if (!last) {
        ++it;
        continue;
      }
      if (last->child != nullptr) {
        threads_[static_cast<std::size_t>(it->second)] = last->child->threads().front();
        for (int fd = 0; fd < 16; ++fd) last->child->system_calls().close(fd);
      }
      it = forks_.erase(it);
    }
    for (const std::string& wrong : kernel_.violations()) violations_ += "\n    VIOLATION: " + wrong;
  }

  ThreadReport report(int index) override {
    const sim::Thread* thread = threads_[static_cast<std::size_t>(index)];
    if (thread == nullptr) return {};
    ThreadReport report{.state = ThreadReport::State::idle, .ended = violations_};
    switch (thread->state()) {
      case sim::Thread::State::idle:
      case sim::Thread::State::runnable:
        break;
      case sim::Thread::State::fault_sleep:
        report.state = ThreadReport::State::fault_sleep;
        return report;
      case sim::Thread::State::event_sleep:
        report.state = ThreadReport::State::event_sleep;
        return report;
      case sim::Thread::State::dead:
        report.state = ThreadReport::State::dead;
        return report;
    }
    const auto last = thread->last();
    if (!last) return report;
    report.ended += last->child != nullptr ? "a child" : sim::to_string(*last);
    return report;
  }

  int thread_of_tid(std::uint32_t tid) override {
    for (int i = 0; i < kSlots; ++i)
      if (const sim::Thread* thread = threads_[static_cast<std::size_t>(i)];
          thread != nullptr && static_cast<std::uint32_t>(thread->tid()) == tid)
        return i;
    return -1;
  }

  std::uint64_t page(int place) const { return place < kAreas ? 4096 : 2u << 20; }
  sim::Object* file(int place) {
    const auto index = static_cast<std::size_t>(place);
    return index < files_.size() ? files_[index].get() : nullptr;
  }
  void file_write(int place, std::uint64_t index, std::uint8_t value) override {
    const std::array<std::byte, 1> byte{std::byte{value}};
    if (sim::Object* object = file(place)) object->write(index * page(place), byte);
  }
  void punch(int place, std::uint64_t index) override {
    if (sim::Object* object = file(place)) object->punch_hole(index * page(place), ByteCount(page(place)));
  }
  void truncate(int place, std::uint64_t pages) override { file(place)->truncate(ByteCount(pages * 4096)); }
  void kill_target() override { target_.kill(); }
  bool target_alive() override { return target_.alive(); }

  char page_character(std::uint64_t address) const {
    const bool present = target_.present(Address(address));
    const bool armed = target_.write_protected(Address(address));
    return present ? (armed ? 'A' : 'P') : (armed ? 'a' : '.');
  }
  std::string pagemap() override {
    std::string text;
    for (std::uint64_t i = 0; i < kAreas * kAreaStride; ++i) text += page_character(kArena + i * 4096);
    for (std::uint64_t i = 0; huge_ && i < kHugeAreas * kHugeAreaStride; ++i)
      text += page_character(kHugeArena + i * (2u << 20));
    return text;
  }

  std::string dump() override {
    std::string text;
    // A child that is not born yet may hold a userfaultfd open that nobody else has.
    const auto add = [&](std::uint64_t first, std::uint64_t pages, std::uint64_t size) {
      for (std::uint64_t i = 0; i < pages; ++i) {
        for (const std::uint64_t offset : kDumpOffsets) {
          agent_->access({.address = Address(first + i * size + offset)});
          kernel_.run();
          if (agent_->state() != sim::Thread::State::idle) {
            text = "asleep";
            return;
          }
          const auto last = agent_->last();
          if (last && last->kind == sim::Completion::Kind::value)
            text += fmt::format("{:02x}", std::to_integer<int>(last->value));
          else
            text += "--";
        }
        text += ' ';
      }
    };
    add(kArena, kAreas * kAreaStride, 4096);
    if (huge_ && text != "asleep") add(kHugeArena, kHugeAreas * kHugeAreaStride, 2u << 20);
    return text;
  }

  sim::Kernel kernel_;
  sim::Process& target_;
  sim::Process& manager_;
  bool huge_;
  std::array<sim::Thread*, kSlots> threads_ = {};
  sim::Thread* agent_;
  std::vector<sim::ObjectPtr> files_;
  std::map<sim::Thread*, int> forks_;
  std::set<int> open_;
  std::string violations_;
  void* memory_;
  std::span<std::byte> source_;
  Buffers buffers_;
};

}  // namespace

std::unique_ptr<Machine> make_model(std::uint64_t seed, bool huge, const sim::KernelOptions& like) {
  return std::make_unique<Model>(seed, huge, like);
}

}  // namespace uffdkit::differential
