// Serves sessions on a pool of threads.
//
// Every session is an actor: at any time at most one worker runs it, and any worker may. Its userfaultfd sits
// in one epoll set, armed for one event at a time, so that a worker that a client holds up (in a page table
// lock of the client's, say) holds up that client only, and busy sessions spread over the workers by
// themselves. Stores that block do so on their own lanes. Threads: every call from any thread, except from a
// store or a listener.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/uffd.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/threads.h"
#include "engine/session.h"
#include "engine/store_lane.h"

namespace uffdkit {

using SessionId = std::uint64_t;

// What a session has done so far; see SessionCounters.
struct SessionStatus {
  SessionId id = 0;
  SessionId parent = 0;  // the session whose client forked; 0 for one that was attached
  SharingMode sharing = SharingMode::none;
  std::string image;
  std::uint64_t memory_bytes = 0;
  std::size_t regions = 0;
  std::uint64_t faults = 0;
  std::uint64_t faults_merged = 0;
  std::uint64_t events = 0;
  std::uint64_t pages_copied = 0;
  std::uint64_t pages_zeroed = 0;
  std::uint64_t pages_shared = 0;
  std::uint64_t pages_removed = 0;
  std::uint64_t pages_poisoned = 0;
  std::uint64_t pages_outside = 0;
  std::uint64_t bytes_read = 0;
  std::uint64_t fetches = 0;
  std::uint64_t retries = 0;
  std::uint64_t read_retries = 0;
  std::uint64_t read_errors = 0;
  std::uint64_t pages_prefetched = 0;
  std::uint64_t pages_background = 0;
  std::uint64_t prefetch_late = 0;
  std::uint64_t prefetch_missed = 0;
  std::uint64_t prefetch_left_out = 0;
  std::uint64_t prefetch_left_out_used = 0;
  bool prefetch_given_up = false;
  std::uint64_t pending = 0;
  bool paused = false;
  // Of the oldest pending fault, if there is one; see SessionWaiting. Not all from one instant.
  std::uint64_t oldest_page = 0;
  std::uint64_t oldest_offset = SessionWaiting::kNoOffset;
  PendingWhy oldest_why = PendingWhy::serving;
  std::int64_t oldest_pending_ns = 0;  // age of the oldest pending fault; 0 without one
};

// Has the status say what these have counted.
void set_counts(SessionStatus& status, const SessionCounters& counters);

// Its descriptors, which are open for as long as it is not said to have ended.
struct SessionFiles {
  int uffd;
  int state_file;
};

// Hears what happens to sessions. Called from workers: must not block, nor call the engine.
class EngineListener {
 public:
  virtual ~EngineListener() = default;
  // The session serves nothing any more, and its descriptor is about to be closed.
  virtual void session_ended(const SessionStatus& session, SessionEnd end) = 0;
  // The client of `parent` has forked, and its child is to be served as session `child`. Where it is to be
  // counted: see Attachment::begins. An error refuses it: then what it has not got answers with SIGBUS.
  virtual Result<SessionCounters*> session_forks(SessionId parent, SessionId child,
                                                 const SessionFiles& files) = 0;
  // It is served: from the return of this call on.
  virtual void session_forked(const SessionStatus& session) = 0;
  // Detaching was given up, because a page cannot be had; the session goes on.
  virtual void detach_failed(SessionId session, const Error& error) = 0;
  virtual void page_failed(SessionId session, const Error& error) = 0;
  virtual void warn(SessionId session, const std::string& text) = 0;
};

struct EngineOptions {
  SessionId last_session = 0;  // numbers up to this one are not given
  unsigned workers = 0;        // 0: one for each CPU, at least 2
  // How long a worker that has just served a fault looks for the next one before it sleeps. Saves the dear
  // wake-up of an idle CPU while a client faults at a high rate. Given up for sessions whose next fault comes
  // later than that; an idle engine never spins.
  std::int64_t spin_ns = 20'000;
  SessionOptions session = {};
  Threads threads = {};
};

// A region to be served: memory that is registered for missing faults already (for SharingMode::resolve also
// for minor ones), and what it shows.
struct RegionSpec {
  AddressRange memory;
  StoreOffset offset;
  PageSize page_size = kPage4K;
  RegionTag tag = 0;  // by which its owner drops it, wherever it has moved to; 0 for none
  Sharing sharing{};
};

// A client's memory to be served.
struct Attachment {
  Uffd uffd;
  SessionState state;               // new, or one that is taken up again
  std::vector<RegionSpec> regions;  // in addition to those that `state` has
  std::shared_ptr<StoreLane> lane;
  std::optional<UniqueFd> process;  // pidfd of the client; none: nobody tells of its end
  // Of a session that is taken up with the number that it had: it, its parent, where it is counted, and the
  // memory of its image which it shares. 0 and nullptr for none.
  SessionId id = 0;
  SessionId parent = 0;
  SessionCounters* counters = nullptr;
  std::shared_ptr<SharedImage> shared = nullptr;
  // Notes what is asked for of the image of `lane`; and what of it to bring before. nullptr for neither.
  std::shared_ptr<AccessRecord> record = nullptr;
  std::shared_ptr<const PrefetchOrder> prefetch = nullptr;
  // Hears the session's number when all else is done, before it is run, and says where it is to be counted,
  // until session_ended() is called; nullptr: in the session. An error refuses it.
  std::function<Result<SessionCounters*>(SessionId)> begins = nullptr;
  // Whether a descriptor that a fork message in `state` names is the child's still; see Session::apply_inbox.
  std::function<bool(int)> may_adopt = nullptr;
};

class Engine {
 public:
  // Errors: no threads or descriptors to be had; bad options. `listener` outlives the engine.
  static Result<std::unique_ptr<Engine>> create(const EngineOptions& options, EngineListener& listener);
  // Stops serving at once; descriptors are closed. See begin_detach() for a gentle end.
  ~Engine();
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // Serves `attachment` from now on. Errors: event-fork is enabled; regions that are not of whole pages or
  // lie outside of the store (also those of `state`). A session that is taken up again has all its waiting
  // threads woken, so that faults which somebody else has read come again.
  Result<SessionId> attach(Attachment attachment);

