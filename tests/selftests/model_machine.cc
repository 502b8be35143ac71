// The cases' machine that is the model: a simulated process, whose first thread is the body of the case.
//
// The bodies of other threads run on real threads, one at a time: each waits while the operation of its
// simulated thread is under way, and is let go on when that has ended. So a body reads like any other code,
// and a seed gives the same run each time.
#include <uffdkit/sim.h>

#include <algorithm>
#include <exception>
#include <list>
#include <random>
#include <semaphore>
#include <thread>
#include <utility>

#include "selftests/machine.h"
#include "support/forwarding_calls.h"

namespace uffdkit::selftests {
namespace {

constexpr std::size_t kTurnsMax = 4'000'000;

// Thrown through a body that is left before its end.
struct Abandoned {};

class Model;

// A body on a thread of its own.
class Body {
 public:
  explicit Body(std::function<void(Body&)> run)
      : thread_([this, run = std::move(run)] {
          go_.acquire();
          try {
            if (!abandoned_) run(*this);
          } catch (const Abandoned&) {
          } catch (...) {
            failure_ = std::current_exception();
          }
          finished_ = true;
          back_.release();
        }) {}
  ~Body() {
    if (!finished_) {
      abandoned_ = true;
      run();
    }
    thread_.join();
  }
  Body(const Body&) = delete;
  Body& operator=(const Body&) = delete;

  bool finished() const { return finished_; }
  // Whether it would get on if it ran.
  bool ready() const {
    return !finished_ && (waits_for_ == nullptr || waits_for_->state() == sim::Thread::State::idle ||
                          waits_for_->state() == sim::Thread::State::dead);
  }
  // Runs it until it waits, or ends.
  void run() {
    go_.release();
    back_.acquire();
  }
  // Called by the body: waits until `thread` is idle, or for the next turn.
  void wait_for(const sim::Thread* thread) {
    waits_for_ = thread;
    back_.release();
    go_.acquire();
    waits_for_ = nullptr;
    if (abandoned_) throw Abandoned{};
  }
  void rethrow() const {
    if (failure_) std::rethrow_exception(failure_);
  }

 private:
  std::binary_semaphore go_{0};
  std::binary_semaphore back_{0};
  bool abandoned_ = false;
  bool finished_ = false;
  const sim::Thread* waits_for_ = nullptr;
  std::exception_ptr failure_;
  std::thread thread_;
};

class ModelThread final : public Thread {
 public:
  using Thread::read;
  using Thread::write;

  // `body`: nullptr for the first thread.
  ModelThread(Model& model, sim::Process& process, sim::Thread& thread, Body* body)
      : model_(model), process_(process), thread_(thread), body_(body) {}

  bool read(Address from, std::span<std::byte> to) override {
    for (std::size_t done = 0; done < to.size();) {
      if (!access({.address = from + ByteCount(done)}, &to[done])) return false;
      ++done;
      done += process_.peek(from + ByteCount(done), to.subspan(done));
    }
    return true;
  }
  bool write(Address to, std::span<const std::byte> bytes) override {
    for (std::size_t done = 0; done < bytes.size();) {
      if (!access({.address = to + ByteCount(done), .write = true, .value = bytes[done]})) return false;
      ++done;
      done += process_.poke(to + ByteCount(done), bytes.subspan(done));
    }
    return true;
  }
  bool exchange(Address at, std::byte expected, std::byte value) override {
    std::byte seen{};
    access({.address = at, .write = true, .value = value, .expected = expected}, &seen);
    return seen == expected;
  }

  int advise(AddressRange range, Advice advice) override {
    return call([&] { thread_.advise(range, number_of(advice)); });
  }
  int remap(AddressRange from, Address to) override {
    const sim::Remap remap{.from = from, .new_length = from.length, .may_move = true, .to = to};
    return std::min(call([&] { thread_.remap(remap); }), 0);
  }
  int protect(AddressRange range, bool readable, bool writable) override {
    return call([&] { thread_.protect(range, readable, writable); });
  }
  int unmap(AddressRange range) override {
    return call([&] { thread_.unmap(range); });
  }
  int map_over(AddressRange range) override {
    return std::min(call([&] { thread_.map({.length = range.length, .fixed = range.start}); }), 0);
  }

  void pin(AddressRange page) override {
    perform([&] { thread_.access({.address = page.start, .kernel_mode = true, .pin = true}); });
    if (thread_.last()->kind != sim::Completion::Kind::value)
      throw std::runtime_error("a page could not be pinned");
  }
  void unpin() override { process_.unpin(); }
  bool is_armed(Address address) override { return process_.write_protected(address); }
  void pause() override;

