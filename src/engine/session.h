// One client's memory being served: its userfaultfd, its regions, and what is under way.
//
// A session is a state machine without threads, clocks or sleeps of its own. Whoever owns it calls step()
// when its userfaultfd can be read, when a fetch has come back, or when the time has come that the last step
// named. So the same code runs under the engine's threads and, step by step, under a test's control. Threads:
// one at a time; what counters() and waiting() give may be read from any. Invariants: a granule is `fetching`
// exactly while one Fetch in fetches_ holds it; bytes are installed only where the granule is still
// `fetching` or has been planned in the same step, or (see session_prefetch.cc) `absent`, so nothing that was
// removed, unmapped or moved while it was read arrives.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/store.h>
#include <uffdkit/uffd.h>
#include <uffdkit/units.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "engine/access_record.h"
#include "engine/fetch.h"
#include "engine/io_budget.h"
#include "engine/plan.h"
#include "engine/prefetch_order.h"
#include "engine/session_counters.h"
#include "engine/session_state.h"
#include "engine/shared_image.h"
#include "engine/store_lane.h"
#include "engine/streams.h"

namespace uffdkit {

// Why a fault is not answered yet.
enum class PendingWhy : std::uint8_t {
  serving,    // a worker is about it
  reading,    // its read from the image has not come back
  full,       // as many reads as may be are under way, and none has come back
  changing,   // the client changes its address space, so that the kernel refuses to fill it (EAGAIN)
  no_memory,  // there is none for the page: the client's limit, or no huge page is left
  paused,     // it cannot be read, and the client is stopped
};

// What a session's client waits for. Written by its owner only.
struct SessionWaiting {
  static constexpr std::uint64_t kNoOffset = ~std::uint64_t{0};

