// What a program runs on: the model, or the running kernel.
#pragma once

#include <memory>
#include <string>

#include "compare/program.h"

namespace uffdkit::differential {

class Machine {
 public:
  virtual ~Machine() = default;
  // Carries out an operation, waits until every thread is done or asleep, and says all that can be seen.
  // `order_is_open`: what the model said before; the same for both machines.
  virtual std::string perform(const Operation& operation, bool order_is_open) = 0;
  // Whether the faults that wait in this userfaultfd came in an order that the scheduler chose.
  virtual bool order_is_open(int uffd) = 0;
};

std::unique_ptr<Machine> make_model(std::uint64_t seed, bool huge, const sim::KernelOptions& like);
std::unique_ptr<Machine> make_real(bool huge);
// Of the running kernel, as in sim::KernelOptions; true where that cannot be told (before 6.7).
bool reads_map_zero_page();
// What the machine lacks to run programs for real; empty if nothing.
std::string lacking();

// ---- what both say --------------------------------------------------------------------------------------

// The byte that COPY puts everywhere in page number `page` of its range.
constexpr std::uint8_t copied_byte(std::uint8_t value, std::uint64_t page) {
  return static_cast<std::uint8_t>(value + page * 7);
}
// Where in its page a thread reads and writes: each at a place of its own, so that no result depends on which
// of two threads was first.
constexpr std::uint64_t offset_of_thread(int thread) {
  return 64 * (static_cast<std::uint64_t>(thread) + 1);
}
// Where pages are looked at by dump.
inline constexpr std::uint64_t kDumpOffsets[] = {0, 64, 128, 192, 256, 320, 4095};

// Sentinel of the out fields.
inline constexpr std::int64_t kUntouched = 777;

struct SeenMessage {
  bool fault;
  std::string text;
};
// Messages as text; faults sorted if their order is open.
std::string describe(std::vector<SeenMessage> messages, bool order_is_open);
std::string describe(const abi::Msg& message, int thread, int child_uffd);

}  // namespace uffdkit::differential
