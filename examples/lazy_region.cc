// Memory that is computed when it is touched: a terabyte of square numbers, of which a few are looked at.
#include <uffdkit/pager.h>

#include <cstdint>
#include <cstdio>
#include <cstring>

// The number at position i of this store is i * i.
class Squares final : public uffdkit::Store {
 public:
  explicit Squares(uffdkit::ByteCount size) : size_(size) {}

  uffdkit::ByteCount size() const noexcept override { return size_; }
  std::string name() const override { return "squares"; }
  uffdkit::Extent extent_at(uffdkit::StoreOffset) const noexcept override {
    return {.zero = false, .end = uffdkit::StoreOffset(size_.value)};
  }
  // Never blocks, so it does not matter whether it may. A store that reads from a disk or a network answers
  // would_block to Wait::no, and is asked again on a thread that may wait.
  uffdkit::Result<uffdkit::ReadStatus> read(uffdkit::StoreOffset from, std::span<std::byte> to,
                                            uffdkit::Wait) noexcept override {
    for (std::size_t at = 0; at < to.size(); at += sizeof(std::uint64_t)) {
      const std::uint64_t i = (from.value + at) / sizeof(std::uint64_t);
      const std::uint64_t square = i * i;
      std::memcpy(to.data() + at, &square, sizeof square);
    }
    return uffdkit::ReadStatus::done;
  }

 private:
  const uffdkit::ByteCount size_;
};

int main() {
  // Only this program's own instructions touch the region, so anybody may run it.
  auto pager = uffdkit::Pager::create({.kernel_faults = false});
  if (!pager) return std::fprintf(stderr, "%s\n", pager.error().text().c_str()), 1;
  auto region = pager->map(std::make_shared<Squares>(uffdkit::ByteCount(1ull << 40)));
  if (!region) return std::fprintf(stderr, "%s\n", region.error().text().c_str()), 1;

  const auto* squares = reinterpret_cast<const std::uint64_t*>(region->data());
  for (const std::uint64_t i : {3ull, 1'000'000ull, 4'000'000'000ull}) {
    std::printf("%llu squared is %llu\n", static_cast<unsigned long long>(i),
                static_cast<unsigned long long>(squares[i]));
    if (squares[i] != i * i) return 1;
  }
  const uffdkit::PagerStatus status = pager->status();
  std::printf("of 268435456 pages, %llu were computed for %llu faults\n",
              static_cast<unsigned long long>(status.pages_copied),
              static_cast<unsigned long long>(status.faults));
  return 0;
}
