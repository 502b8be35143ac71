// FEATURE_SIGBUS, where no fault is told by a message: sigbus, sigbus-wp.
#include <unistd.h>

#include <cstdint>

#include "selftests/case.h"

namespace uffdkit::selftests {
namespace {

// Does in the signal handler what a handler of messages would: fills a page the first time, disarms it the
// second. What it needs is made beforehand.
class Handler {
 public:
  Handler(const Uffd& uffd, const Area& area, Protect protect)
      : uffd_(uffd), area_(area), protect_(protect), signals_(area.pages) {
    for (std::size_t page = 0; page < area.pages; ++page)
      contents_.push_back(contents(page, area.page_bytes));
  }

  std::size_t signals(std::size_t page) const { return signals_[page]; }

  void operator()(Address address) {
    if (!area_.range().contains(address)) _exit(98);
    const std::size_t page = area_.page_of(address);
    const AddressRange range = area_.page(page);
    const bool filled = signals_[page]++ > 0;
    const Outcome outcome =
        filled ? uffd_.unprotect(range) : uffd_.copy(range.start, contents_[page], Wake::yes, protect_);
    if (outcome.stop != Stop::complete) _exit(97);
  }

 private:
  const Uffd& uffd_;
  const Area& area_;
  Protect protect_;
  std::vector<std::vector<std::byte>> contents_;
  std::vector<std::size_t> signals_;  // of each page
};

void check_sigbus(Case& test, Protect protect) {
  const bool armed = protect == Protect::yes;
  const Uffd uffd =
      test.uffd(abi::kFeatureSigbus | abi::kFeatureEventFork | (armed ? abi::kFeatureWpHugetlbfsShmem : 0));
  const Area area = test.area();
  const std::size_t half = area.pages / 2;
  ASSERT_TRUE(uffd.register_range(area.range(), armed ? kMissing | kWriteProtect : kMissing));
  Handler handler(uffd, area, protect);
  test.machine().on_sigbus(std::ref(handler));
  const auto read = [&](std::size_t page) {
    return has_contents(test.here(), area.at(page), page, area.page_bytes);
  };
  for (std::size_t page = 0; page < half; ++page) EXPECT_TRUE(read(page));

  // A child has a SIGBUS for each page that is missing, and for each write to an armed one.
  const auto child = test.machine().fork(uffd, area.range(), [&](Thread& self) {
    std::size_t signals = 0;
    for (std::size_t page = 0; page < half; ++page)
      signals += armed ? !self.write(area.at(page), std::byte{1}) : !self.read(area.at(page));
    for (std::size_t page = half; page < area.pages; ++page) signals += !self.read(area.at(page));
    return static_cast<int>(signals);
  });
  const Uffd child_uffd = test.take_child(uffd);
  child->join();
  EXPECT_EQ(child->result(), static_cast<int>(armed ? area.pages : area.pages - half));

  for (std::size_t page = half; page < area.pages; ++page) EXPECT_TRUE(read(page));
  for (std::size_t page = 0; page < area.pages; ++page) {
    EXPECT_EQ(handler.signals(page), 1u);
    EXPECT_TRUE(test.here().write(area.at(page), std::byte{0x77}));
    EXPECT_EQ(handler.signals(page), armed ? 2u : 1u);
    EXPECT_EQ(test.here().read(area.at(page)), std::byte{0x77});
  }
  test.machine().on_sigbus(nullptr);
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