  std::atomic<std::uint64_t> pending{0};         // faults under way
  std::atomic<std::int64_t> oldest_since_ns{0};  // when the oldest of them was read; 0 without one
  // Of that one: its page's address, where its image has it (kNoOffset: nowhere), and why.
  std::atomic<std::uint64_t> oldest_page{0};
  std::atomic<std::uint64_t> oldest_offset{0};
  std::atomic<PendingWhy> oldest_why{PendingWhy::serving};
  std::atomic<bool> paused{false};  // the client is stopped over a page that cannot be read
};

// Why a session ended.
enum class SessionEnd : std::uint8_t {
  gone,       // the client's memory is gone: it exited or called exec
  detached,   // everything is in place, and the memory is no longer registered
  released,   // the client wanted no more; its missing pages are zero from now on
  abandoned,  // left as it is, for somebody else to take up
  failed,     // it could not be served any longer: it was killed, or has SIGBUS for what it had not got
};

// What a child has after fork(2): its own userfaultfd, and its parent's regions and page states at that
// moment.
struct ForkedSession {
  Uffd uffd;
  SessionState state;
  std::vector<std::shared_ptr<StoreLane>> lanes;     // by RegionId
  std::vector<std::shared_ptr<SharedImage>> shared;  // likewise; see Session::share
};

// What to do about a page that cannot be had when everything is to be brought in.
enum class Unreadable : std::uint8_t {
  keep_serving,  // give up detaching: the session goes on as before
  poison,        // it answers with SIGBUS, and the rest is brought in
};

// What the owner of a session provides.
class SessionHost {
 public:
  virtual ~SessionHost() = default;
  virtual std::int64_t now_ns() = 0;
  // Memory for one read, at least one fetch large; the session uses it within a step only.
  virtual std::span<std::byte> scratch() = 0;
  // Whether the session has had its time: it leaves the rest for its next step. Asked between any two pieces
  // of work.
  virtual bool gives_way() = 0;
  // Reads the fetch where that may wait, and brings it back by Session::fetched().
  virtual void start_fetch(StoreLane& lane, std::unique_ptr<Fetch> fetch) = 0;
  // Ends the client's process, because going on would give it wrong bytes or none: it is gone some time
  // later. False if nobody knows the process, or it has exited.
  virtual bool kill_client() = 0;
  // Whether nobody knows the client's process, or it has exited.
  virtual bool client_has_exited() = 0;
  // Stops the client, all of its threads, until continue_client(). False if nobody knows its process, or it
  // has exited.
  virtual bool stop_client() = 0;
  virtual void continue_client() = 0;
  // The client has forked: `session` is the child's, as its parent's was at that moment, and is to be served.
  // It is taken, unless there is an error: then it cannot be.
  virtual Result<void> forked(std::unique_ptr<ForkedSession>& session) = 0;
  // A page that could not be read, once for each.
  virtual void page_failed(const Error& error) = 0;
  // Detaching was given up, for Unreadable::keep_serving.
  virtual void detach_failed(const Error& error) = 0;
  // Something that an operator should know.
  virtual void warn(const std::string& text) = 0;
};

// What becomes of a client that touches a page which cannot be read.
enum class OnError : std::uint8_t {
  poison,  // the page answers with SIGBUS
  kill,    // the client is killed; one whose process nobody knows (a child of fork) has the page poisoned
  pause,   // likewise stopped, with the page left as it is until somebody calls resume()
};

// Whether what nobody has asked for is brought in the end.
enum class Background : std::uint8_t {
  off,
  idle,  // while no fault comes
  full,  // as fast as faults and the budget leave room
};

struct SessionOptions {
  // Pages of 4 KiB that come with a fault, its own included; a power of two, at most kFetchGranulesMax.
  PageCount fault_around{16};
  // The same for regions that share their image: what comes uncalled for takes memory once for all clients.
  PageCount shared_fault_around{64};
  OnError on_error = OnError::poison;
  Background background = Background::off;
  // Whether a client that goes through its memory in order is brought what it will come to: not where its
  // pages are recorded, or where it has a working set.
  bool follow_streams = false;
  // Of what is read in the background, by all sessions that have it; nullptr: no limit.
  std::shared_ptr<IoBudget> background_budget = nullptr;
};

// What an owner calls a region of its own; 0 for none. Region numbers are used again, this is not.
using RegionTag = std::uint64_t;

class Session {
 public:
  // What to do after a step.
  struct Next {
    bool again = false;           // step() again soon: there is more to do
    std::int64_t wake_at_ns = 0;  // step() at this time at the latest; 0 for none
    // False: until wake_at_ns nothing is read, so that it is of no use to be told that something can be.
    bool reads = true;
  };

  // `lanes` read the regions that `state` already has (a session that is taken up again, or of a child), by
  // RegionId.
  Session(Uffd uffd, SessionState state, std::vector<std::shared_ptr<StoreLane>> lanes,
          SessionOptions options, SessionHost& host);

  const Uffd& uffd() const { return uffd_; }
  const SessionState& state() const { return state_; }
  // From any thread.
  const SessionCounters& counters() const { return *shown_counters_.load(std::memory_order_acquire); }
  const SessionWaiting& waiting() const { return waiting_; }
  // Counts there from now on, from what is there; nullptr: in the session itself, with a copy of that.
  void count_in(SessionCounters* counters);
  std::optional<SessionEnd> end() const { return end_; }

