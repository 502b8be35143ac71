// What must outlive the process that serves: which descriptors are what, in a memory file that the keeper,
// its standby and each worker map (docs/records.md says every byte).
//
// The processes share one table of descriptors, so a descriptor is named by its number and stays open when
// its owner dies. A record is valid before what it names is used, and is freed before it is closed: so after
// a cut at any store the next worker finds every session that somebody may wait for, and closes the rest by
// sweep(). Threads: any; one worker at a time has the tables. The fields of Shared are for all processes.
#pragma once

#include <sys/types.h>
#include <uffdkit/error.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/session_counters.h"
#include "engine/session_state.h"
#include "engine/shared_image.h"
#include "engine/store_lane.h"

namespace uffdkit {

// How a session has come.
enum class SessionKind : std::uint32_t { firecracker = 1, native, fork };
enum class ListenerKind : std::uint32_t { firecracker = 1, native, control };

class Records {
 public:
  static constexpr std::size_t kInheritedMax = 512;

  struct Totals {
    SessionCounters counters;
    std::atomic<std::uint64_t> sessions;
  };
  // What the processes tell each other.
  struct Shared {
    std::array<char, 8> magic;
    std::uint32_t version;
    std::uint32_t inherited_count;
    std::array<std::int32_t, kInheritedMax> inherited;  // descriptors that were open before anything else
    std::array<char, 4096> program;                     // the path of the program, by which it is replaced
    std::atomic<std::int64_t> started_ns;               // monotonic, of the first worker
    std::atomic<std::int32_t> signals;                  // a signalfd, read by the keeper only
    std::atomic<std::int32_t> nudge;                    // an eventfd, by which the worker wakes the keeper
    std::atomic<std::int32_t> keeper;                   // process numbers, and pidfds; -1 for none
    std::atomic<std::int32_t> keeper_pidfd;
    std::atomic<std::int32_t> standby;
    std::atomic<std::int32_t> standby_pidfd;
    std::atomic<std::int32_t> worker;
    std::atomic<std::int32_t> worker_pidfd;
    std::atomic<std::uint32_t> is_ready;      // the first worker has said that it is ready
    std::atomic<std::uint32_t> is_serving;    // this worker has taken up all that there is
    std::atomic<std::uint32_t> stops;         // how often the end was asked for
    std::atomic<std::int32_t> exit_code;      // of the worker that came to its end; -1 before
    std::atomic<std::int32_t> death_signal;   // that ended the last worker; 0 if nobody knows
    std::atomic<std::uint32_t> upgrade;       // is wanted
    std::atomic<std::uint64_t> workers;       // how many there were
    std::atomic<std::uint64_t> upgrades;      // how often the program was replaced
    std::atomic<std::uint64_t> last_session;  // the highest number that was given
    std::atomic<std::uint64_t> clients_refused;
    // Of ended sessions, in two places, of which the lowest bit of `counted` says which counts. The other
    // bits are the record, counted from 1, of the session that was counted last, as long as it is not free.
    std::array<Totals, 2> totals;
    std::atomic<std::uint64_t> counted;
    std::atomic<std::uint64_t> upgrades_failed;  // how often the program was to be replaced, and stayed
    std::atomic<std::uint32_t> is_on_trial;      // a program that has replaced another does not serve yet
    std::atomic<std::int32_t> trial_timer;       // a timerfd: it should have by then
  };

  struct Session {
    SessionId id = 0;
    SessionId parent = 0;
    SessionKind kind = SessionKind::native;
    pid_t pid = 0;
    uid_t uid = 0;
    int uffd = -1;
    int state_file = -1;
    int process = -1;              // pidfd of the client; -1 for none
    std::uint64_t connection = 0;  // the cookie of the socket by which it was handed over; 0 for none
    // The client knows of it. One that does not asks again, and this one is forgotten.
    bool acknowledged = false;
    bool shares = false;    // its image's memory
    std::size_t image = 0;  // for image(), of a session that was taken up
  };
  struct Listener {
    ListenerKind kind;
    int socket;
    dev_t device;  // of the socket's file
    ino_t inode;
    std::string path;
    std::string allow = {};  // who may connect, as parse_subjects() reads it
    std::size_t image = 0;   // likewise, of a Firecracker listener
  };
  struct Image {
    int file;
    std::string name;
    ByteCount size;  // as it was opened first
    int memory;      // of SharedImage; -1 for none
    int filled;
  };

  // Errors: no memory files to be had; more than kInheritedMax descriptors are open.
  static Result<std::unique_ptr<Records>> create();
  // Those of another program, which has replaced itself by this one. Errors: not such a file; another
  // version.
  static Result<std::unique_ptr<Records>> open(UniqueFd file);
  ~Records();
  Records(const Records&) = delete;
  Records& operator=(const Records&) = delete;

