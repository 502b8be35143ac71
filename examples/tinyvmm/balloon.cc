#include "balloon.h"

namespace tinyvmm {

std::vector<PageSpan> passed_runs(const GuestLayout& layout, std::uint32_t nodes, std::size_t run_count_max) {
  std::vector<bool> passed(layout.node_pages());
  GuestAddress node = 0;
  for (std::uint32_t i = 0; i < nodes; ++i) {
    passed[node / kPageBytes] = true;
    node = layout.next(node);
  }
  std::vector<PageSpan> runs;
  for (std::uint32_t page = 0; page < layout.node_pages(); ++page) {
    if (!passed[page]) continue;
    if (page > 0 && passed[page - 1]) {
      ++runs.back().pages;
    } else {
      runs.push_back({page * kPageBytes, 1});
    }
  }
  if (runs.size() <= run_count_max) return runs;
  std::vector<PageSpan> some;
  some.reserve(run_count_max);
  for (std::size_t i = 0; i < run_count_max; ++i) some.push_back(runs[i * runs.size() / run_count_max]);
  return some;
}

PageSpan block_of_nodes(const GuestLayout& layout) {
  const std::uint32_t huge_pages = layout.nodes_end() / kHugePageBytes;
  if (huge_pages == 0) return {0, layout.node_pages()};
  const std::uint32_t taken = (huge_pages + 7) / 8;
  const std::uint32_t first = (huge_pages - taken) / 2;
  return {first * kHugePageBytes, taken * (kHugePageBytes / kPageBytes)};
}

Balloon::Balloon(const GuestMemory& memory, const std::vector<PageSpan>& spans)
    : thread_([this, &memory, &spans] {
        for (const PageSpan& span : spans) {
          outcome_ = memory.discard(span.first, std::uint64_t{span.pages} * kPageBytes);
          if (!outcome_) return;
        }
      }) {}

Result<void> Balloon::finish() {
  thread_.join();
  return outcome_;
}

}  // namespace tinyvmm