  // `memory`, registered for missing faults already or soon, shows the store from `offset` on from now on.
  // Errors: ranges that are not whole pages or lie outside of the store, page sizes other than 4 KiB and 2
  // MiB (where the image is shared: than 4 KiB), too many regions.
  Result<void> add_region(AddressRange memory, StoreOffset offset, PageSize page_size,
                          std::shared_ptr<StoreLane> lane, RegionTag tag = 0, Sharing sharing = {});
  // What the regions of a child share, by RegionId. A region that shares, but whose image's memory is not at
  // hand (it was another manager's), is brought as private copies.
  void share(const std::vector<std::shared_ptr<SharedImage>>& images);
  // The same where all regions that share do so with this one.
  void share_all(const std::shared_ptr<SharedImage>& image);
  // How its regions share their image: that of the first one which does.
  SharingMode sharing() const;
  // Whether what the client has done to its address space may still be unknown here. A range that was
  // unmapped and mapped again meanwhile must not be added: the event of its unmapping would take it away
  // again.
  bool is_changing() const { return uffd_.target() == Target::changing; }
  // Drops what is left of the region with this tag, wherever it has moved to, and tells where that was.
  Result<std::vector<AddressRange>> drop_tagged(RegionTag tag);
  // Serves nothing in `memory` from now on; fetches for it that are under way are not installed. Where it
  // shares the image, what is missing is zero from now on. EAGAIN: the client is changing its memory; again.
  Result<void> drop(AddressRange memory);
  // Applies what the session's former owner has read and not applied. Faults are left out: see wake_all().
  // `may_adopt` says whether a descriptor that a fork message names is still the child's; where nobody can
  // know, none is. Before the first step.
  void apply_inbox(const std::function<bool(int)>& may_adopt);
  // Every thread that waits tries again: for a session that is taken up again, whose faults somebody else has
  // read.
  void wake_all();
  // Brings everything in; then unregisters the memory and ends as `detached`.
  void begin_detach(Unreadable unreadable);
  // Unregisters the memory with zeros where nothing was brought, at once except where it shares the image,
  // and ends as `released` when no thread of the client waits for an event to be read any more.
  void release();
  // Kills the client, because it cannot be served any longer, and ends as `failed` when its memory is gone.
  // Where nobody knows its process, or the memory turns out to be another's, which does not die with it,
  // every page that it has not got is poisoned instead, which stays so when nobody serves the memory any
  // more.
  void fail(const std::string& why);
  // Tries again to read the pages over which the client was stopped (OnError::pause), and lets it go on. If
  // one cannot be read still, the client is stopped again.
  void resume();
  // Serves no more, and leaves everything as it is: ends as `abandoned`. Not after fail(): what is missing is
  // nobody else's to serve then, and has to be poisoned.
  void abandon() {
    if (failing_ == Failing::no) stop();
  }
  // The same in any case.
  void stop() { finish(SessionEnd::abandoned); }
  // The client's memory may be gone, because its process has exited or called exec(2): ends as `gone` if it
  // is. The process that handed it over may not be the one whose memory it is; then it goes on being served.
  void check_target();
  // Notes the pages of this image that are asked for, from now on.
  void record(std::shared_ptr<AccessRecord> pages, std::shared_ptr<StoreLane> lane) {
    record_ = {.pages = std::move(pages), .lane = std::move(lane)};
    notes_wanted_ = true;
    streams_.reset();
  }
  // Notes those, too, that another manager has brought, which recorded: what is there was asked for, in an
  // order that nobody knows any more.
  void record_what_is_there();
  // Brings these pages of that image as soon as no fault has to be served. `seed` says which few are left
  // out, to see whether they are asked for.
  void prefetch(std::shared_ptr<const PrefetchOrder> order, std::shared_ptr<StoreLane> lane,
                std::uint64_t seed);
  // Gives back a fetch that has been read.
  void fetched(std::unique_ptr<Fetch> fetch) { returned_.push_back(std::move(fetch)); }

  // Reads messages, applies events, then serves what faults can be served. Never waits.
  Next step();

 private:
  // A fault that has not been answered.
  struct Pending {
    Address page;
    PageSize page_size;
    Fault::Kind kind;
    std::int64_t since_ns;
    std::int64_t not_before_ns = 0;  // the kernel put it off until then
    unsigned attempts = 0;           // how often it was put off
    std::uint64_t fetch = 0;         // the fetch that brings it; 0 for none
    bool blocked = false;            // as many fetches as may be are under way; one must come back first
    bool paused = false;             // it cannot be read, and is not tried again before resume()
    bool no_memory = false;          // why it was put off the last time; else the client was changing
    bool in_vain = false;            // its fetch could put the page nowhere
    bool unexpected = false;         // as note() has it
    // Whether it is to be tried now or at a time.
    bool is_waiting() const { return fetch == 0 && !blocked && !paused; }
  };
  // What came of trying to answer a fault.
  enum class Served : std::uint8_t {
    done,      // answered, or nothing to do
    fetching,  // a fetch will answer it, or has to come back before another can be started
    put_off,   // to be tried again at a time
  };
  // What came of putting a run of pages into the client's memory. With `failed`, all that can be put is
  // there, and what cannot is as it was. With `done`, it is there, or cannot be, and its readers have been
  // woken.
  enum class Put : std::uint8_t { done, put_off, no_memory, failed, gone };
  // What to put there.
  struct Contents {
    enum class Kind : std::uint8_t { zeros, bytes, shared };
    Kind kind = Kind::zeros;
    std::span<const std::byte> bytes{};
  };

