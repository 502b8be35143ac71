// A session with a mailbox: any thread may put something in, one worker at a time runs it.
//
// Threads: post(), fetched() and the const calls from any; run() by whoever wins, the others leave word that
// there is more to do. So the session inside is never run by two, and nobody waits for a lock while it works.
#pragma once

#include <signal.h>
#include <uffdkit/unique_fd.h>

#include <atomic>
#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/threads.h"
#include "engine/engine.h"
#include "engine/fair_share.h"
#include "engine/session.h"

namespace uffdkit {

// What an actor asks of the engine. From any thread.
class ActorScheduler {
 public:
  virtual ~ActorScheduler() = default;
  // Runs the session soon.
  virtual void schedule(SessionId session) = 0;
  // Runs the session at this time or after.
  virtual void schedule_at(SessionId session, std::int64_t when_ns) = 0;
  // Wants one event when `uffd` can be read. Again after each event. False if that cannot be had now.
  virtual bool arm(SessionId session, int uffd) = 0;
  // Whether anything waits for a worker.
  virtual bool others_wait() = 0;
  // A fault of the session is being served at this time.
  virtual void serves(SessionId session, std::int64_t when_ns) = 0;
  // Whether one of another session was, at this time or since.
  virtual bool others_served(SessionId session, std::int64_t since_ns) = 0;
  // Lets a thread that has just been answered, and may wait for this worker's CPU, run first. False if
  // workers are to sleep instead.
  virtual bool give_way() = 0;
  // Whether a worker whose session had its last fault at this time had better look there again than sleep.
  virtual bool look_again(std::int64_t last_fault_ns) = 0;
  // The session has ended: nothing more will be run.
  virtual void ended(SessionId session) = 0;
  // The client of `parent` has forked: `child` is served from now on, and run from begin() on. Returns its
  // number. Nothing of it is taken if there is an error: it cannot be served.
  virtual Result<SessionId> forked(SessionId parent, ForkedSession& child) = 0;
  virtual void begin(SessionId child) = 0;
};

class Actor final : public SessionHost, public FetchSink, public std::enable_shared_from_this<Actor> {
 public:
  // Runs on the session; the session is in `end()` afterwards or not. False: not now, try again in a while.
  // Commands keep their order, so the ones behind it wait.
  using Command = std::function<bool(Session&)>;

  // `scheduler` and `listener` outlive the actor's last run, or are there until stop().
  Actor(SessionId id, SessionId parent, Uffd uffd, SessionState state,
        std::vector<std::shared_ptr<StoreLane>> lanes, SessionOptions options,
        std::optional<UniqueFd> process, ActorScheduler& scheduler, EngineListener& listener,
        Threads threads = {});

  // Runs what was posted, before anybody else can run it; no fault is read yet.
  void prepare();
  // Before the first run: see Session::count_in.
  void count_in(SessionCounters* counters) { session_.count_in(counters); }
  // Lets nobody run it before begin().
  void hold() { run_state_.store(RunState::running); }
  // The caller schedules.
  void begin() { run_state_.store(RunState::idle); }
  // Ends the session as abandoned, and lets nothing more in: afterwards neither scheduler nor listener is
  // called. Only when nobody runs it or will run it.
  void stop();
  // Puts a command in; false if the session has ended, and the command will never run. The caller schedules.
  bool post(Command command);
  // Runs the session, unless somebody does: then that one runs it once more. `scratch` is the worker's.
  void run(std::span<std::byte> scratch);
  // The time that schedule_at() was asked for has come.
  void timer_fired() { timer_fired_.store(true, std::memory_order_relaxed); }
  // The event that arm() asked for has come.
  void disarmed() { armed_.store(false, std::memory_order_relaxed); }

  // Has status() show what the session's regions are now. In a command only.
  void update_shape();

  SessionStatus status() const;
  // Whether the client's memory is still there; and how many faults it has had.
  bool target_alive() const { return session_.uffd().target_alive(); }
  std::uint64_t faults() const { return session_.counters().faults.load(std::memory_order_relaxed); }
  int uffd() const { return session_.uffd().fd(); }
  int state_file() const { return session_.state().fd(); }
  int process() const { return process_ ? process_->get() : -1; }

  // FetchSink
  void fetched(std::unique_ptr<Fetch> fetch) override;

 private:
  enum class RunState : std::uint8_t { idle, running, again };

  void take_mail();
  void run_commands();
  // Takes what is in the mailbox, and steps; true if there is more to do at once.
  bool turn();
  void close_mailbox();
  // A slice has ended: others are waited for, or kept from their CPU.
  bool leaves_to_others(std::int64_t now_ns);
  bool is_to_rest(std::int64_t now_ns);
  FairShare::Told told() const;
  // Has the children run whose forks have been applied. A child that ended before would leave its
  // descriptor's number to somebody else, and the message in the inbox would name that.
  void begin_children();
  // False if nobody knows its process, or it has exited.
  bool signal_client(int number);

  // SessionHost
  std::int64_t now_ns() override { return turn_ns_; }
  std::span<std::byte> scratch() override { return scratch_; }
  bool gives_way() override;
  void start_fetch(StoreLane& lane, std::unique_ptr<Fetch> fetch) override;
  bool kill_client() override { return signal_client(SIGKILL); }
  bool client_has_exited() override;
  bool stop_client() override { return signal_client(SIGSTOP); }
  void continue_client() override { signal_client(SIGCONT); }
  Result<void> forked(std::unique_ptr<ForkedSession>& session) override;
  void detach_failed(const Error& error) override { listener_.detach_failed(id_, error); }
  void page_failed(const Error& error) override { listener_.page_failed(id_, error); }
  void warn(const std::string& text) override { listener_.warn(id_, text); }

  const SessionId id_;
  const SessionId parent_;  // 0: it was attached
  ActorScheduler& scheduler_;
  EngineListener& listener_;
  const Threads threads_;
  const std::optional<UniqueFd> process_;

  std::atomic<RunState> run_state_{RunState::idle};
  std::atomic<bool> armed_{false};
  std::atomic<bool> timer_fired_{false};

  // Owned by the runner.
  Session session_;
  std::span<std::byte> scratch_;
  std::int64_t turn_ns_ = 0;  // when the turn began: the time for all of it
  FairShare share_;
  bool gives_way_ = false;    // this run is over
  unsigned spin_misses_ = 0;  // sleeps in a row before which no fault came while it was looked for
  unsigned spins_left_out_ = 0;
  unsigned early_misses_ = 0;  // looks in a row, straight after an answer, that found no fault
  unsigned early_left_out_ = 0;
  std::vector<SessionId> children_;  // of forks that are being applied
  bool reads_ = true;                // see Session::Next
  std::int64_t wake_at_ns_ = 0;      // the time that was last asked of the scheduler
  std::deque<Command> commands_taken_;
  std::int64_t commands_at_ns_ = 0;  // when the first of them is tried again

  std::mutex mailbox_mutex_;
  std::vector<std::unique_ptr<Fetch>> returned_;
  std::vector<Command> commands_;
  bool closed_ = false;
  std::atomic<bool> mail_{false};  // spares the lock when nothing is there

  // For status(): what the runner last saw of the layout.
  std::atomic<std::uint64_t> memory_bytes_{0};
  std::atomic<std::size_t> regions_{0};
  std::atomic<SharingMode> sharing_{SharingMode::none};
};

}  // namespace uffdkit
