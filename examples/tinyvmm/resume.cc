#include "resume.h"

#include <unistd.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "balloon.h"
#include "handshake.h"
#include "kvm_guest.h"
#include "thread_guest.h"

namespace tinyvmm {
namespace {

constexpr std::size_t kBalloonRunsMax =
    1024;  // each is one madvise and one event: enough to race with faults

double ms_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

Result<std::unique_ptr<Guest>> make_guest(const ResumeOptions& options, const SavedMachine& machine,
                                          const GuestMemory& memory) {
  if (options.kvm) return make_kvm_guest(memory, machine.layout, machine.cpu);
  return make_thread_guest(memory, machine.layout, options.thread_count);
}

// What the guest does once it is awake. It asks for pages in the order of its chain, which is a random one.
class Work {
 public:
  Work(const ResumeOptions& options, const GuestLayout& layout, const GuestMemory& memory, Guest& guest,
       CloneReport& report)
      : options_(options), layout_(layout), memory_(memory), guest_(guest), report_(report) {}

  Result<void> all() {
    const std::uint32_t nodes = std::max(1U, share(layout_.node_pages()));
    if (Result<void> walked = options_.balloon ? walk_with_balloon(nodes) : walk(nodes); !walked)
      return walked;
    if (Result<void> zero = check_zero_pages(); !zero) return zero;
    return options_.balloon ? take_block() : Result<void>{};
  }

 private:
  std::uint32_t share(std::uint32_t pages) const {
    return static_cast<std::uint32_t>(std::uint64_t{pages} * options_.touch_percent / 100);
  }

  // The guest verifies each node; here its report is held against what the whole walk must give, so a guest
  // that skipped nodes, or did nothing, is noticed too.
  Result<void> walk(std::uint32_t nodes) {
    if (nodes == 0) return {};
    Result<Walked> walked = guest_.walk(position_, nodes);
    if (!walked) return std::unexpected(walked.error());
    Walked expected{.next = position_, .checksum = 0};
    for (std::uint32_t i = 0; i < nodes; ++i) {
      const GuestAddress next = layout_.next(expected.next);
      expected.checksum += layout_.check_word(expected.next, next);
      expected.next = next;
    }
    if (walked->checksum != expected.checksum || walked->next != expected.next) {
      return failure(
          "{} nodes from {:#x} gave checksum {:#010x} and ended at {:#x}, instead of {:#010x} and {:#x}",
          nodes, position_, walked->checksum, walked->next, expected.checksum, expected.next);
    }
    position_ = walked->next;
    report_.pages_walked += nodes;
    report_.checksum += walked->checksum;
    return {};
  }

  // Pages that the guest has passed are taken away while it goes on to the others.
  Result<void> walk_with_balloon(std::uint32_t nodes) {
    if (Result<void> walked = walk(nodes / 2); !walked) return walked;
    std::vector<PageSpan> runs;
    if (memory_.page_bytes() == kPageBytes) runs = passed_runs(layout_, nodes / 2, kBalloonRunsMax);
    Balloon balloon(memory_, runs);
    Result<void> walked = walk(nodes - nodes / 2);
    if (Result<void> given_back = balloon.finish(); !given_back) return given_back;
    if (!walked) return walked;
    for (const PageSpan& run : runs) {
      if (Result<void> zero = check_taken(run); !zero) return zero;
    }
    return {};
  }

  // At last a whole block is taken: pages that the guest has seen and, in a partial walk, pages never loaded.
  Result<void> take_block() {
    const PageSpan block = block_of_nodes(layout_);
    if (Result<void> taken = memory_.discard(block.first, std::uint64_t{block.pages} * kPageBytes); !taken) {
      return taken;
    }
    return check_taken(block);
  }

  Result<void> check_taken(PageSpan span) {
    if (Result<void> zero = guest_.check_zero(span); !zero)
      return failure("after the balloon: {}", zero.error());
    report_.pages_ballooned += span.pages;
    return {};
  }

  Result<void> check_zero_pages() {
    PageSpan span = layout_.zero_pages();
    span.pages = share(span.pages);
    if (span.pages == 0) return {};
    if (Result<void> zero = guest_.check_zero(span); !zero) return zero;
    report_.pages_zero += span.pages;
    return {};
  }

  const ResumeOptions& options_;
  const GuestLayout& layout_;
  const GuestMemory& memory_;
  Guest& guest_;
  CloneReport& report_;
  GuestAddress position_ = 0;
};

Result<void> run(const ResumeOptions& options, const SavedMachine& machine, Clock::time_point start,
                 CloneReport& report) {
  Result<GuestMemory> memory =
      GuestMemory::map(machine.layout.memory_bytes(), options.region_count, options.huge_pages);
  if (!memory) return std::unexpected(memory.error());
  Result<ServedMemory> served;
  if (options.uffd_socket) {
    served = hand_over(*memory, *options.uffd_socket);
    if (!served) return std::unexpected(served.error());
  } else if (Result<void> read = read_memory_file(options.directory, *memory); !read) {
    return read;
  }
  Result<std::unique_ptr<Guest>> guest = make_guest(options, machine, *memory);
  if (!guest) return std::unexpected(guest.error());

  if (Result<void> awake = (*guest)->wake(); !awake) return awake;
  report.first_instruction_ms = ms_since(start);
  if (Result<void> done = Work(options, machine.layout, *memory, **guest, report).all(); !done) return done;
  report.done_ms = ms_since(start);
  return {};
}

template <class T>
nlohmann::ordered_json or_null(const std::optional<T>& value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
}

}  // namespace

CloneReport resume_clone(const ResumeOptions& options, const SavedMachine& machine, Clock::time_point start) {
  CloneReport report;
  report.pid = getpid();
  if (Result<void> done = run(options, machine, start, report); !done) report.error = done.error();
  return report;
}

void to_json(nlohmann::ordered_json& json, const CloneReport& report) {
  json = {{"clone", report.clone},
          {"pid", report.pid},
          {"verified", report.error.empty()},
          {"first_instruction_ms", or_null(report.first_instruction_ms)},
          {"done_ms", or_null(report.done_ms)},
          {"pages_walked", report.pages_walked},
          {"pages_zero", report.pages_zero},
          {"pages_ballooned", report.pages_ballooned},
          {"checksum", report.checksum},
          {"error", report.error.empty() ? nlohmann::ordered_json() : nlohmann::ordered_json(report.error)}};
}

void from_json(const nlohmann::ordered_json& json, CloneReport& report) {
  const auto read_ms = [&](const char* key, std::optional<double>& value) {
    if (!json.at(key).is_null()) value = json.at(key).get<double>();
  };
  json.at("clone").get_to(report.clone);
  json.at("pid").get_to(report.pid);
  read_ms("first_instruction_ms", report.first_instruction_ms);
  read_ms("done_ms", report.done_ms);
  json.at("pages_walked").get_to(report.pages_walked);
  json.at("pages_zero").get_to(report.pages_zero);
  json.at("pages_ballooned").get_to(report.pages_ballooned);
  json.at("checksum").get_to(report.checksum);
  if (!json.at("error").is_null()) json.at("error").get_to(report.error);
}

}  // namespace tinyvmm
