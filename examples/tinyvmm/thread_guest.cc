#include "thread_guest.h"

#include <algorithm>
#include <functional>
#include <thread>
#include <vector>

namespace tinyvmm {
namespace {

class ThreadGuest final : public Guest {
 public:
  ThreadGuest(const GuestMemory& memory, const GuestLayout& layout, unsigned thread_count)
      : memory_(memory), layout_(layout), thread_count_(thread_count) {}

  Result<CpuState> fill() override;
  Result<void> wake() override;
  Result<Walked> walk(GuestAddress start, std::uint32_t nodes) override;
  Result<void> check_zero(PageSpan span) override;

 private:
  // A thread's share of a request.
  Result<Walked> walk_share(GuestAddress start, std::uint32_t nodes) const;
  Result<void> check_share(PageSpan span) const;

  void write_to(GuestAddress page) const {
    volatile std::uint32_t& visits = memory_.word(page + GUEST_VISITS_OFFSET);
    visits = visits + 1;
  }

  const GuestMemory& memory_;
  GuestLayout layout_;
  unsigned thread_count_;
};

// Calls work(i) for each i below `count`, each in a thread of its own.
void in_threads(std::size_t count, const std::function<void(std::size_t)>& work) {
  std::vector<std::jthread> threads;
  threads.reserve(count);
  for (std::size_t i = 0; i < count; ++i) threads.emplace_back(work, i);
}

Result<CpuState> ThreadGuest::fill() {
  GuestAddress node = 0;
  do {
    const GuestAddress next = layout_.next(node);
    memory_.word(node) = next;
    memory_.word(node + GUEST_CHECK_OFFSET) = layout_.check_word(node, next);
    node = next;
  } while (node != 0);
  return cpu_after_fill(layout_);
}

Result<void> ThreadGuest::wake() {
  // A processor's first act is to fetch an instruction from the guest's memory.
  in_threads(1, [this](std::size_t) { static_cast<void>(std::uint32_t{memory_.word(layout_.code())}); });
  return {};
}

Result<Walked> ThreadGuest::walk(GuestAddress start, std::uint32_t nodes) {
  struct Share {
    GuestAddress start;
    std::uint32_t nodes;
    Result<Walked> outcome;
  };
  // Each thread starts further on in the chain, where the layout says that the ones before it will arrive.
  const std::uint32_t share_nodes_max = (nodes + thread_count_ - 1) / thread_count_;
  std::vector<Share> shares;
  GuestAddress node = start;
  for (std::uint32_t passed = 0; passed < nodes;) {
    const std::uint32_t share_nodes = std::min(share_nodes_max, nodes - passed);
    shares.push_back({node, share_nodes, Walked{}});
    for (std::uint32_t i = 0; i < share_nodes; ++i) node = layout_.next(node);
    passed += share_nodes;
  }
  in_threads(shares.size(),
             [&](std::size_t i) { shares[i].outcome = walk_share(shares[i].start, shares[i].nodes); });

  Walked walked{.next = start, .checksum = 0};
  for (const Share& share : shares) {
    if (!share.outcome) return share.outcome;
    walked.next = share.outcome->next;
    walked.checksum += share.outcome->checksum;
  }
  return walked;
}

Result<Walked> ThreadGuest::walk_share(GuestAddress start, std::uint32_t nodes) const {
  Walked walked{.next = start, .checksum = 0};
  for (std::uint32_t i = 0; i < nodes; ++i) {
    const GuestAddress node = walked.next;
    const GuestAddress next = memory_.word(node);
    const std::uint32_t expected = layout_.check_word(node, next);
    const std::uint32_t found = memory_.word(node + GUEST_CHECK_OFFSET);
    if (found != expected) return std::unexpected(describe({node, expected, found, next}));
    walked.checksum += found;
    if ((found & GUEST_WRITE_BITS) == 0) write_to(node);
    if (next % kPageBytes != 0 || next >= layout_.nodes_end()) {
      return failure("page at {:#x} points to {:#x}, which is no node", node, next);
    }
    walked.next = next;
  }
  return walked;
}

Result<void> ThreadGuest::check_zero(PageSpan span) {
  const std::uint32_t share_pages_max = (span.pages + thread_count_ - 1) / thread_count_;
  std::vector<PageSpan> shares;
  for (std::uint32_t page = 0; page < span.pages; page += share_pages_max) {
    shares.push_back({span.first + page * kPageBytes, std::min(share_pages_max, span.pages - page)});
  }
  std::vector<Result<void>> outcomes(shares.size());
  in_threads(shares.size(), [&](std::size_t i) { outcomes[i] = check_share(shares[i]); });
  for (const Result<void>& outcome : outcomes) {
    if (!outcome) return outcome;
  }
  return {};
}

Result<void> ThreadGuest::check_share(PageSpan span) const {
  for (std::uint32_t i = 0; i < span.pages; ++i) {
    const GuestAddress page = span.first + i * kPageBytes;
    const std::uint32_t first_word = memory_.word(page);
    const std::uint32_t visits = memory_.word(page + GUEST_VISITS_OFFSET);
    const std::uint32_t last_word = memory_.word(page + GUEST_CHECK_OFFSET);
    const std::uint32_t found = first_word | visits | last_word;
    if (found != 0) return std::unexpected(describe({page, 0, found, first_word}));
    if ((page & GUEST_WRITE_BITS) == 0) write_to(page);
  }
  return {};
}

}  // namespace

std::unique_ptr<Guest> make_thread_guest(const GuestMemory& memory, const GuestLayout& layout,
                                         unsigned thread_count) {
  return std::make_unique<ThreadGuest>(memory, layout, thread_count);
}

}  // namespace tinyvmm
