// A child whose memory its parent serves while it forks off, moves and gives back that memory: events,
// events-wp.
#include <variant>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

// Where the child says that it found something wrong.
enum Step : int { kAllRight, kReadBefore, kRemap, kReadAfter, kWrite, kRelease, kZeros };

// The child: reads half of the area, moves all of it to `to`, reads the rest, and gives it back. Where pages
// arrive armed it also writes each after the move.
Step move_and_release(Thread& self, const Area& area, Address to, bool armed) {
  const ByteCount bytes = area.page_bytes;
  const std::size_t half = area.pages / 2;
  for (std::size_t page = 0; page < half; ++page)
    if (!has_contents(self, area.at(page), page, bytes)) return kReadBefore;
  if (self.remap(area.range(), to) != 0) return kRemap;
  for (std::size_t page = 0; page < area.pages; ++page) {
    const Address at = to + ByteCount(page * bytes.value);
    if (!has_contents(self, at, page, bytes)) return kReadAfter;
    if (armed && (!self.write(at, std::byte{0xff}) || self.read(at) != std::byte{0xff})) return kWrite;
  }
  const AddressRange moved = {to, area.range().length};
  if (self.advise(moved, is_shared(area.type) ? Advice::remove : Advice::dont_need) != 0) return kRelease;
  return is_zero(self, to, moved.length) ? kAllRight : kZeros;
}

// What the monitor heard of the child.
struct Heard {
  std::size_t missing = 0, protect = 0, remaps = 0, removes = 0;
};

// Serves the child's memory, wherever that is.
class Monitor {
 public:
  Monitor(const Uffd& uffd, const Area& area, Protect protect)
      : uffd_(uffd), area_(area), protect_(protect), start_(area.start) {}

  const Heard& heard() const { return heard_; }

  void operator()(const Fault& fault) {
    const std::size_t page = (fault.address - start_).value / area_.page_bytes.value;
    const AddressRange range = {start_ + ByteCount(page * area_.page_bytes.value), area_.page_bytes};
    const bool is_missing = fault.kind == Fault::Kind::missing;
    ++(is_missing ? heard_.missing : heard_.protect);
    const Outcome outcome = is_missing
                                ? uffd_.copy(range.start, contents(page, range.length), Wake::yes, protect_)
                                : uffd_.unprotect(range);
    EXPECT_EQ(outcome.stop, Stop::complete) << to_string(outcome.stop);
  }
  void operator()(const RemapEvent& event) {
    ++heard_.remaps;
    EXPECT_EQ(event.from, area_.range());
    start_ = event.to;
  }
  void operator()(const RemoveEvent& event) {
    ++heard_.removes;
    EXPECT_EQ(event.range, (AddressRange{start_, area_.range().length}));
    EXPECT_TRUE(uffd_.unregister_range(event.range));
  }
  void operator()(const auto&) { ADD_FAILURE() << "a message that nobody caused"; }

 private:
  const Uffd& uffd_;
  const Area& area_;
  Protect protect_;
  Address start_;
  Heard heard_;
};

void check_events(Case& test, Protect protect) {
  const bool armed = protect == Protect::yes;
  const Uffd uffd = test.uffd(abi::kFeatureEventFork | abi::kFeatureEventRemap | abi::kFeatureEventRemove |
                              (armed ? abi::kFeatureWpHugetlbfsShmem : 0));
  const Area area = test.area();
  const Address to = test.machine().place(area.range().length);
  ASSERT_TRUE(uffd.register_range(area.range(), armed ? kMissing | kWriteProtect : kMissing));

  auto child = test.machine().fork(uffd, area.range(),
                                   [&](Thread& self) { return move_and_release(self, area, to, armed); });
  const Uffd child_uffd = test.take_child(uffd);
  Monitor monitor(child_uffd, area, protect);
  serve(child_uffd, child, [&](const Message& message) { std::visit(monitor, message); });
  child->join();
  EXPECT_EQ(child->result(), kAllRight);
  EXPECT_EQ(monitor.heard().missing, area.pages);
  EXPECT_EQ(monitor.heard().protect, armed ? area.pages : 0);
  EXPECT_EQ(monitor.heard().remaps, 1u);
  EXPECT_EQ(monitor.heard().removes, 1u);
  EXPECT_FALSE(uffd.wait_readable(0).value()) << "the child's faults go to the child's descriptor";
}

}  // namespace

KERNEL_CASE(events, kAllTypes) {
  check_events(test, Protect::no);
}

KERNEL_CASE(events_wp, kAllTypes) {
  check_events(test, Protect::yes);
}

}  // namespace uffdkit::selftests