  // What a region has beside its record in the state file.
  struct RegionServing {
    std::shared_ptr<StoreLane> lane;  // nullptr for a dropped region
    std::uint64_t serial = 0;         // never used again, unlike the region's number
    RegionTag tag = 0;
    std::shared_ptr<SharedImage> shared{};  // nullptr where nothing is shared, or its memory is not at hand
  };

  // A fetch that has not come back; the Fetch itself is with its reader.
  struct UnderWay {
    std::uint64_t id;
    RegionId region;
    std::uint64_t serial;             // the region's; another one there means that the number was used again
    std::shared_ptr<StoreLane> lane;  // keeps it until the fetch is back
    PageRange granules;
    std::int64_t since_ns;
  };
  struct Recording {
    std::shared_ptr<AccessRecord> pages;
    std::shared_ptr<StoreLane> lane;
  };
  // Bringing a working set or what streams will come to, and the rest in the background.
  struct Prefetching {
    std::shared_ptr<const PrefetchOrder> order;  // nullptr where nothing was recorded
    std::shared_ptr<StoreLane> lane;             // of that
    std::uint64_t seed = 0;
    std::size_t next = 0;           // the first page of the order that was not looked at
    bool begun = false;             // something is or was under way
    unsigned depth = 0;             // batches that may be under way
    unsigned under_way = 0;         // that are
    unsigned good = 0;              // that came back since the depth changed
    std::int64_t last_back_ns = 0;  // when the last of them came back
    // A rest: depth is 0 until then, or until so many faults were read with nothing else under way.
    std::int64_t rests_until_ns = 0;
    unsigned rests_for_faults = 0;
    unsigned rests = 0;                          // since batches came back in time
    std::int64_t alone_ns = 0;                   // what the last such fault took
    bool stopped = false;                        // for good
    std::deque<std::unique_ptr<Fetch>> arrived;  // to be put into place
    bool at_hand = false;                        // the last of these was read by the session itself
    // Of the first of these: the piece that is put, what of it is, and what lies in the buffer before it.
    std::size_t piece = 0;
    PageCount done;
    PageCount buffered;
    std::int64_t not_before_ns = 0;  // the kernel put it off until then
    unsigned attempts = 0;           // how often in a row
    // When a page was asked for the last time that was not to be brought, or not soon.
    std::int64_t missed_at_ns = std::numeric_limits<std::int64_t>::min() / 2;
    std::deque<Streams::Ahead> ahead;  // of streams; what has been begun of the first is no longer in it
    // In the background: what was not looked at begins there, when the next batch may be begun, and whether
    // its bytes were taken from the budget.
    bool background = false;
    bool background_paid = false;
    Address background_from{0};
    std::int64_t background_at_ns = 0;
    std::uint64_t faults_seen = 0;
    std::int64_t last_fault_ns = 0;

    bool has_order() const { return order != nullptr && next < order->pages().size(); }
    bool has_something() const { return has_order() || !ahead.empty() || background || !arrived.empty(); }
  };
  // How much of it is done at once.
  struct Pace {
    std::size_t batch_pages;  // read together
    unsigned batches;         // under way
    std::size_t step_pages;   // put into place in one step
  };
  // Where a page of the image is shown.
  struct Place {
    RegionId region;
    PageRange granules;  // of its page
  };