  // What a request has come to; called once, from any thread, and under the same rules as a listener.
  using Done = std::function<void(Result<void>)>;

  // The following run on the session, in order with its faults, and answer by `done`. An error of ESRCH means
  // that there is no such session (any more).
  void add_region(SessionId session, const RegionSpec& region, std::shared_ptr<StoreLane> lane, Done done);
  void drop(SessionId session, AddressRange memory, Done done);
  // Drops what is left of the region with this tag, and tells where that was.
  using Dropped = std::function<void(Result<std::vector<AddressRange>>)>;
  void drop_tagged(SessionId session, RegionTag tag, Dropped done);
  // Starts bringing everything in; session_ended() or detach_failed() tells what came of it.
  void begin_detach(SessionId session, Unreadable unreadable, Done done);
  // Unregisters the memory now, with zeros where nothing was brought.
  void release(SessionId session, Done done);
  // Stops serving without a word to the client, whose threads wait for whoever takes the session up: the
  // state that this needs stays in the session's file.
  void abandon(SessionId session, Done done);

  // See Session::resume().
  void resume(SessionId session, Done done);

  // Ends the client, because it cannot be served to the end: `why` goes to the listener.
  void kill(SessionId session, const std::string& why, Done done);

  // A descriptor of the session's state file, open for reading only, to be handed to its client.
  Result<UniqueFd> state_file(SessionId session);

  std::vector<SessionStatus> sessions();
  std::optional<SessionStatus> session(SessionId session);

 private:
  class Shared;
  explicit Engine(std::shared_ptr<Shared> shared);
  std::shared_ptr<Shared> shared_;
};

}  // namespace uffdkit
