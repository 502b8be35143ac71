// Filling pages: register-ioctls, zeropage, poison, mmap-changing, and wp-unpopulated.
#include <cerrno>
#include <variant>

#include "selftests/case.h"

namespace uffdkit::selftests {

KERNEL_CASE(register_ioctls, kAllTypes) {
  const Uffd uffd = test.uffd();
  const Area area = test.area();
  for (std::uint64_t bits = 0; bits < 8; ++bits) {
    const RegisterModes modes(bits);
    SCOPED_TRACE(to_string(modes));
    const Result<RangeIoctls> ioctls = uffd.register_range(area.range(), modes);
    if (bits == 0 || (area.type == MemoryType::anon && modes.has(kMinor))) {
      ASSERT_FALSE(ioctls);
      EXPECT_EQ(ioctls.error().os_error(), EINVAL);
      continue;
    }
    ASSERT_TRUE(ioctls) << ioctls.error().text();
    EXPECT_TRUE(ioctls->has(RangeIoctls(abi::kHasWake)));
    if (modes.has(kMissing)) {
      EXPECT_TRUE(ioctls->has(RangeIoctls(abi::kHasCopy)));
    }
    EXPECT_EQ(ioctls->has(RangeIoctls(abi::kHasWriteprotect)), modes.has(kWriteProtect));
    EXPECT_EQ(ioctls->has(RangeIoctls(abi::kHasContinue)), modes.has(kMinor));
    ASSERT_TRUE(uffd.unregister_range(area.range()));
  }
}

KERNEL_CASE(zeropage, kAllTypes) {
  const Uffd uffd = test.uffd();
  const Area area = test.area();
  const Result<RangeIoctls> ioctls = uffd.register_range(area.range(), kMissing);
  ASSERT_TRUE(ioctls) << ioctls.error().text();
  const bool can_zero = ioctls->has(RangeIoctls(abi::kHasZeropage));
  EXPECT_EQ(can_zero, !is_huge(area.type));
  const Outcome first = uffd.zero(area.page(0));
  if (!can_zero) {
    EXPECT_EQ(first.stop, Stop::invalid);
    EXPECT_EQ(test.system().last_out_field(), -EINVAL);
    return;
  }
  EXPECT_EQ(first.stop, Stop::complete);
  EXPECT_EQ(test.system().last_out_field(), static_cast<std::int64_t>(area.page_bytes.value));
  EXPECT_TRUE(is_zero(test.here(), area.start, area.page_bytes));
  EXPECT_EQ(uffd.zero(area.page(0)).stop, Stop::present);
  EXPECT_EQ(test.system().last_out_field(), -EEXIST);
}

KERNEL_CASE(poison, kAllTypes) {
  const Uffd uffd = test.uffd(abi::kFeaturePoison);
  const Area area = test.area();
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  std::size_t killed = 0, zero = 0;
  auto reader = test.machine().start(uffd, area.range(), [&](Thread& self) {
    for (std::size_t page = 0; page < area.pages; ++page) {
      if (!self.read(area.at(page)))
        ++killed;
      else if (is_zero(self, area.at(page), area.page_bytes))
        ++zero;
    }
  });
  const std::vector<std::byte> zeros(area.page_bytes.value);
  serve(uffd, reader, [&](const Message& message) {
    const std::size_t page = area.page_of(std::get<Fault>(message).address);
    const Outcome outcome = page % 2 == 0 ? uffd.poison(area.page(page)) : uffd.copy(area.at(page), zeros);
    EXPECT_EQ(outcome.stop, Stop::complete);
  });
  reader->join();
  EXPECT_EQ(killed, area.pages / 2);
  EXPECT_EQ(zero, area.pages / 2);
}

KERNEL_CASE(mmap_changing, kShmem) {
  const Uffd uffd = test.uffd(abi::kFeatureEventRemove | abi::kFeatureMove | abi::kFeaturePoison);
  const Area area = test.area();
  const std::vector<std::byte> bytes = contents(0, area.page_bytes);
  ASSERT_TRUE(uffd.register_range(area.range(), kMissing));
  ASSERT_EQ(uffd.copy(area.at(0), bytes).stop, Stop::complete);
  int removed = -1;
  const auto remover = test.machine().start(
      uffd, area.range(), [&](Thread& self) { removed = self.advise(area.range(), Advice::remove); });
  ASSERT_TRUE(uffd.wait_readable(-1));
  ASSERT_EQ(uffd.target(), Target::changing);

  const auto expect_changing = [&](const char* call, const Outcome& outcome) {
    EXPECT_EQ(outcome.stop, Stop::changing) << call;
    EXPECT_EQ(outcome.os_error, EAGAIN) << call;
    EXPECT_EQ(test.system().last_out_field(), -EAGAIN) << call;
  };
  expect_changing("COPY", uffd.copy(area.at(1), bytes));
  expect_changing("ZEROPAGE", uffd.zero(area.page(1)));
  expect_changing("MOVE", uffd.move(area.at(1), area.page(2)));
  expect_changing("POISON", uffd.poison(area.page(1)));
  expect_changing("CONTINUE", uffd.resume(area.page(1)));
  EXPECT_FALSE(remover->finished());

  EXPECT_EQ(std::get<RemoveEvent>(test.next_message(uffd)).range, area.range());
  remover->join();
  EXPECT_EQ(removed, 0);
}

KERNEL_CASE(wp_unpopulated, kAnonymous) {
  const Uffd uffd = test.uffd(abi::kFeatureWpUnpopulated);
  const Area area = test.area();
  const AddressRange page = area.page(0);
  Thread& self = test.here();
  const auto discard = [&] { return self.advise(page, Advice::dont_need); };
  ASSERT_TRUE(uffd.register_range(area.range(), kWriteProtect));

  EXPECT_EQ(uffd.protect(page).stop, Stop::complete);
  EXPECT_TRUE(self.is_armed(page.start));
  EXPECT_EQ(uffd.unprotect(page).stop, Stop::complete);
  EXPECT_FALSE(self.is_armed(page.start));

  EXPECT_EQ(uffd.protect(page).stop, Stop::complete);
  ASSERT_EQ(discard(), 0);
  EXPECT_FALSE(self.is_armed(page.start)) << "MADV_DONTNEED leaves no marker";
  EXPECT_TRUE(self.write(page.start, std::byte{1}));  // a fault here would hang: nobody serves
  EXPECT_FALSE(self.is_armed(page.start));

  ASSERT_EQ(discard(), 0);
  EXPECT_EQ(uffd.protect(page).stop, Stop::complete);
  EXPECT_TRUE(is_zero(self, page.start, page.length)) << "reading an armed empty page works";
  EXPECT_TRUE(self.is_armed(page.start));
  EXPECT_FALSE(uffd.wait_readable(0).value());
}

}  // namespace uffdkit::selftests
