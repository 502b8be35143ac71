// Two processes that keep a third: whichever is killed, the others make it again.
//
// The keeper has all descriptors and no work. It starts the worker, which shares its table of descriptors but
// not its memory: what the worker opens the keeper has too, and what the worker had when it died is still
// open. A standby does nothing but wait for the keeper's end; then it is the keeper. All three are copies of
// one process as it was before any thread was started, and what they know of each other is in the Records.
// docs/decisions/0011-keeper.md says why. Threads: none.
#pragma once

#include <uffdkit/error.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "manager/records.h"

namespace uffdkit {

class Keeper {
 public:
  // Tells a service manager how things are, by a line as sd_notify(3) takes it.
  using Notify = std::function<void(const std::string&)>;
  // What a worker runs; returns the exit code of all.
  using Work = std::function<int(Records&)>;

  // How long a program that has replaced another may take until it serves.
  static constexpr int kTrialSeconds = 10;

  // By which a worker hears of a change of Records::Shared::stops.
  static int stop_signal();

  // The process has one thread, and SIGTERM, SIGINT, SIGHUP and stop_signal() blocked. Goes on with the
  // records of the program that this one has replaced, if it has. Errors: no descriptors to be had; records
  // of another version.
  static Result<std::unique_ptr<Keeper>> create();

  // Keeps a worker that runs `work`, until one has come to its end; returns its exit code. SIGTERM and SIGINT
  // ask for the end, SIGHUP for this program to be replaced by the one that is at its path now. If that does
  // not come to serve within kTrialSeconds, the old one goes on. Does not return in workers.
  int run(const Work& work, const Notify& notify);

 private:
  explicit Keeper(std::unique_ptr<Records> records)
      : records_(std::move(records)), shared_(records_->shared()) {}

  // Makes a process that shares the descriptors: 0 in it, negative if there can be none.
  int split(std::atomic<std::int32_t>& pid, std::atomic<std::int32_t>& pidfd) const;
  // Whether no worker goes through the descriptors, which may close those that it does not know.
  bool may_open() const;
  // Returns in the keeper, and once it has ended in the standby, which is the keeper from then on.
  void start_standby(const Notify& notify);
  // Waits for the keeper's end, and ends it when the program that it has become does not serve in time.
  void outlast_keeper() const;
  void end_standby() const;
  // The standby of the program of before is there until then, to go on with that one.
  void begin_trial() const;
  void end_trial() const;
  // The program of before goes on, whose standby this is.
  void undo_upgrade() const;
  void start_worker(const Work& work);
  void worker_died();
  void take_signals();
  void notify_manager(const Notify& notify);
  // Returns if that cannot be done.
  void replace_program();
  void wait() const;

  const std::unique_ptr<Records> records_;
  Records::Shared& shared_;
  std::int64_t worker_at_ns_ = 0;   // when the next worker may be started
  std::int64_t standby_at_ns_ = 0;  // likewise
  unsigned crashes_ = 0;            // of workers, in a row
  bool is_on_trial_ = false;        // this program
  bool said_ready_ = false;
  bool said_stopping_ = false;
};

}  // namespace uffdkit
