// Threads: coroutines that the machine gives turns to.
#pragma once

#include <coroutine>
#include <exception>
#include <utility>

#include "sim/context.h"

namespace uffdkit::sim {

// One operation of a thread under way. It pauses where the kernel would sleep.
class Operation {
 public:
  struct promise_type {
    Completion completion;
    Operation get_return_object() { return Operation(Handle::from_promise(*this)); }
    std::suspend_always initial_suspend() noexcept { return {}; }
    std::suspend_always final_suspend() noexcept { return {}; }
    void return_value(Completion ended) { completion = ended; }
    void unhandled_exception() { std::terminate(); }
  };
  using Handle = std::coroutine_handle<promise_type>;

  Operation() = default;
  explicit Operation(Handle handle) : handle_(handle) {}
  Operation(Operation&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Operation& operator=(Operation&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Operation() {
    if (handle_) handle_.destroy();
  }

  void resume() { handle_.resume(); }
  bool done() const { return handle_.done(); }
  const Completion& completion() const { return handle_.promise().completion; }

 private:
  Handle handle_ = nullptr;
};

class ProcessImpl;

class ThreadImpl final : public Thread, public Sleeper {
 public:
  ThreadImpl(ProcessImpl& process, int tid) : process_(process), tid_(tid) {}

  int tid() const override { return tid_; }
  State state() const override { return state_; }
  std::optional<Completion> last() const override { return last_; }
  void access(Access access) override;
  void map(MapRequest request) override;
  void unmap(AddressRange range) override;
  void advise(AddressRange range, Advice advice) override;
  void remap(Remap remap) override;
  void protect(AddressRange range, bool readable, bool writable) override;
  void fork() override;
  void signal() override;

  void wake() override;
  // Carries on with the operation until it pauses or ends; the thread must be runnable.
  void turn();
  // Ends the thread where it is, as a fatal signal does.
  void end();

  ProcessImpl& process() { return process_; }

  // co_await thread.pause(...): gives the turn back, and goes on when the thread is runnable and has another.
  struct Pause {
    ThreadImpl& thread;
    State state;
    const Context* context;
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<>) const noexcept {
      thread.state_ = state;
      thread.waits_for_ = context;
    }
    void await_resume() const noexcept { thread.waits_for_ = nullptr; }
  };
  Pause sleep_in_fault(const Context& context) { return {*this, State::fault_sleep, &context}; }
  Pause sleep_for_event(const Context& context) { return {*this, State::event_sleep, &context}; }
  Pause yield() { return {*this, State::runnable, nullptr}; }
  // The userfaultfd in whose queue it sleeps; nullptr if it does not.
  const Context* waits_for() const { return waits_for_; }

  bool signal_pending() const { return signal_pending_; }
  void handle_signal() { signal_pending_ = false; }

 private:
  void start(Operation operation);

  ProcessImpl& process_;
  int tid_;
  State state_ = State::idle;
  bool signal_pending_ = false;
  const Context* waits_for_ = nullptr;
  std::optional<Completion> last_;
  Operation operation_;
};

// What threads do (access.cc, mapping.cc, advise.cc, remap.cc, fork.cc). Each runs when its thread has a
// turn.
Operation access_memory(ThreadImpl& thread, Access access);
Operation map_memory(ThreadImpl& thread, MapRequest request);
Operation unmap_memory(ThreadImpl& thread, AddressRange range);
Operation advise_memory(ThreadImpl& thread, AddressRange range, Advice advice);
Operation mark_memory(ThreadImpl& thread, AddressRange range, Advice advice);
Operation page_out_memory(ThreadImpl& thread, AddressRange range);
Operation collapse_memory(ThreadImpl& thread, AddressRange range);
Operation remap_memory(ThreadImpl& thread, Remap remap);
Operation protect_memory(ThreadImpl& thread, AddressRange range, bool readable, bool writable);
Operation fork_process(ThreadImpl& thread);

}  // namespace uffdkit::sim
