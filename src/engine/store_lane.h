// The threads on which one store may block.
//
// Each store has a lane of its own, so that a slow or stuck store holds up nobody but its own readers. The
// first thread stays as long as the lane; more are started when they are needed, up to kThreadsMax, and leave
// after some idle seconds. What a fault waits for goes first, then what is expected to be asked for, then the
// rest; half of the threads are kept for the first. Where there is a BatchReader, one thread has many small
// reads under way. Threads: submit() from any. Lifetime: destruction does
// not wait for a read that is stuck in the store; that thread keeps what it needs and leaves when the store
// answers.
#pragma once

#include <uffdkit/store.h>
#include <uffdkit/unique_fd.h>

#include <chrono>
#include <memory>
#include <utility>

#include "base/threads.h"
#include "engine/fetch.h"
#include "store/batch_reader.h"

namespace uffdkit {

// How pages that could not be read are tried again. Meanwhile the lane reads for others.
struct ReadRetries {
  unsigned count = 3;  // tries after the first; then the pages count as unreadable
  std::chrono::milliseconds first_pause{
      5};  // before the first of them; each further one is four times as long
};

// What can be done when nobody waits for a read.
class IdleWork {
 public:
  virtual ~IdleWork() = default;
  // A piece of it, of a few milliseconds. Called by one thread at a time.
  virtual void work_a_piece() = 0;
};

class StoreLane {
 public:
  static constexpr unsigned kThreadsMax = 8;

  // `file`: by which another process can open the same store. `readers`: nullptr for none. Errors: no thread
  // can be started.
  static Result<std::shared_ptr<StoreLane>> create(std::shared_ptr<Store> store, ReadRetries retries = {},
                                                   UniqueFd file = {}, Threads threads = {},
                                                   std::shared_ptr<BatchReaders> readers = nullptr);
  ~StoreLane();
  StoreLane(const StoreLane&) = delete;
  StoreLane& operator=(const StoreLane&) = delete;

  const std::shared_ptr<Store>& store() const { return store_; }
  // -1 for none.
  int file() const { return file_.get(); }
  // Instead of giving it to create(), where it would be lost with an error. Before anybody has the lane.
  void keep(UniqueFd file) { file_ = std::move(file); }

  // Reads `fetch` on a thread of the lane, then hands it to `sink` if that still exists. The queue is as long
  // as the sessions' own limits on fetches allow.
  void submit(std::unique_ptr<Fetch> fetch, std::weak_ptr<FetchSink> sink);
  // Whether more may be submitted that no fault waits for: so many sessions do not fill the memory with what
  // is not needed now.
  bool takes_unasked() const;
  // Has one piece of `work`, if that still exists, done by a thread of the lane when it has nothing to read.
  void when_idle(std::weak_ptr<IdleWork> work);

 private:
  struct Job;
  struct Shared;
  StoreLane(std::shared_ptr<Store> store, UniqueFd file, std::shared_ptr<Shared> shared);
  // Starts a thread that has been counted in Shared::threads.
  static bool start_thread(const std::shared_ptr<Shared>& shared);
  static void run(std::shared_ptr<Shared> shared);
  // Has somebody look at what waits in the queues.
  static void wake_one(const std::shared_ptr<Shared>& shared);
  // Reads the job and what comes for faults meanwhile, until none of it is under way.
  static void read_together(const std::shared_ptr<Shared>& shared, std::unique_lock<std::mutex>& lock,
                            Job first, BatchReader& reader);

  std::shared_ptr<Store> store_;
  UniqueFd file_;
  std::shared_ptr<Shared> shared_;
};

}  // namespace uffdkit
