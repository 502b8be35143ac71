// FEATURE_SIGBUS, where no fault is told by a message: sigbus, sigbus-wp.
#include <signal.h>
#include <unistd.h>

#include <cstdint>

#include "selftests/case.h"
#include "selftests/child.h"

namespace uffdkit::selftests {
namespace {

// What the signal handler works on. One test at a time runs in a process.
struct Handled {
  const Uffd* uffd = nullptr;
  const Area* area = nullptr;
  Protect protect = Protect::no;
  std::vector<std::vector<std::byte>> contents;
  std::vector<std::size_t> signals;  // of each page
};
Handled handled;

// Does what a handler of messages would: fills the page the first time, disarms it the second.
void on_sigbus(int, siginfo_t* info, void*) {
  const Address address(reinterpret_cast<std::uintptr_t>(info->si_addr));
  if (!handled.area->range().contains(address)) _exit(98);
  const std::size_t page = handled.area->page_of(address);
  const AddressRange range = handled.area->page(page);
  const bool filled = handled.signals[page]++ > 0;
  const Outcome outcome =
      filled ? handled.uffd->unprotect(range)
             : handled.uffd->copy(range.start, handled.contents[page], Wake::yes, handled.protect);
  if (outcome.stop != Stop::complete) _exit(97);
}

// SIGBUS goes to on_sigbus while it lives.
class SigbusHandled {
 public:
  SigbusHandled(const Uffd& uffd, const Area& area, Protect protect) {
    handled = {.uffd = &uffd, .area = &area, .protect = protect, .contents = {}, .signals = {}};
    handled.signals.resize(area.pages());
    for (std::size_t page = 0; page < area.pages(); ++page)
      handled.contents.push_back(contents(page, area.page_bytes()));
    struct sigaction action{};
    action.sa_sigaction = on_sigbus;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGBUS, &action, &before_);
  }
  ~SigbusHandled() {
    sigaction(SIGBUS, &before_, nullptr);
    handled = {};
  }
  SigbusHandled(const SigbusHandled&) = delete;
  SigbusHandled& operator=(const SigbusHandled&) = delete;

 private:
  struct sigaction before_{};
};

void check_sigbus(Case& test, Protect protect) {
  const bool armed = protect == Protect::yes;
  const Uffd uffd =
      test.uffd(abi::kFeatureSigbus | abi::kFeatureEventFork | (armed ? abi::kFeatureWpHugetlbfsShmem : 0));
  const Area area = test.area();
  const std::size_t half = area.pages() / 2;
  ASSERT_TRUE(uffd.register_range(area.range(), armed ? kMissing | kWriteProtect : kMissing));
  const SigbusHandled handler(uffd, area, protect);
  const auto read = [&](std::size_t page) { return has_contents(area.data(page), page, area.page_bytes()); };
  for (std::size_t page = 0; page < half; ++page) EXPECT_TRUE(read(page));

  // A child has a SIGBUS for each page that is missing, and for each write to an armed one.
  ForkedChild child(uffd, area.range(), [&] {
    std::size_t signals = 0;
    for (std::size_t page = 0; page < half; ++page)
      signals += armed ? !write_or_sigbus(area.data(page), std::byte{1}) : !read_or_sigbus(area.data(page));
    for (std::size_t page = half; page < area.pages(); ++page) signals += !read_or_sigbus(area.data(page));
    return static_cast<int>(signals);
  });
  const Uffd child_uffd = take_child(uffd);
  EXPECT_EQ(child.wait(), static_cast<int>(armed ? area.pages() : area.pages() - half));

  for (std::size_t page = half; page < area.pages(); ++page) EXPECT_TRUE(read(page));
  for (std::size_t page = 0; page < area.pages(); ++page) {
    EXPECT_EQ(handled.signals[page], 1u);
    *static_cast<volatile std::byte*>(area.data(page)) = std::byte{0x77};
    EXPECT_EQ(handled.signals[page], armed ? 2u : 1u);
    EXPECT_EQ(*area.data(page), std::byte{0x77});
  }
  EXPECT_FALSE(uffd.wait_readable(0).value()) << "no fault is told by a message";
  EXPECT_FALSE(child_uffd.wait_readable(0).value()) << "no fault of the child either";
}

}  // namespace

KERNEL_CASE(sigbus, kAllTypes) {
  check_sigbus(test, Protect::no);
}

KERNEL_CASE(sigbus_wp, kAllTypes) {
  check_sigbus(test, Protect::yes);
}

}  // namespace uffdkit::selftests
