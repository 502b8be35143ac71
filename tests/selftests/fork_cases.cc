// Write protection and fork(2): wp-fork, wp-fork-with-event, and both with pinned pages.
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#include <optional>

#include "selftests/case.h"
#include "selftests/child.h"

namespace uffdkit::selftests {
namespace {

enum class Event : bool { no, yes };

// A page pinned for long and for reading, as a device would. CONFIG_GUP_TEST has a file for that.
// Source: mm/gup_test.h.
class Pin {
 public:
  explicit Pin(AddressRange range) : file_(open("/sys/kernel/debug/gup_test", O_RDWR | O_CLOEXEC)) {
    struct {
      std::uint64_t address, bytes;
      std::uint32_t flags;
    } args = {range.start.value, range.length.value, 0};
    constexpr unsigned long kStart = _IOW('g', 7, decltype(args));
    if (!file_ || ioctl(file_.get(), kStart, &args) != 0)
      throw Lacking("needs CONFIG_GUP_TEST, and root to use /sys/kernel/debug/gup_test");
  }

 private:
  UniqueFd file_;  // closing it unpins
};

// Forks a child and tells whether the page is armed in it. The child pins it first if `pin` says so.
bool is_armed_in_child(const Uffd& uffd, const Area& area, Event event, bool pin = false) {
  const AddressRange page = area.page(0);
  ForkedChild child(uffd, area.range(), [page, pin] {
    std::optional<Pin> pinned;
    if (pin) pinned.emplace(page);
    return is_armed(page.start) ? 1 : 0;
  });
  std::optional<Uffd> child_uffd;
  if (event == Event::yes) child_uffd.emplace(take_child(uffd));
  const int answer = child.wait();
  EXPECT_TRUE(answer == 0 || answer == 1) << answer;
  EXPECT_FALSE(uffd.wait_readable(0).value()) << "no message but that of the fork";
  return answer == 1;
}

Uffd armed_page(Case& test, const Area& area, Event event) {
  Uffd uffd = test.uffd(abi::kFeaturePagefaultFlagWp | abi::kFeatureWpHugetlbfsShmem |
                        (event == Event::yes ? abi::kFeatureEventFork : 0));
  EXPECT_TRUE(uffd.register_range(area.range(), kWriteProtect));
  *area.data() = std::byte{1};
  EXPECT_EQ(uffd.protect(area.page(0)).stop, Stop::complete);
  EXPECT_TRUE(is_armed(area.page(0).start));
  return uffd;
}

void check_fork(Case& test, Event event) {
  const Area area = test.area();
  const AddressRange page = area.page(0);
  const Uffd uffd = armed_page(test, area, event);
  EXPECT_EQ(is_armed_in_child(uffd, area, event), event == Event::yes);

  // The same without the page: shared memory is unmapped, private memory swapped out where there is swap.
  if (is_shared(area.type())) {
    ASSERT_EQ(madvise(area.data(), page.length.value, MADV_DONTNEED), 0);
  } else {
    madvise(area.data(), page.length.value, MADV_PAGEOUT);
  }
  EXPECT_TRUE(is_armed(page.start));
  EXPECT_EQ(is_armed_in_child(uffd, area, event), event == Event::yes);

  EXPECT_EQ(uffd.unprotect(page).stop, Stop::complete);
  EXPECT_FALSE(is_armed(page.start));
  EXPECT_EQ(*area.data(), std::byte{1});
  EXPECT_FALSE(is_armed(page.start));
}

void check_fork_of_pinned(Case& test, Event event) {
  const Area area = test.area();
  const Uffd uffd = armed_page(test, area, event);
  {
    const Pin pin(area.page(0));  // a private page that is pinned is copied by the fork itself
    EXPECT_EQ(is_armed_in_child(uffd, area, event), event == Event::yes);
  }
  // A private page that the child pins stops being shared with its parent.
  EXPECT_EQ(is_armed_in_child(uffd, area, event, true), event == Event::yes);
}

}  // namespace

KERNEL_CASE(wp_fork, kAllTypes) {
  check_fork(test, Event::no);
}

KERNEL_CASE(wp_fork_with_event, kAllTypes) {
  check_fork(test, Event::yes);
}

KERNEL_CASE(wp_fork_pin, kAllTypes) {
  check_fork_of_pinned(test, Event::no);
}

KERNEL_CASE(wp_fork_pin_with_event, kAllTypes) {
  check_fork_of_pinned(test, Event::yes);
}

}  // namespace uffdkit::selftests
