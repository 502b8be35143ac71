// Write protection and fork(2): wp-fork, wp-fork-with-event, and both with pinned pages.
#include <optional>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

enum class Event : bool { no, yes };

// Forks a child and tells whether the page is armed in it. The child pins it first if `pin` says so.
bool is_armed_in_child(Case& test, const Uffd& uffd, const Area& area, Event event, bool pin = false) {
  const AddressRange page = area.page(0);
  const auto child = test.machine().fork(uffd, area.range(), [page, pin](Thread& self) {
    if (pin) self.pin(page);
    return self.is_armed(page.start) ? 1 : 0;
  });
  std::optional<Uffd> child_uffd;
  if (event == Event::yes) child_uffd.emplace(test.take_child(uffd));
  child->join();
  const int answer = child->result();
  EXPECT_TRUE(answer == 0 || answer == 1) << answer;
  EXPECT_FALSE(uffd.wait_readable(0).value()) << "no message but that of the fork";
  return answer == 1;
}

Uffd armed_page(Case& test, const Area& area, Event event) {
  Uffd uffd = test.uffd(abi::kFeaturePagefaultFlagWp | abi::kFeatureWpHugetlbfsShmem |
                        (event == Event::yes ? abi::kFeatureEventFork : 0));
  EXPECT_TRUE(uffd.register_range(area.range(), kWriteProtect));
  EXPECT_TRUE(test.here().write(area.start, std::byte{1}));
  EXPECT_EQ(uffd.protect(area.page(0)).stop, Stop::complete);
  EXPECT_TRUE(test.here().is_armed(area.start));
  return uffd;
}

void check_fork(Case& test, Event event) {
  const Area area = test.area();
  const AddressRange page = area.page(0);
  Thread& self = test.here();
  const Uffd uffd = armed_page(test, area, event);
  EXPECT_EQ(is_armed_in_child(test, uffd, area, event), event == Event::yes);

  // The same without the page: shared memory is unmapped, private memory swapped out where there is swap.
  if (is_shared(area.type)) {
    ASSERT_EQ(self.advise(page, Advice::dont_need), 0);
  } else {
    self.advise(page, Advice::page_out);
  }
  EXPECT_TRUE(self.is_armed(page.start));
  EXPECT_EQ(is_armed_in_child(test, uffd, area, event), event == Event::yes);

  EXPECT_EQ(uffd.unprotect(page).stop, Stop::complete);
  EXPECT_FALSE(self.is_armed(page.start));
  EXPECT_EQ(self.read(page.start), std::byte{1});
  EXPECT_FALSE(self.is_armed(page.start));
}

void check_fork_of_pinned(Case& test, Event event) {
  const Area area = test.area();
  const Uffd uffd = armed_page(test, area, event);
  test.here().pin(area.page(0));  // a private page that is pinned is copied by the fork itself
  EXPECT_EQ(is_armed_in_child(test, uffd, area, event), event == Event::yes);
  test.here().unpin();
  // A private page that the child pins stops being shared with its parent.
  EXPECT_EQ(is_armed_in_child(test, uffd, area, event, true), event == Event::yes);
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