  Lost lost(const Segment& segment) const;

  // False if there may be more messages.
  bool drain();
  // Applies an event; returns how many page states it has changed at most.
  std::uint64_t apply(const Message& event, std::uint8_t kind);
  bool serve_at_once(const Fault& fault);
  void keep_unless(Put put, const Segment& segment, PageIndex wanted, std::int64_t now);
  void take(const Fault& fault);
  void apply(const RemoveEvent& event);
  void apply(const UnmapEvent& event);
  void apply(const RemapEvent& event);
  void apply(const ForkEvent& event);
  // Nobody can serve the child: what it has not got answers with SIGBUS from now on.
  void condemn_child(Uffd child, Error why);
  void forget_dropped_regions();

  void install_returned();
  void install(std::unique_ptr<Fetch> fetch);
  void settle_failed_pages(const UnderWay& fetch, const Fetch& read);
  // Condemns the page of a fetch that cannot be had if somebody needs it; else it is tried again when
  // somebody does.
  void give_up(const UnderWay& fetch, const Segment& segment, PageIndex first, const Error& error);
  // Answers, or sets free, the faults that waited for a fetch.
  void settle_pending(const UnderWay& fetch, Put put);
  // Stops the client over that page; false if that cannot be or is not wanted.
  bool pause(const UnderWay& fetch, Address page, const Error& error);
  // What was paused is tried again.
  void unpause();
  bool is_current(const UnderWay& fetch) const { return serving_[fetch.region].serial == fetch.serial; }
  // Puts the bytes of `part` into place, the run that holds `wanted` first; says what came of that run.
  Put install_part(const Segment& segment, PageRange part, std::span<std::byte> bytes,
                   std::optional<PageIndex> wanted);
  // Puts one run into place.
  Put put(const Segment& segment, PageRange run, Contents contents);
  Outcome put_once(const Segment& segment, PageRange run, const Contents& contents) const;
  Outcome zero_once(Address to, PageSize page_size, PageCount granules) const;
  bool is_brought(const Segment& segment, PageRange run);
  void mark_brought(const Segment& segment, PageRange run);

  bool serve_pending();
  Served serve(Pending& pending);
  Served serve_missing(Pending& pending);
  Served serve_read(Pending& pending, const Segment& segment, PageRange run, PageIndex wanted);
  Served serve_shared(Pending& pending, const Segment& segment, PageRange run, PageIndex wanted);
  // A fetch answers it.
  Served serve_by_fetch(Pending& pending, const Segment& segment, PageRange run);
  Served serve_outside(Pending& pending, PageSize page_size);
  // Memory that mremap(2) has left behind.
  Served serve_left_behind(Pending& pending, const Segment& segment);
  // Whether the page is behind the end of a file's mapping that has grown over more of its region; then that
  // is known now. Nothing: that cannot be told while the client changes its memory.
  std::optional<bool> has_grown_over(Address page);
  // Whether somebody waits for the page at `first`, wherever it is mapped.
  bool is_demanded(const UnderWay& fetch, const Segment& segment, PageIndex first) const;
  Served served_by(Put put, Pending& pending, const Segment& segment, PageIndex wanted);
  Served put_off(Pending& pending, bool no_memory = false);
  // The kernel has put something off because the client is changing its address space: nothing would be
  // answered for a moment.
  void hold_back();
  bool is_held_back() const { return changing_until_ns_ > host_.now_ns(); }
  // The fetch's number, or 0 if there is no memory for it.
  std::uint64_t start_fetch(const Segment& segment, PageRange run);
  bool may_fetch(RegionId region) const;
  // Condemns the page; false if the kernel put it off.
  bool poison(const Segment& segment, PageIndex granule);
  Served serve_poison(Pending& pending, const Segment& segment, PageIndex wanted);

