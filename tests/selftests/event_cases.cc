// A child whose memory its parent serves while it forks off, moves and gives back that memory: events,
// events-wp.
#include <sys/mman.h>

#include <variant>

#include "selftests/case.h"
#include "selftests/child.h"

namespace uffdkit::selftests {
namespace {

using test::Mapping;

// Where the child says that it found something wrong.
enum Step : int { kAllRight, kReadBefore, kRemap, kReadAfter, kWrite, kRelease, kZeros };

// The child: reads half of the area, moves all of it to `to`, reads the rest, and gives it back. Where pages
// arrive armed it also writes each after the move.
Step move_and_release(const Area& area, std::byte* to, bool armed) {
  const ByteCount bytes = area.page_bytes();
  const std::size_t half = area.pages() / 2;
  for (std::size_t page = 0; page < half; ++page)
    if (!has_contents(area.data(page), page, bytes)) return kReadBefore;
  const std::size_t length = area.range().length.value;
  if (mremap(area.data(), length, length, MREMAP_MAYMOVE | MREMAP_FIXED, to) != to) return kRemap;
  for (std::size_t page = 0; page < area.pages(); ++page) {
    std::byte* data = to + page * bytes.value;
    if (!has_contents(data, page, bytes)) return kReadAfter;
    if (!armed) continue;
    *static_cast<volatile std::byte*>(data) = std::byte{0xff};
    if (*data != std::byte{0xff}) return kWrite;
  }
  if (madvise(to, length, is_shared(area.type()) ? MADV_REMOVE : MADV_DONTNEED) != 0) return kRelease;
  return is_zero(to, ByteCount(length)) ? kAllRight : kZeros;
}

// What the monitor heard of the child.
struct Heard {
  std::size_t missing = 0, protect = 0, remaps = 0, removes = 0;
};

// Serves the child's memory, wherever that is.
class Monitor {
 public:
  Monitor(const Uffd& uffd, const Area& area, Protect protect)
      : uffd_(uffd), area_(area), protect_(protect), start_(area.range().start) {}

  const Heard& heard() const { return heard_; }

  void operator()(const Fault& fault) {
    const std::size_t page = (fault.address - start_).value / area_.page_bytes().value;
    const AddressRange range = {start_ + ByteCount(page * area_.page_bytes().value), area_.page_bytes()};
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
  const std::size_t length = area.range().length.value;
  const Mapping space =
      Mapping::map(nullptr, length + test::HugePages::kBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1);
  const std::uint64_t aligned = kPage2M.round_down(space.range().start.value + kPage2M.bytes().value - 1);
  auto* to = reinterpret_cast<std::byte*>(aligned);
  ASSERT_TRUE(uffd.register_range(area.range(), armed ? kMissing | kWriteProtect : kMissing));

  ForkedChild child(uffd, area.range(), [&] { return move_and_release(area, to, armed); });
  const Uffd child_uffd = take_child(uffd);
  Monitor monitor(child_uffd, area, protect);
  serve(child_uffd, child.waiter(), [&](const Message& message) { std::visit(monitor, message); });
  EXPECT_EQ(child.wait(), kAllRight);
  EXPECT_EQ(monitor.heard().missing, area.pages());
  EXPECT_EQ(monitor.heard().protect, armed ? area.pages() : 0);
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