  // fork(2): the child.
  sim::Process* fork() {
    perform([&] { thread_.fork(); });
    return thread_.last()->child;
  }

 private:
  static sim::Advice number_of(Advice advice) {
    switch (advice) {
      case Advice::dont_need:
        return sim::Advice::dont_need;
      case Advice::remove:
        return sim::Advice::remove;
      case Advice::dont_fork:
        return sim::Advice::dont_fork;
      case Advice::huge_page:
        return sim::Advice::huge_page;
      case Advice::collapse:
        return sim::Advice::collapse;
      case Advice::page_out:
        return sim::Advice::page_out;
    }
    std::unreachable();
  }

  // Starts an operation of the simulated thread, and returns when it has ended.
  void perform(const std::function<void()>& start);
  bool access(const sim::Access& access, std::byte* seen = nullptr);
  int call(const std::function<void()>& start) {
    perform(start);
    return static_cast<int>(std::clamp<std::int64_t>(thread_.last()->result, -4096, 1));
  }

  Model& model_;
  sim::Process& process_;
  sim::Thread& thread_;
  Body* body_;
};

// The seam of the simulated process: others run before a call and while one waits.
class TurningCalls final : public test::ForwardingCalls {
 public:
  TurningCalls(Model& model, SystemCalls& calls) : ForwardingCalls(calls), model_(model) {}
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;
  int poll_readable(int fd, int timeout_ms) override;

 private:
  Model& model_;
};

class ModelWork final : public Work {
 public:
  ModelWork(Model& model, std::function<int(Body&)> body);
  ~ModelWork() override;
  bool finished() const override { return body_->finished(); }
  void join() override;
  int result() const override { return result_; }

 private:
  Model& model_;
  int result_ = 0;
  std::unique_ptr<Body> body_;
};

class Model final : public Machine {
 public:
  explicit Model(std::uint64_t seed)
      : random_(seed),
        kernel_({.seed = seed}),
        process_(kernel_.spawn()),
        here_(*this, process_, process_.spawn_thread(), nullptr),
        calls_(*this, process_.system_calls()) {}

  SystemCalls& system() override { return calls_; }
  Thread& here() override { return here_; }

  Area map(MemoryType type, std::size_t pages) override {
    Area area{.type = type,
              .pages = pages,
              .page_bytes = is_huge(type) ? kPage2M.bytes() : kPage4K.bytes(),
              .start = {}};
    const ByteCount bytes = area.range().length;
    const sim::ObjectPtr object = type == MemoryType::anon           ? nullptr
                                  : type == MemoryType::file_private ? kernel_.make_file(bytes)
                                  : is_huge(type)                    ? kernel_.make_hugetlb(bytes)
                                                                     : kernel_.make_shmem(bytes);
    area.start = map_at(place(bytes), bytes, type, object);
    if (is_shared(type)) area.second = map_at(place(bytes), bytes, type, object);
    return area;
  }
  // They are the same as small ones, side by side, to all that the model has.
  std::vector<ByteCount> transparent_sizes(MemoryType) override {
    return {ByteCount(16 << 10), ByteCount(64 << 10), ByteCount(1 << 20)};
  }
  Area map_transparent(MemoryType type, ByteCount bytes) override {
    const Area area = map(type, bytes.value / kPage4K.bytes().value);
    for (std::size_t page = 0; page < area.pages; ++page) here_.write(area.at(page), std::byte{1});
    return area;
  }
  Address place(ByteCount bytes) override {
    const Address found(next_place_);
    next_place_ += (bytes.value / kPage2M.bytes().value + 2) * kPage2M.bytes().value;
    return found;
  }

  std::unique_ptr<Work> start(const Uffd&, AddressRange, std::function<void(Thread&)> body) override {
    sim::Thread& thread = process_.spawn_thread();
    return std::make_unique<ModelWork>(*this, [this, &thread, body = std::move(body)](Body& runs) {
      ModelThread self(*this, process_, thread, &runs);
      body(self);
      return 0;
    });
  }
  std::unique_ptr<Work> fork(const Uffd&, AddressRange, std::function<int(Thread&)> body) override {
    sim::Thread& thread = process_.spawn_thread();
    return std::make_unique<ModelWork>(*this, [this, &thread, body = std::move(body)](Body& runs) {
      ModelThread parent(*this, process_, thread, &runs);
      sim::Process& child = *parent.fork();
      ModelThread self(*this, child, *child.threads().front(), &runs);
      const int result = body(self);
      child.kill();
      return result;
    });
  }

  void on_sigbus(std::function<void(Address)> handler) override { sigbus_handler_ = std::move(handler); }
  std::string mistakes() override {
    std::string all;
    for (const std::string& wrong : kernel_.violations()) all += wrong + "\n";
    return all;
  }