  // ---- session_shared.cc: regions that map their image's memory privately
  SharingMode sharing_of(const Segment& segment) const;
  // Whether a minor fault there is one for a page of the image.
  bool shares(const Segment* segment) const;
  PageRange image_pages(const Segment& segment, PageRange run) const;
  // Shows what is there of a run; the rest is left alone.
  Put put_filled(const Segment& segment, PageRange run);
  SharedImage::Fill fill_and_count(const Segment& segment, PageRange run);
  // Whether the page would be a hole of the image's memory, or the image again, if it were no longer served.
  bool must_be_zeroed(const Segment& segment, PageIndex granule);
  // The run of such pages from `from` on, below `end`; not empty.
  PageRange zero_run(const Segment& segment, PageIndex from, PageIndex end);
  Put zero_all(AddressRange memory);

  // ---- session_prefetch.cc: pages before they are asked for
  // A page is asked for that may not be there: for who records, and who wants to know what prefetching is
  // good for. True if nobody could tell that it would be.
  bool note_wanted(const Segment& segment, PageIndex granule);
  Pace pace() const;
  bool is_left_out(PageIndex image_page) const;
  // What of `run` is to come with `wanted`: if that is in the order, its neighbours in the order; of others
  // it is known that they are not wanted.
  PageRange expected_of(const Segment& segment, PageRange run, PageIndex wanted) const;
  std::optional<Place> place_of(PageIndex image_page) const;
  bool is_untouched(RegionId region, PageRange granules);
  // True if there is more to do at once.
  bool prefetch_step();
  Prefetching& prefetching();
  // Starts batches; true if there are more to be started at once.
  bool start_batches();
  // False if enough was done in this step.
  bool start_batch_of_order();
  // False if no other can be begun in this step.
  bool start_background_batch();
  // Whether a batch may be begun in the background now; if not, its time is noted.
  bool may_start_in_background();
  // Reads these, `granules` of them, at once or by the region's lane. False if that was enough for this step.
  bool submit(RegionId region, std::vector<FetchPiece> pieces, std::size_t granules, Urgency urgency);
  void prefetched(std::unique_ptr<Fetch> fetch);
  // A fault's read is back that was begun then.
  void fault_was_read(std::int64_t since_ns);
  void rest();
  // Whether nothing is to be begun for the sake of faults.
  bool is_resting();
  void stop_prefetching();
  // Puts some of what has arrived into place.
  void install_arrived();
  // Puts pages of `rest` into place, whose first one lies in page `at` of the fetch's buffer, as far as they
  // go together and up to `granules_max`; how many were passed. 0: not now.
  PageCount install_run(Fetch& fetch, PageRange rest, std::uint64_t at, std::size_t granules_max);

  // ---- session_streams.cc: clients that go through their memory in order
  // A page is asked for, whatever it is, and whether or not for the first time: for who follows streams, and
  // for note_wanted(). True if nobody could tell that it would be.
  bool note(const Segment& segment, PageIndex granule);
  // A stream has come to where it was expected.
  void stream_went_on();
  // Begins a batch of what one will come to; false if enough was done in this step.
  bool start_batch_of_stream();
  // Adds what is missing of its next page and the neighbours of that; how many pages are to be read.
  std::size_t add_around(const Streams::Ahead& ahead, std::vector<FetchPiece>& pieces);

  // Goes on bringing everything in; true if there is more to do at once.
  bool populate();
  // Condemns the run that begins with `first`, and goes behind it; false if the kernel put it off.
  bool condemn_run(const Segment& segment, PageIndex first, PageIndex end);
  // False if nothing more can be done before a fetch comes back or the time for another try.
  bool populate_run(const Segment& segment, PageRange run);
  bool populate_by_fetch(const Segment& segment, PageRange run);
  bool populated(Put put, const Segment& segment, PageRange run);
  void put_off_populating();
  // There is something to bring again, or for the first time, from this address on.
  void populate_again_from(Address address);
  bool poison_what_is_missing(const Segment& segment, PageRange run);
  void unregister_all();
  // All of the registered mapping that these pages lie in. Nothing: that cannot be told while the client
  // changes its memory.
  std::optional<AddressRange> mapping_of(AddressRange pages, PageSize page_size) const;
  // Unregisters `memory` and what mremap(2) has added to its mapping; what has to wait goes to ends_.
  void unregister_with_growth(AddressRange memory, PageSize page_size);
  // The same of a range that may be longer than its mapping.
  void unregister_what_is_mapped(AddressRange memory);
  // Unregisters, and ends so when no thread of the client waits for an event to be read any more.
  void begin_end(SessionEnd end);
  void finish_ending();
  // After fail(): the client's memory is gone, or poisoned from now on, or neither can be told yet.
  void end_failed();
  bool waits_for_exit() const { return failing_ == Failing::killed; }
  void finish(SessionEnd end);
  void publish_pending();
  void publish_oldest(Address page, std::uint64_t offset, PendingWhy why, std::int64_t since_ns);
  static PendingWhy why(const Pending& pending);