  int fd() const { return file_.get(); }
  Shared& shared() const { return *shared_; }

  // ---- of the worker that serves
  // It has taken up, or begun, all that there is: the keeper may open descriptors again.
  void tell_serving();
  // Has the keeper replace the program.
  void ask_for_upgrade();
  // Valid when it returns. Gives the place where it is counted, all 0, until it is removed. Errors: no room
  // (ENOSPC).
  Result<SessionCounters*> add(const Session& session, std::shared_ptr<StoreLane> lane,
                               std::shared_ptr<SharedImage> memory);
  // A child of `parent`'s client, of the same image.
  Result<SessionCounters*> add_fork(SessionId parent, SessionId id, int uffd, int state_file);
  void acknowledge(SessionId id);
  // It has ended: what it has counted goes to the totals. Nothing happens if there is no such session.
  void remove(SessionId id) { free(id, HasEnded::yes); }
  // It was refused after all.
  void withdraw(SessionId id) { free(id, HasEnded::no); }
  // Of the sessions that have ended.
  const Totals& totals() const;
  Result<void> add(const Listener& listener, const std::shared_ptr<StoreLane>& lane);
  void remove_listener(int socket);

  // ---- of a worker that takes up, before it opens anything
  // Closes every descriptor that no record names, nor the inbox of a session. Sessions that their clients
  // know nothing of are forgotten before. What is left of sockets that are connected is given back: of
  // clients that may have sent a handshake.
  std::vector<UniqueFd> sweep();
  // Each worker's list begins elsewhere, so that where workers die before they have taken up all, everyone
  // has a turn soon. But whose fork is not applied comes before its child: were that to end before, its
  // descriptor's number could be another's by the time that the inbox names it.
  std::vector<Session> sessions() const;
  std::vector<Listener> listeners() const;
  Image image(std::size_t index) const;
  // This worker has what the record says; from now on it is removed, and its image kept, as if it had been
  // added here. Gives the place where it is counted, with what it has counted so far.
  SessionCounters* taken_up(const Session& session, std::shared_ptr<StoreLane> lane,
                            std::shared_ptr<SharedImage> memory);
  // Keeps the record of an image until release_image(): sessions that are taken up may end at once, and
  // others of the same image are still to come.
  void hold_image(std::size_t index, const StoreLane* lane);
  void release_image(const StoreLane* lane);
  // It will not be taken up: its descriptors are nobody's, and may be closed. Gives what it has counted, as
  // long as no other is added.
  const SessionCounters& give_up(const Session& session);
  void give_up(const Listener& listener);
  void taken_up(const Listener& listener, std::shared_ptr<StoreLane> lane);
  // Whether a session has this userfaultfd.
  bool has_uffd(int fd) const;
  bool has_connection(std::uint64_t cookie) const;

 private:
  struct FileSession;
  struct FileListener;
  struct FileImage;
  // What an image's record is kept by.
  struct ImageUse {
    std::size_t index;
    std::size_t users;
  };
  struct SessionUse {
    std::size_t index;
    // What the record names stays open for as long as it counts, whatever the session still needs of it.
    std::shared_ptr<StoreLane> lane;
    std::shared_ptr<SharedImage> memory;
  };

  Records(UniqueFd file, StateMapping memory);
  FileSession* session_table() const;
  FileListener* listener_table() const;
  FileImage* image_table() const;
  SessionCounters& counters_of(std::size_t session) const;
  bool is_there(std::size_t session) const;
  // Of one that is there.
  std::size_t index_of(SessionId id) const;
  void nudge_keeper() const;
  // Whether there is such a session. Takes the lock.
  template <class Is>
  bool has_session(const Is& is) const;
  // With mutex_ held.
  std::vector<Listener> all_listeners() const;
  Result<std::size_t> use_image(const std::shared_ptr<StoreLane>& lane);
  void leave_image(const StoreLane* lane);
  enum class HasEnded : bool { no, yes };
  void free(SessionId id, HasEnded has_ended);
  // Adds what it has counted to the totals, once, wherever this is cut off, and frees its record.
  void count_and_free(std::size_t session);
  void finish_counting();

  UniqueFd file_;
  StateMapping memory_;
  Shared* shared_;
  mutable std::mutex mutex_;  // guards what follows, and the tables
  std::map<const StoreLane*, ImageUse> images_;
  std::map<SessionId, SessionUse> sessions_;
  std::map<int, std::shared_ptr<StoreLane>> listeners_;  // by socket
};

}  // namespace uffdkit
