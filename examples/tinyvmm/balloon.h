// What a balloon takes from a running guest: which pages, and the thread that gives them back to the host.
#pragma once

#include <cstdint>
#include <thread>
#include <vector>

#include "layout.h"
#include "memory.h"
#include "result.h"

namespace tinyvmm {

/// Runs of pages, in the order of their addresses, that lie within the first `nodes` nodes of the chain: at
/// most `run_count_max`, spread over the memory. The guest has passed them and does not come back.
std::vector<PageSpan> passed_runs(const GuestLayout& layout, std::uint32_t nodes, std::size_t run_count_max);

/// One block of about an eighth of the node pages, aligned to 2 MiB where there are that many.
PageSpan block_of_nodes(const GuestLayout& layout);

/// Gives spans back, one after another, while the guest goes on. Uses memory and spans until finish()
/// returned.
class Balloon {
 public:
  Balloon(const GuestMemory& memory, const std::vector<PageSpan>& spans);
  Result<void> finish();

 private:
  Result<void> outcome_;
  std::jthread thread_;
};

}  // namespace tinyvmm