  void wake(AddressRange range) const;
  StoreOffset offset_of(const Segment& segment, PageIndex granule) const;

  Uffd uffd_;
  SessionState state_;
  std::vector<RegionServing> serving_;  // by RegionId
  std::uint64_t last_serial_ = 0;
  SessionOptions options_;
  SessionHost& host_;
  SessionCounters own_counters_;
  SessionCounters* counters_ = &own_counters_;
  std::atomic<const SessionCounters*> shown_counters_{&own_counters_};
  SessionWaiting waiting_;

  unsigned at_once_ = 0;        // faults in a row that were answered at once, each all that its read brought
  unsigned reads_at_once_ = 0;  // reads made while these are many; never 0 again
  std::vector<Pending> pending_;
  bool overflowed_ = false;  // faults were not kept; wake_all() brings them back
  std::vector<std::unique_ptr<Fetch>> returned_;
  std::vector<UnderWay> fetches_;
  std::uint64_t last_fetch_ = 0;
  Recording record_;
  std::optional<Streams> streams_;
  std::unique_ptr<Prefetching> prefetching_;
  bool notes_wanted_ = false;  // one of these is there

  std::int64_t read_not_before_ns_ = 0;  // the descriptors were used up
  // The client was changing its address space, and the kernel puts off everything meanwhile: no fault is
  // tried before.
  std::int64_t changing_until_ns_ = 0;
  // See fail().
  enum class Failing : std::uint8_t {
    no,
    killed,     // nothing is served until the client's process has exited
    condemned,  // what is missing is being poisoned
  };
  Failing failing_ = Failing::no;
  std::int64_t failed_since_ns_ = 0;
  std::int64_t look_for_exit_at_ns_ = 0;
  bool stopped_ = false;  // so is the client, by us
  bool detaching_ = false;
  bool releasing_ = false;                      // detaching, with zeros for what is missing
  Unreadable unreadable_ = Unreadable::poison;  // while detaching
  std::uint64_t poison_pages_max_ = 1u << 16;   // at once: see condemn_run()
  bool populate_again_ = false;  // something could not be brought in the pass that is under way
  Address populate_from_{0};
  std::int64_t populate_not_before_ns_ = 0;
  unsigned populate_attempts_ = 0;    // how often it was put off in a row
  std::optional<SessionEnd> ending_;  // everything is unregistered, but ends_
  struct LastPage {
    AddressRange memory;
    PageSize page_size;
  };
  std::vector<LastPage> ends_;  // of mappings that may have grown: to be unregistered with that
  std::int64_t ending_since_ns_ = 0;
  std::optional<SessionEnd> end_;
};

// A page of the client's own memory is taken away by the client only, and where that is told by an event, the
// event has been read before anybody can miss the page. What is left makes no event, and means the same: a
// hole that is punched into a file, or what another process does to memory that both share. A client that
// asks for no such events gets the image again, whatever it does.
inline Lost Session::lost(const Segment& segment) const {
  const bool is_told = uffd_.features().has(Features(abi::kFeatureEventRemove));
  return is_told && sharing_of(segment) == SharingMode::none ? Lost::zero : Lost::store;
}

}  // namespace uffdkit
