// Ends of a session: its client is complete, is gone, has released it, or cannot be served any more. Nobody
// may be left asleep by any of them.
#include "engine/session.h"

#include <algorithm>
#include <utility>

#include "engine/condemned_child.h"
#include "engine/session_detail.h"

namespace uffdkit {
namespace {

// How long an end is tried whose client still changes its address space: no more of these changes come when
// all is unregistered, unless the client registers memory of its own.
constexpr std::int64_t kEndingMaxNs = 10'000'000'000;
// How long a client that was killed is waited for: one that a debugger or a device holds may take for ever.
constexpr std::int64_t kExitMaxNs = 10'000'000'000;
// How often its process is looked at. The engine hears of its exit and looks then, unless it has heard
// before.
constexpr std::int64_t kExitCheckNs = 20'000'000;

// Whether a page in this state would be zeros, or old bytes, if nobody served it any more.
bool is_missing(PageState state, bool shares) {
  return state == PageState::absent || state == PageState::fetching ||
         (shares && state == PageState::removed);
}

}  // namespace

using namespace session;

void Session::begin_detach(Unreadable unreadable) {
  if (detaching_ || failing_ != Failing::no) return;
  // Nobody would be there to say that it may go on.
  unpause();
  unreadable_ = unreadable;
  detaching_ = true;
  populate_from_ = Address(0);
  populate_again_ = false;
}

void Session::release() {
  if (end_ || failing_ != Failing::no) return;
  if (sharing() == SharingMode::none) return begin_end(SessionEnd::released);
  detaching_ = false;
  begin_detach(Unreadable::poison);
  releasing_ = true;
}

void Session::check_target() {
  if (end_) return;
  if (waits_for_exit()) {
    look_for_exit_at_ns_ = 0;
    return end_failed();
  }
  if (!uffd_.target_alive()) finish(SessionEnd::gone);
}

// mremap(2) can make a mapping longer, and tells nobody; the new part is registered like the rest. Whether
// one mapping covers a range is what UFFDIO_CONTINUE looks for first; where it does, nothing is mapped but
// what is in the page cache already.
std::optional<AddressRange> Session::mapping_of(AddressRange pages, PageSize page_size) const {
  const auto covers = [&](Address start, Address end) -> std::optional<bool> {
    const Outcome outcome = uffd_.resume({start, end - start}, Wake::no);
    if (outcome.stop == Stop::changing) return std::nullopt;
    return outcome.stop != Stop::not_ready && outcome.stop != Stop::gone;
  };
  // No mapping is as long as this; what says otherwise has no such call (before 5.13), or is a 32-bit
  // process.
  const Stop asked = uffd_.resume(kAllAddresses, Wake::no).stop;
  if (asked == Stop::changing) return std::nullopt;
  if (asked != Stop::not_ready) return pages;
  AddressRange mapping = pages;
  const Address last(pages.end().value - page_size.bytes().value);
  const auto grows_by = [&](std::uint64_t step) -> std::optional<bool> {
    if (step > (kStateAddressEnd - mapping.end()).value) return false;
    const std::optional<bool> covered = covers(last, mapping.end() + ByteCount(step));
    if (covered == true) mapping.length = mapping.length + ByteCount(step);
    return covered;
  };
  std::uint64_t step = page_size.bytes().value;
  while (true) {
    const std::optional<bool> grows = grows_by(step);
    if (!grows) return std::nullopt;
    if (!*grows) break;
    step *= 2;
  }
  for (step /= 2; step >= page_size.bytes().value; step /= 2)
    if (!grows_by(step)) return std::nullopt;
  return mapping;
}

void Session::unregister_with_growth(AddressRange memory, PageSize page_size) {
  const std::optional<AddressRange> mapping = mapping_of(memory, page_size);
  // A piece may be unmapped already, and the whole process may be gone: either way nothing is left to
  // unregister.
  if (mapping) return unregister_what_is_mapped(*mapping);
  const ByteCount rest = memory.length - page_size.bytes();
  if (rest.value > 0) (void)uffd_.unregister_range({memory.start, rest});
  ends_.push_back({{memory.start + rest, page_size.bytes()}, page_size});
}

// How long a second mapping of a file is nobody has told. Where something follows it that cannot be
// registered, all of the range is refused.
void Session::unregister_what_is_mapped(AddressRange memory) {
  if (uffd_.unregister_range(memory)) return;
  const AddressRange first{memory.start, kPage4K.bytes()};
  if (const auto mapping = mapping_of(first, kPage4K))
    (void)uffd_.unregister_range(*mapping);
  else
    ends_.push_back({first, kPage4K});
}

void Session::unregister_all() {
  const std::span<const Segment> segments = state_.layout().segments();
  for (std::size_t i = 0; i < segments.size(); ++i) {
    const AddressRange memory = segments[i].memory;
    if (i + 1 < segments.size() && segments[i + 1].memory.start == memory.end())
      unregister_what_is_mapped(memory);
    else
      unregister_with_growth(memory, segments[i].page_size);
  }
  // Threads wait outside of all segments, too (see wake_all()).
  for (const Pending& pending : pending_)
    if (state_.layout().find(pending.page) == nullptr)
      unregister_with_growth({pending.page, kPage4K.bytes()}, kPage4K);
}

void Session::begin_end(SessionEnd end) {
  if (ending_) return;
  ending_ = end;
  ending_since_ns_ = host_.now_ns();
  unregister_all();
  pending_.clear();
}

void Session::finish_ending() {
  if (!ending_) return;
  const bool is_late = host_.now_ns() - ending_since_ns_ >= kEndingMaxNs;
  // A thread may have begun to change its memory before that was unregistered: its event is still to be read,
  // or the thread would sleep until the last descriptor is closed.
  if (is_changing() && !is_late) return;
  if (!ends_.empty()) {
    for (const auto& [memory, page_size] : std::exchange(ends_, {}))
      unregister_with_growth(memory, page_size);
    // And before these were.
    if (!is_late && (!ends_.empty() || is_changing())) return;
    for (const auto& [memory, page_size] : std::exchange(ends_, {})) (void)uffd_.unregister_range(memory);
  }
  // Unregistering wakes nobody where nothing is mapped any more, and not every client tells of that.
  wake_all();
  finish(*ending_);
}

void Session::fail(const std::string& why) {
  if (end_ || failing_ != Failing::no) return;
  const bool killed = host_.kill_client();
  host_.warn(why + (killed ? "; the client is killed, so that it reads no wrong bytes"
                           : "; what the client has not got answers with SIGBUS"));
  unpause();
  detaching_ = false;
  failing_ = Failing::killed;
  failed_since_ns_ = host_.now_ns();
  // What else was read with what has failed is still to be applied.
  look_for_exit_at_ns_ = killed ? failed_since_ns_ + kExitCheckNs : failed_since_ns_;
}

void Session::end_failed() {
  const std::int64_t now = host_.now_ns();
  if (now < look_for_exit_at_ns_) return;
  // Closing the descriptor of memory that is there would turn what is missing into zeros.
  if (!uffd_.target_alive()) return finish(SessionEnd::failed);
  const bool is_late = now - failed_since_ns_ >= kExitMaxNs;
  if (!host_.client_has_exited() && !is_late) {
    look_for_exit_at_ns_ = now + kExitCheckNs;
    return;
  }
  failing_ = Failing::condemned;
  for (const Segment& segment : state_.layout().segments()) {
    if (segment.region == kZeroRegion) continue;
    // Where the image is shared, what was given back would be the image again.
    const bool shares = sharing_of(segment) != SharingMode::none;
    state_.table(segment.region).change(segment.granules(), [&](PageState state) {
      return is_missing(state, shares) ? PageState::poisoned : state;
    });
  }
  unreadable_ = Unreadable::poison;
  detaching_ = true;
  populate_from_ = Address(0);
  populate_again_ = false;
  // Of those whose answer has failed nobody knows any more.
  wake_all();
}

// Before the fork counts as applied: cut off in the middle, it is adopted and condemned again, or served.
void Session::condemn_child(Uffd child, Error why) {
  std::vector<MissingPages> missing;
  for (const Segment& segment : state_.layout().segments()) {
    if (segment.region == kZeroRegion) continue;
    // Where the image is shared, what was given back would be the image again.
    const bool shares = sharing_of(segment) != SharingMode::none;
    const PageTable& table = state_.table(segment.region);
    const PageIndex end = segment.granules().end();
    for (PageIndex at = segment.first; at < end;) {
      const PageState state = table.get(at);
      const PageIndex run = at;
      at = table.end_of_run(run + kOneGranule, end, state);
      if (!is_missing(state, shares) && state != PageState::poisoned) continue;
      // A page is missing as a whole.
      const PageIndex first = page_of(segment, run).first;
      at = page_of(segment, PageIndex(at.value - 1)).end();
      const AddressRange memory{segment.address_of(first), kPage4K.bytes(at - first)};
      if (!missing.empty() && missing.back().memory.end() == memory.start &&
          missing.back().page_size == segment.page_size)
        missing.back().memory.length = missing.back().memory.length + memory.length;
      else
        missing.push_back({memory, segment.page_size});
    }
  }
  const bool condemned = uffdkit::condemn_child(std::move(child), std::move(missing));
  host_.warn(std::move(why)
                 .within(condemned
                             ? "a child of fork cannot be served: what it has not got answers with SIGBUS"
                             : "a child of fork cannot be served, and waits for ever for what is missing")
                 .text());
}

void Session::finish(SessionEnd end) {
  if (end_) return;
  // Whoever serves it next stops it again if need be; a native client has to run to find them.
  if (stopped_ && end != SessionEnd::failed) host_.continue_client();
  end_ = end == SessionEnd::gone && failing_ != Failing::no ? SessionEnd::failed : end;
  pending_.clear();
}

}  // namespace uffdkit
