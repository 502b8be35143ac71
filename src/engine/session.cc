#include "engine/session.h"

#include <fmt/format.h>

#include <algorithm>
#include <bitset>
#include <cerrno>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/step.h"
#include "engine/session_detail.h"
#include "kernel/huge_page_pool.h"

// After each answer the client runs, and this code has gone from the nearest cache when the next fault comes:
// its size is what it costs. So the functions of a served fault are marked hot, for the linker to put them
// side by side, and those with one caller are inlined.

namespace uffdkit {
namespace {

constexpr int kReadsPerStep = 16;                    // then others get their turn
constexpr std::uint64_t kChangedPerStep = 1u << 22;  // page states that events may change; then likewise
constexpr std::size_t kServedPerStep = 64;           // likewise
// Where so many faults in a row came alone and were answered at once, one message is asked for: as long as
// there is room the kernel looks for a second, which is a hundredth of the time of a fault. Every
// kSeveralAgain-th read asks for all that wait, to see whether there are several now: a prime, lest it meets
// the last one of each group.
constexpr unsigned kAtOnceMin = 32;
constexpr unsigned kSeveralAgain = 17;
constexpr std::size_t kPendingMax = 1024;  // faults kept; more are forgotten and come back by a wake

// How often an end is tried whose client still changes its address space.
constexpr std::int64_t kEndingRetryNs = 200'000;

// How soon a read that failed for want of a descriptor is tried again.
constexpr std::int64_t kNoDescriptorRetryNs = 100'000'000;

alignas(4096) constinit std::array<std::byte, session::kPageBytesMax> zero_huge_page{};

bool is_zero(std::span<const std::byte> bytes) {
  return bytes[0] == std::byte{0} && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

}  // namespace

using namespace session;

Session::Session(Uffd uffd, SessionState state, std::vector<std::shared_ptr<StoreLane>> lanes,
                 SessionOptions options, SessionHost& host)
    : uffd_(std::move(uffd)), state_(std::move(state)), options_(std::move(options)), host_(host) {
  CHECK(lanes.size() == state_.regions().size());
  for (std::shared_ptr<StoreLane>& lane : lanes)
    serving_.push_back(lane ? RegionServing{.lane = std::move(lane), .serial = ++last_serial_}
                            : RegionServing());
  if (options_.follow_streams) streams_.emplace(options_.fault_around);
  if (options_.background != Background::off && !serving_.empty()) prefetching().background = true;
}

void Session::wake(AddressRange range) const {
  // Refused only for ranges that are not whole pages, which none of ours is.
  (void)uffd_.wake(range);
}

void Session::wake_all() {
  for (const Segment& segment : state_.layout().segments()) wake(segment.memory);
  // Threads wait outside of all segments, too: in memory that mremap(2) has added. No list has where that is,
  // so all addresses of a 64-bit process are woken, or, where the kernel says that there are none, of a
  // 32-bit one.
  if (!uffd_.wake(kAllAddresses)) wake(kAllAddresses32);
}

void Session::count_in(SessionCounters* counters) {
  if (counters == nullptr) {
    own_counters_.set_to_sum(*counters_, SessionCounters());
    counters = &own_counters_;
  }
  counters_ = counters;
  shown_counters_.store(counters, std::memory_order_release);
}

// ---- a step -----------------------------------------------------------------------------------------------

[[gnu::hot]] Session::Next Session::step() {
  bool all_read = true;
  bool all_served = true;
  bool populating = false;
  bool bringing = false;
  if (!end_ && waits_for_exit()) end_failed();
  if (!end_) all_read = drain();
  // For the watchdog, in case that serving it does not come back from the kernel.
  if (!pending_.empty() && waiting_.oldest_since_ns.load(std::memory_order_relaxed) == 0) publish_pending();
  if (!end_ && !ending_ && !waits_for_exit() && !returned_.empty()) install_returned();
  if (!end_ && !ending_ && !waits_for_exit()) all_served = serve_pending();
  if (!end_ && !ending_ && detaching_) populating = populate();
  // What is asked for goes first.
  if (prefetching_ != nullptr && !end_ && !ending_ && !detaching_ && !waits_for_exit() && all_read &&
      all_served && !is_held_back())
    bringing = prefetch_step();
  if (!end_ && ending_ && all_read) finish_ending();
  if (!end_ && overflowed_ && pending_.size() < kPendingMax / 2) {
    overflowed_ = false;
    wake_all();
  }
  publish_pending();

  Next next;
  if (end_) return next;
  next.again = !all_read || !all_served || populating || bringing;
  if (waits_for_exit()) {
    // A fault that is served no more is not what is waited for.
    next.again = false;
    next.wake_at_ns = look_for_exit_at_ns_;
    return next;
  }
  const auto sooner = [&](std::int64_t at) {
    if (at != 0 && (next.wake_at_ns == 0 || at < next.wake_at_ns)) next.wake_at_ns = at;
  };
  // The time, or when faults are tried again.
  const auto not_held_back = [&, held_back = is_held_back()](std::int64_t at) {
    return held_back ? std::max(at, changing_until_ns_) : at;
  };
  for (const Pending& pending : pending_)
    if (pending.is_waiting()) sooner(not_held_back(pending.not_before_ns));
  if (detaching_) sooner(populate_not_before_ns_);
  if (prefetching_ != nullptr && !detaching_) {
    sooner(not_held_back(prefetching_->not_before_ns));
    if (prefetching_->has_something() && prefetching_->rests_until_ns > host_.now_ns())
      sooner(prefetching_->rests_until_ns);
    const bool waits = prefetching_->background && prefetching_->under_way == 0 && pending_.empty();
    if (waits && prefetching_->background_at_ns > host_.now_ns()) sooner(prefetching_->background_at_ns);
  }
  if (ending_) sooner(host_.now_ns() + kEndingRetryNs);
  sooner(read_not_before_ns_);
  next.reads = read_not_before_ns_ == 0;
  return next;
}

[[gnu::hot]] void Session::publish_pending() {
  waiting_.pending.store(pending_.size(), std::memory_order_relaxed);
  const auto oldest = std::ranges::min_element(pending_, {}, &Pending::since_ns);
  if (oldest == pending_.end()) return waiting_.oldest_since_ns.store(0, std::memory_order_relaxed);
  const Segment* segment = state_.layout().find(oldest->page);
  const bool has_offset = segment != nullptr && segment->region != kZeroRegion;
  publish_oldest(
      oldest->page,
      has_offset ? offset_of(*segment, segment->granule_at(oldest->page)).value : SessionWaiting::kNoOffset,
      why(*oldest), oldest->since_ns);
}

[[gnu::always_inline]] inline void Session::publish_oldest(Address page, std::uint64_t offset, PendingWhy why,
                                                           std::int64_t since_ns) {
  waiting_.oldest_page.store(page.value, std::memory_order_relaxed);
  waiting_.oldest_offset.store(offset, std::memory_order_relaxed);
  waiting_.oldest_why.store(why, std::memory_order_relaxed);
  waiting_.oldest_since_ns.store(since_ns, std::memory_order_relaxed);
}

PendingWhy Session::why(const Pending& pending) {
  if (pending.paused) return PendingWhy::paused;
  if (pending.fetch != 0) return PendingWhy::reading;
  if (pending.blocked) return PendingWhy::full;
  if (pending.attempts == 0) return PendingWhy::serving;
  return pending.no_memory ? PendingWhy::no_memory : PendingWhy::changing;
}

// ---- messages ---------------------------------------------------------------------------------------------

[[gnu::hot]] bool Session::drain() {
  if (read_not_before_ns_ != 0 && host_.now_ns() < read_not_before_ns_) return true;
  read_not_before_ns_ = 0;
  // A client's call that changes a terabyte is soon done where nothing is mapped; its event costs us 2 MiB of
  // page states, and 130 MiB where all of it was touched before.
  std::uint64_t changed = 0;
  for (int reads = 0; reads < kReadsPerStep && changed < kChangedPerStep; ++reads) {
    // What is prefetched is put into place only where nothing is left to be read.
    const bool prefetches = prefetching_ != nullptr && prefetching_->has_something();
    const bool asks_for_one = at_once_ >= kAtOnceMin && !prefetches && ++reads_at_once_ % kSeveralAgain != 0;
    const std::span<abi::Msg> messages = state_.empty_inbox().first(asks_for_one ? 1 : kInboxMessages);
    // Whoever caused an event goes on when it has been read: from then on it must not be forgotten.
    const ReadOutcome read = uffd_.read(messages);
    uffdkit::step();
    if (read.os_error == EMFILE || read.os_error == ENFILE) {
      // A fork message needs a descriptor; it stays until there is one.
      host_.warn("a fork cannot be followed: no free file descriptor (raise LimitNOFILE=)");
      read_not_before_ns_ = host_.now_ns() + kNoDescriptorRetryNs;
      return true;
    }
    if (read.os_error != 0) {
      fail(Error::from_errno("read a userfaultfd", read.os_error).message());
      return true;
    }
    if (read.messages == 1 && messages[0].event == abi::kEventPagefault &&
        serve_at_once(decode_fault(messages[0]))) {
      ++at_once_;
      return true;
    }
    if (read.messages > 0) at_once_ = 0;
    for (std::size_t i = 0; i < read.messages; ++i) {
      const abi::Msg raw = messages[i];
      if (raw.event == abi::kEventPagefault) {
        take(decode_fault(raw));
        continue;
      }
      const Message message = decode(raw);
      state_.applying(i);
      changed += apply(message, raw.event);
      uffdkit::step();
      state_.applied();
      uffdkit::step();
    }
    // The kernel gives as many as wait and fit.
    if (read.messages < messages.size()) return true;
    if (host_.gives_way()) return false;
  }
  return false;
}

// What most faults are, in as little code as they need: nothing else waits, and the page is one of 4 KiB of
// the client's own memory that was never there and whose bytes are at hand. False: the fault is still to be
// taken, and whatever is different about it is for serve().
[[gnu::always_inline]] inline bool Session::serve_at_once(const Fault& fault) {
  if (!pending_.empty() || ending_ || failing_ != Failing::no || fault.kind != Fault::Kind::missing)
    return false;
  const Segment* segment = state_.layout().find(fault.address);
  if (segment == nullptr || segment->region == kZeroRegion || segment->left_behind ||
      segment->page_size != kPage4K)
    return false;
  const RegionServing& serving = serving_[segment->region];
  if (serving.shared != nullptr) return false;
  const PageIndex wanted = segment->granule_at(fault.address);
  PageTable& table = state_.table(segment->region);
  if (table.get(wanted) != PageState::absent) return false;
  PageRange run = plan_fault(table, *segment, wanted, options_.fault_around, Lost::store).granules;
  if (run.count > kOneGranule) run = expected_of(*segment, run, wanted);
  const StoreOffset offset = offset_of(*segment, run.first);
  Store& store = *serving.lane->store();
  const StoreOffset wanted_offset = offset + kPage4K.bytes(wanted - run.first);
  if (store.extent_at(wanted_offset).zero) return false;

  waiting_.pending.store(1, std::memory_order_relaxed);
  const std::int64_t now = host_.now_ns();
  publish_oldest(segment->address_of(wanted), wanted_offset.value, PendingWhy::serving, now);
  const std::span<std::byte> buffer = host_.scratch().first(kPage4K.bytes(run.count).value);
  const Result<ReadStatus> read = store.read(offset, buffer, Wait::no);
  if (!read || *read != ReadStatus::done) return false;
  add(counters_->faults);
  add(counters_->bytes_read, buffer.size());
  if (streams_ && streams_->wanted(segment->region, wanted))
    stream_went_on();
  else if (notes_wanted_)
    note_wanted(*segment, wanted);
  if (run.count == kOneGranule && !is_zero(buffer)) {
    const Outcome outcome = uffd_.copy(segment->address_of(wanted), buffer);
    if (outcome.stop == Stop::complete) {
      table.set(wanted, PageState::installed);
      add(counters_->pages_copied);
      return true;
    }
    if (outcome.stop == Stop::changing) {
      hold_back();
      keep_unless(Put::put_off, *segment, wanted, now);
      return true;
    }
  }
  keep_unless(install_part(*segment, run, buffer, wanted), *segment, wanted, now);
  return true;
}

// Keeps a fault among those that wait, unless this has answered it.
[[gnu::hot]] void Session::keep_unless(Put put, const Segment& segment, PageIndex wanted, std::int64_t now) {
  if (put == Put::done) return;
  Pending pending{.page = segment.address_of(wanted),
                  .page_size = segment.page_size,
                  .kind = Fault::Kind::missing,
                  .since_ns = now};
  if (served_by(put, pending, segment, wanted) != Served::done && !end_) pending_.push_back(pending);
}

[[gnu::always_inline]] inline void Session::take(const Fault& fault) {
  add(counters_->faults);
  const Segment* segment = state_.layout().find(fault.address);
  const PageSize page_size = segment != nullptr ? segment->page_size : kPage4K;
  const Address page(page_size.round_down(fault.address.value));
  for (const Pending& known : pending_) {
    if (known.page != page || known.page_size != page_size || known.kind != fault.kind) continue;
    add(counters_->faults_merged);
    return;
  }
  if (pending_.size() == kPendingMax) {
    overflowed_ = true;
    return;
  }
  pending_.push_back({.page = page, .page_size = page_size, .kind = fault.kind, .since_ns = host_.now_ns()});
}

// ---- faults -----------------------------------------------------------------------------------------------

[[gnu::hot]] bool Session::serve_pending() {
  const std::int64_t now = pending_.empty() ? 0 : host_.now_ns();
  if (changing_until_ns_ > now) return true;
  std::size_t served = 0;
  std::size_t kept = 0;
  std::size_t next = 0;
  for (; next < pending_.size() && served < kServedPerStep; ++next) {
    Pending pending = pending_[next];
    if (pending.is_waiting() && pending.not_before_ns <= now) {
      if (served > 0 && host_.gives_way()) break;
      ++served;
      const Served result = serve(pending);
      if (end_) return true;
      if (result == Served::done) continue;
    }
    pending_[kept++] = pending;
    if (changing_until_ns_ > now) {
      ++next;
      break;
    }
  }
  const bool all = next == pending_.size();
  pending_.erase(pending_.begin() + static_cast<std::ptrdiff_t>(kept),
                 pending_.begin() + static_cast<std::ptrdiff_t>(next));
  return all;
}

[[gnu::always_inline]] inline Session::Served Session::serve(Pending& pending) {
  // What lies there may have changed since the fault was read.
  const Segment* segment = state_.layout().find(pending.page);
  const PageSize page_size = segment != nullptr ? segment->page_size : kPage4K;
  if (page_size != pending.page_size) {
    // Which of the smaller pages is wanted, or what the others of a larger one are, the next fault says.
    wake({pending.page, pending.page_size.bytes()});
    return Served::done;
  }
  pending.not_before_ns = 0;
  if (pending.kind == Fault::Kind::missing || (pending.kind == Fault::Kind::minor && shares(segment)))
    return serve_missing(pending);
  // Nothing here protects pages or maps what is in the page cache already; the client's own doing is undone.
  const AddressRange page{pending.page, page_size.bytes()};
  const Outcome outcome =
      pending.kind == Fault::Kind::write_protect ? uffd_.unprotect(page) : uffd_.resume(page);
  if (outcome.stop == Stop::changing) hold_back();
  if (outcome.stop == Stop::changing || outcome.stop == Stop::no_memory) return put_off(pending);
  if (outcome.stop == Stop::gone) finish(SessionEnd::gone);
  if (outcome.stop != Stop::complete) wake(page);
  return Served::done;
}

[[gnu::always_inline]] inline Session::Served Session::serve_missing(Pending& pending) {
  const Segment* segment = state_.layout().find(pending.page);
  if (segment == nullptr) {
    const std::optional<bool> grown = has_grown_over(pending.page);
    if (!grown) {
      hold_back();
      return put_off(pending);
    }
    if (*grown) segment = state_.layout().find(pending.page);
  }
  if (segment == nullptr) return serve_outside(pending, kPage4K);
  if (segment->region == kZeroRegion) return serve_outside(pending, segment->page_size);
  if (segment->left_behind) return serve_left_behind(pending, *segment);
  const PageIndex wanted = segment->granule_at(pending.page);
  const bool shared = serving_[segment->region].shared != nullptr;
  if (pending.attempts == 0) pending.unexpected = note(*segment, wanted);
  const FaultPlan plan =
      plan_fault(state_.table(segment->region), *segment, wanted,
                 shared ? options_.shared_fault_around : options_.fault_around, lost(*segment));
  switch (plan.action) {
    case FaultPlan::Action::read:
      if (shared) return serve_shared(pending, *segment, plan.granules, wanted);
      return serve_read(pending, *segment, expected_of(*segment, plan.granules, wanted), wanted);
    case FaultPlan::Action::zero:
      return served_by(put(*segment, plan.granules, {}), pending, *segment, wanted);
    case FaultPlan::Action::poison:
      return serve_poison(pending, *segment, wanted);
    case FaultPlan::Action::wait:
      break;
  }
  const auto brings = std::find_if(fetches_.begin(), fetches_.end(), [&](const UnderWay& fetch) {
    return fetch.region == segment->region && is_current(fetch) &&
           fetch.granules.first < wanted + granules_per_page(*segment) && wanted < fetch.granules.end();
  });
  if (brings == fetches_.end()) {
    // Only another holder of the state file can have written that.
    state_.table(segment->region).set(page_of(*segment, wanted), PageState::absent);
    return put_off(pending);
  }
  add(counters_->faults_merged);
  pending.fetch = brings->id;
  return Served::fetching;
}

[[gnu::always_inline]] inline Session::Served Session::serve_read(Pending& pending, const Segment& segment,
                                                                  PageRange run, PageIndex wanted) {
  Store& store = *serving_[segment.region].lane->store();
  const PageCount page = granules_per_page(segment);
  const Extent extent = store.extent_at(offset_of(segment, wanted));
  if (extent.zero) {
    // The hole, as far as it goes from the page on; what lies before it may be data.
    const PageCount hole = kPage4K.pages(extent.end - offset_of(segment, wanted));
    const PageCount whole(hole.value / page.value * page.value);
    if (whole.value > 0)
      return served_by(put(segment, {wanted, std::min(whole, run.end() - wanted)}, {}), pending, segment,
                       wanted);
  }
  const std::span<std::byte> buffer = host_.scratch().first(kPage4K.bytes(run.count).value);
  const Result<ReadStatus> read = store.read(offset_of(segment, run.first), buffer, Wait::no);
  if (read && *read == ReadStatus::done) {
    add(counters_->bytes_read, buffer.size());
    return served_by(install_part(segment, run, buffer, wanted), pending, segment, wanted);
  }
  // Not at hand, or not readable: a thread that may wait finds out.
  return serve_by_fetch(pending, segment, run);
}

Session::Served Session::serve_by_fetch(Pending& pending, const Segment& segment, PageRange run) {
  if (!may_fetch(segment.region)) {
    pending.blocked = true;
    return Served::fetching;
  }
  pending.fetch = start_fetch(segment, run);
  return pending.fetch != 0 ? Served::fetching : put_off(pending);
}

Session::Served Session::serve_outside(Pending& pending, PageSize page_size) {
  // Registered, but no part of what the client handed over: memory that mremap(2) added, or left behind.
  // Without an image, memory is zero.
  const AddressRange page{pending.page, page_size.bytes()};
  const Outcome outcome = zero_once(page.start, page_size, kPage4K.pages(page.length));
  if (outcome.stop == Stop::changing) hold_back();
  switch (outcome.stop) {
    case Stop::complete:
      add(counters_->pages_outside);
      return Served::done;
    case Stop::changing:
    case Stop::no_memory:
      return put_off(pending, outcome.stop == Stop::no_memory);
    case Stop::gone:
      finish(SessionEnd::gone);
      return Served::done;
    default:
      wake(page);
      return Served::done;
  }
}

// Shows whether it is a file's: UFFDIO_CONTINUE is for nothing else, and maps the page if that has it. If it
// has not, the page is brought to where the region lies now, where it is right in any case. A file shows it
// here, too, and otherwise the next fault finds that nothing is to be had.
Session::Served Session::serve_left_behind(Pending& pending, const Segment& segment) {
  const AddressRange page{pending.page, kPage4K.bytes()};
  const auto settle = [&](bool is_file) {
    if (auto settled = state_.settle(pending.page, is_file); !settled) fail(settled.error().message());
  };
  switch (uffd_.resume(page).stop) {
    case Stop::complete:
      settle(/*is_file=*/true);
      return Served::done;
    case Stop::changing:
    case Stop::no_memory:
      return put_off(pending);
    case Stop::gone:
      finish(SessionEnd::gone);
      return Served::done;
    case Stop::invalid:
      settle(/*is_file=*/false);
      return serve_outside(pending, kPage4K);
    case Stop::bad_memory:
      break;
    default:
      wake(page);
      return Served::done;
  }
  const PageIndex wanted = segment.granule_at(pending.page);
  PageTable& table = state_.table(segment.region);
  if (table.get(wanted) == PageState::poisoned) return serve_poison(pending, segment, wanted);
  if (table.get(wanted) != PageState::absent && table.get(wanted) != PageState::fetching)
    return serve_outside(pending, kPage4K);
  const Segment* live = state_.layout().find(segment.region, wanted);
  // Nobody can tell any more; a private mapping of a file is empty here.
  if (live == nullptr) return serve_outside(pending, kPage4K);
  if (pending.in_vain) {
    // Only what was mapped a second time, and so is shared, can lie elsewhere without a word.
    settle(/*is_file=*/true);
    return put_off(pending);
  }
  const FaultPlan plan = plan_fault(table, *live, wanted, options_.fault_around, lost(*live));
  Served served = Served::fetching;
  if (plan.action == FaultPlan::Action::read) {
    served = serve_read(pending, *live, plan.granules, wanted);
  } else {
    const auto brings = std::find_if(fetches_.begin(), fetches_.end(), [&](const UnderWay& fetch) {
      return fetch.region == segment.region && is_current(fetch) && fetch.granules.contains(wanted);
    });
    if (brings == fetches_.end()) table.set(wanted, PageState::absent);
    if (brings == fetches_.end()) return put_off(pending);
    pending.fetch = brings->id;
  }
  if (served != Served::done || end_) return served;
  // What could not be put there is not mapped there any more.
  if (!is_brought(*live, {wanted, kOneGranule}) || uffd_.resume(page).stop == Stop::complete)
    settle(/*is_file=*/true);
  wake(page);
  return Served::done;
}

std::optional<bool> Session::has_grown_over(Address page) {
  const Segment* before = state_.layout().last_before(page);
  if (before == nullptr || before->region == kZeroRegion || before->page_size != kPage4K ||
      sharing_of(*before) != SharingMode::none)
    return false;
  const PageIndex granule = before->granules().end() + kPage4K.pages(page - before->memory.end());
  if (granule.value >= kPage4K.pages(state_.regions()[before->region].length).value) return false;
  // One mapping has its last page and this one, and is a file's: see serve_left_behind().
  const Address last(before->memory.end().value - kPage4K.bytes().value);
  const Stop stop = uffd_.resume({last, page + kPage4K.bytes() - last}, Wake::no).stop;
  if (stop == Stop::changing) return std::nullopt;
  if (stop != Stop::complete && stop != Stop::cut_short && stop != Stop::present && stop != Stop::bad_memory)
    return false;
  const std::optional<AddressRange> mapping = mapping_of({last, kPage4K.bytes()}, kPage4K);
  if (!mapping) return std::nullopt;
  const Address end = std::max(mapping->end(), page + kPage4K.bytes());
  if (auto grown = state_.grow(*before, end); !grown) fail(grown.error().message());
  return true;
}

[[gnu::hot]] Session::Served Session::served_by(Put put, Pending& pending, const Segment& segment,
                                                PageIndex wanted) {
  switch (put) {
    case Put::done:
      return Served::done;
    case Put::no_memory:
      if (pending.attempts >= kNoMemoryAttemptsMax) {
        host_.page_failed(no_memory_for(pending.page));
        return serve_poison(pending, segment, wanted);
      }
      return put_off(pending, /*no_memory=*/true);
    case Put::put_off:
      return put_off(pending);
    case Put::failed:
      if (is_brought(segment, {wanted, granules_per_page(segment)})) return Served::done;
      host_.page_failed(Error(fmt::format("the page at {:#x} cannot be filled", pending.page.value)));
      return serve_poison(pending, segment, wanted);
    case Put::gone:
      finish(SessionEnd::gone);
      return Served::done;
  }
  return Served::done;
}

void Session::hold_back() {
  changing_until_ns_ = host_.now_ns() + kPutOffFirstNs;
}

Session::Served Session::put_off(Pending& pending, bool no_memory) {
  pending.no_memory = no_memory;
  add(counters_->retries);
  pending.not_before_ns = host_.now_ns() + put_off_ns(pending.attempts++);
  return Served::put_off;
}

// ---- pages into place -------------------------------------------------------------------------------------

[[gnu::hot]] StoreOffset Session::offset_of(const Segment& segment, PageIndex granule) const {
  return state_.regions()[segment.region].offset + kPage4K.bytes(PageCount(granule.value));
}

[[gnu::always_inline]] inline Outcome Session::put_once(const Segment& segment, PageRange run,
                                                        const Contents& contents) const {
  const AddressRange memory{segment.address_of(run.first), kPage4K.bytes(run.count)};
  switch (contents.kind) {
    case Contents::Kind::zeros:
      return zero_once(memory.start, segment.page_size, run.count);
    case Contents::Kind::bytes:
      return uffd_.copy(memory.start, contents.bytes.first(memory.length.value));
    case Contents::Kind::shared:
      break;
  }
  return uffd_.resume(memory);
}

Outcome Session::zero_once(Address to, PageSize page_size, PageCount granules) const {
  const std::span<const std::byte> zeros = std::span(zero_huge_page).first(page_size.bytes().value);
  // The kernel has no zero page of other sizes.
  if (page_size != kPage4K) return uffd_.copy(to, zeros);
  const Outcome zeroed = uffd_.zero({to, kPage4K.bytes(granules)});
  if (zeroed.stop != Stop::present) return zeroed;
  // On anonymous memory a page which is not there but write-protected also counts as present for a zero page;
  // not for a copied one.
  Outcome copied = uffd_.copy(to, zeros);
  if (copied.stop == Stop::complete && granules > kOneGranule) copied.stop = Stop::cut_short;
  return copied;
}

bool Session::is_brought(const Segment& segment, PageRange run) {
  const PageTable& table = state_.table(segment.region);
  for (PageIndex granule = run.first; granule < run.end(); granule = granule + kOneGranule)
    if (table.get(granule) != PageState::installed && table.get(granule) != PageState::zeroed) return false;
  return true;
}

[[gnu::hot]] void Session::mark_brought(const Segment& segment, PageRange run) {
  state_.table(segment.region).change(run, [](PageState state) {
    return reads_as_zero(state) ? PageState::zeroed : PageState::installed;
  });
}

[[gnu::hot]] Session::Put Session::put(const Segment& segment, PageRange run, Contents contents) {
  const PageCount page = granules_per_page(segment);
  std::atomic<std::uint64_t>& counter = contents.kind == Contents::Kind::zeros    ? counters_->pages_zeroed
                                        : contents.kind == Contents::Kind::shared ? counters_->pages_shared
                                                                                  : counters_->pages_copied;
  bool one_by_one = contents.kind == Contents::Kind::zeros && page > kOneGranule;
  Put result = Put::done;
  // Readers of a page that cannot be there try again, and hear from the kernel what is wrong.
  const auto pass_by = [&](PageRange pages) {
    wake({segment.address_of(pages.first), segment.page_size.bytes()});
    state_.table(segment.region).change(pages, [](PageState state) {
      return state == PageState::fetching ? PageState::absent : state;
    });
  };
  while (run.count.value > 0) {
    const PageRange now{run.first, one_by_one ? page : run.count};
    const Outcome outcome = put_once(segment, now, contents);
    PageCount passed = kPage4K.pages(outcome.done);
    mark_brought(segment, {run.first, passed});
    add(counter, passed.value);

    switch (outcome.stop) {
      case Stop::complete:
      case Stop::cut_short:  // the next round hears why
        break;
      case Stop::present:
        // Whoever was parked on it was not woken by that. If it is not there after all, it will fault again.
        wake({segment.address_of(run.first), segment.page_size.bytes()});
        passed = page;
        if (segment.page_size == kPage4K) {
          mark_brought(segment, {run.first, page});
          break;
        }
        // A huge page is also said to be present when the pool is empty (6.18). One that was brought is
        // there: this is a late reader's fault. Another may be there, or the pool has been filled since: it
        // is not taken for brought, so that its readers, if there are any again, do not get zeros.
        if (is_brought(segment, {run.first, page})) break;
        if (spare_huge_pages(segment.page_size) == 0) return Put::no_memory;
        pass_by({run.first, page});
        break;
      case Stop::not_ready:
        // Unmapped meanwhile, or the run crosses from one mapping into the next: page by page it does not
        // matter.
        if (!one_by_one && run.count > page) {
          one_by_one = true;
          break;
        }
        pass_by({run.first, page});
        passed = page;
        break;
      case Stop::bad_memory:
        // Beyond the end of the client's file: the kernel itself answers that access with SIGBUS.
        if (!one_by_one && run.count > page) {
          one_by_one = true;
          break;
        }
        // Or the image's memory has lost the page, which its next fault brings again.
        if (contents.kind == Contents::Kind::shared)
          serving_[segment.region].shared->look_again(image_pages(segment, run).first);
        pass_by({run.first, page});
        passed = page;
        break;
      case Stop::changing:
        hold_back();
        return Put::put_off;
      case Stop::no_memory:
        return Put::no_memory;
      case Stop::gone:
        return Put::gone;
      default:
        if (!one_by_one && run.count > page) {
          one_by_one = true;
          break;
        }
        host_.warn(fmt::format("fill the page at {:#x}: {}", segment.address_of(run.first).value,
                               to_string(outcome.stop)));
        result = Put::failed;
        passed = page;
    }
    run = {run.first + passed, run.count - passed};
    if (contents.kind == Contents::Kind::bytes)
      contents.bytes = contents.bytes.subspan(kPage4K.bytes(passed).value);
  }
  return result;
}

[[gnu::hot]] Session::Put Session::install_part(const Segment& segment, PageRange part,
                                                std::span<std::byte> bytes, std::optional<PageIndex> wanted) {
  const std::size_t granule_bytes = kPage4K.bytes().value;
  const auto bytes_of = [&](PageRange run) {
    return bytes.subspan(kPage4K.bytes(run.first - part.first).value, kPage4K.bytes(run.count).value);
  };
  // Part of a huge page may have been removed while the rest was not.
  const PageTable& table = state_.table(segment.region);
  for (PageIndex granule = part.first; granule < part.end(); granule = granule + kOneGranule)
    if (reads_as_zero(table.get(granule)))
      std::memset(bytes_of({granule, kOneGranule}).data(), 0, granule_bytes);

  const PageCount page = granules_per_page(segment);
  const auto page_at = [&](std::size_t index) {
    return PageRange{part.first + PageCount(index * page.value), page};
  };
  const auto put_pages = [&](PageRange run, bool zero) {
    if (zero) return put(segment, run, {});
    return put(segment, run, {.kind = Contents::Kind::bytes, .bytes = bytes_of(run)});
  };
  if (part.count == page) return put_pages(part, is_zero(bytes_of(part)));
  const std::size_t pages = part.count.value / page.value;
  std::bitset<kFetchGranulesMax> zero;
  for (std::size_t index = 0; index < pages; ++index) zero[index] = is_zero(bytes_of(page_at(index)));

  // Runs of pages that are all zero, or none of them is.
  const auto run_end = [&](std::size_t first) {
    std::size_t end = first + 1;
    while (end < pages && zero[end] == zero[first]) ++end;
    return end;
  };
  const auto put_run = [&](std::size_t first, std::size_t end) {
    return put_pages({page_at(first).first, PageCount((end - first) * page.value)}, zero[first]);
  };

  std::size_t wanted_first = pages;
  Put result = Put::done;
  if (wanted && part.contains(*wanted)) {
    wanted_first = (*wanted - part.first).value / page.value;
    while (wanted_first > 0 && zero[wanted_first - 1] == zero[wanted_first]) --wanted_first;
    result = put_run(wanted_first, run_end(wanted_first));
    if (result != Put::done && result != Put::failed) return result;
  }
  for (std::size_t first = 0; first < pages; first = run_end(first)) {
    if (first == wanted_first) continue;
    const Put put = put_run(first, run_end(first));
    if (put == Put::gone) return put;
    // What came uncalled for may be missing; a page that is wanted is put off by its own fault.
    if (put != Put::done && !wanted) result = put;
  }
  return result;
}

bool Session::poison(const Segment& segment, PageIndex granule) {
  const PageRange page = page_of(segment, granule);
  const AddressRange memory{segment.address_of(page.first), segment.page_size.bytes()};
  state_.table(segment.region).set(page, PageState::poisoned);
  const Outcome outcome = uffd_.poison(memory);
  switch (outcome.stop) {
    case Stop::complete:
      add(counters_->pages_poisoned, page.count.value);
      return true;
    case Stop::changing:
    case Stop::no_memory:
      return false;
    case Stop::present:
    case Stop::not_ready:
    case Stop::bad_memory:
      wake(memory);
      return true;
    case Stop::gone:
      finish(SessionEnd::gone);
      return true;
    default:
      fail(fmt::format("the page at {:#x} cannot be read, and this kernel cannot poison it ({})",
                       memory.start.value, to_string(outcome.stop)));
      return true;
  }
}

Session::Served Session::serve_poison(Pending& pending, const Segment& segment, PageIndex wanted) {
  return poison(segment, wanted) ? Served::done : put_off(pending);
}

}  // namespace uffdkit