  // One turn of a simulated thread or of a body. False if nobody can move.
  bool turn() {
    if (++turns_ > kTurnsMax) throw std::runtime_error("the threads go on for ever");
    std::vector<Body*> ready;
    for (Body* body : bodies_)
      if (body->ready()) ready.push_back(body);
    // The simulated threads count as one: which of them moves is the model's draw.
    const std::uint64_t pick = random_() % (ready.size() + 1);
    if (pick == ready.size() && kernel_.step()) return true;
    if (ready.empty()) return false;
    run(*ready[pick % ready.size()]);
    return true;
  }
  void turn_some(std::uint64_t most) {
    if (running_ != nullptr) return;
    for (std::uint64_t turns = random_() % (most + 1); turns > 0 && turn();) --turns;
  }
  void run(Body& body) {
    running_ = &body;
    body.run();
    running_ = nullptr;
  }

  void add(Body& body) { bodies_.push_back(&body); }
  void remove(Body& body) { bodies_.remove(&body); }
  const std::function<void(Address)>& sigbus_handler() const { return sigbus_handler_; }
  bool is_child(const sim::Process& process) const { return &process != &process_; }

 private:
  Address map_at(Address where, ByteCount bytes, MemoryType type, const sim::ObjectPtr& object) {
    const sim::Memory memory = type == MemoryType::anon            ? sim::Memory::anonymous
                               : type == MemoryType::shmem         ? sim::Memory::shmem_shared
                               : type == MemoryType::shmem_private ? sim::Memory::shmem_private
                               : type == MemoryType::hugetlb       ? sim::Memory::hugetlb_shared
                               : type == MemoryType::file_private  ? sim::Memory::file_private
                                                                   : sim::Memory::hugetlb_private;
    return process_.map({.memory = memory, .length = bytes, .object = object, .fixed = where}).value();
  }

  std::mt19937_64 random_;
  sim::Kernel kernel_;
  sim::Process& process_;
  ModelThread here_;
  TurningCalls calls_;
  std::list<Body*> bodies_;
  Body* running_ = nullptr;
  std::function<void(Address)> sigbus_handler_;
  std::uint64_t next_place_ = 0x200000000000;
  std::size_t turns_ = 0;
};

void ModelThread::perform(const std::function<void()>& start) {
  start();
  while (thread_.state() != sim::Thread::State::idle) {
    if (body_ != nullptr) {
      body_->wait_for(&thread_);
      if (thread_.state() == sim::Thread::State::dead) throw Abandoned{};
    } else if (!model_.turn()) {
      throw std::runtime_error("the first thread sleeps, and nobody will wake it");
    }
  }
}

bool ModelThread::access(const sim::Access& access, std::byte* seen) {
  for (;;) {
    perform([&] { thread_.access(access); });
    const sim::Completion ended = *thread_.last();
    if (ended.kind == sim::Completion::Kind::value) {
      if (seen != nullptr) *seen = ended.value;
      return true;
    }
    if (ended.kind != sim::Completion::Kind::sigbus)
      throw std::runtime_error("an access ended in " + to_string(ended));
    if (model_.is_child(process_) || !model_.sigbus_handler()) return false;
    model_.sigbus_handler()(ended.address);
  }
}

void ModelThread::pause() {
  if (body_ != nullptr)
    body_->wait_for(nullptr);
  else
    model_.turn();
}

int TurningCalls::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  model_.turn_some(2);
  return calls_.ioctl(fd, request, argument);
}

int TurningCalls::poll_readable(int fd, int timeout_ms) {
  for (;;) {
    const int events = calls_.poll_readable(fd, 0);
    if (events != 0 || timeout_ms == 0) return events;
    if (!model_.turn()) throw std::runtime_error("all threads sleep, and no message waits");
    // A time limit passes when the seed says so.
    if (timeout_ms > 0) return calls_.poll_readable(fd, 0);
  }
}

ModelWork::ModelWork(Model& model, std::function<int(Body&)> body)
    : model_(model), body_(std::make_unique<Body>([this, body = std::move(body)](Body& runs) {
        try {
          result_ = body(runs);
        } catch (const std::exception&) {
          result_ = 99;
          throw;
        }
      })) {
  model_.add(*body_);
}

ModelWork::~ModelWork() {
  model_.remove(*body_);
}

void ModelWork::join() {
  while (!body_->finished())
    if (!model_.turn()) throw std::runtime_error("a thread sleeps, and nobody will wake it");
  body_->rethrow();
}

}  // namespace

std::unique_ptr<Machine> make_model(std::uint64_t seed) {
  return std::make_unique<Model>(seed);
}

}  // namespace uffdkit::selftests
