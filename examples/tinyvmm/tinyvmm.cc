// tinyvmm: a small monitor of virtual machines, whose guest knows what its memory must hold.
//
// It shows what lazy resume is worth, and proves that it is right. A snapshot is made once:
//
//   tinyvmm snapshot --memory 256M --out /tmp/vm
//
// and then resumed, either after all of its memory was read:
//
//   tinyvmm resume --dir /tmp/vm --eager
//
// or at once, its pages coming from a server when the guest touches them:
//
//   uffdkit serve --firecracker /tmp/vm.sock=/tmp/vm/vm.mem &
//   tinyvmm resume --dir /tmp/vm --uffd /tmp/vm.sock --clones 4
//
// The guest (guest.S) fills its memory with a chain of nodes, one a page, in random order. After a resume it
// walks the chain, verifies every node, and reports through I/O ports. Its page faults are taken inside the
// kernel, by KVM, as those of any virtual machine. The server is spoken to as Firecracker does it
// (handshake.h). Without /dev/kvm, threads do the guest's work.
//
// Exit status: 0 all was verified; 1 something failed or was wrong; 2 the command line is wrong.

#include <CLI/CLI.hpp>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "clones.h"
#include "kvm_guest.h"
#include "resume.h"
#include "snapshot.h"
#include "thread_guest.h"

namespace tinyvmm {
namespace {

constexpr int kExitFailed = 1;
constexpr int kExitUsage = 2;

struct SnapshotOptions {
  std::uint64_t memory_bytes = 0;
  std::filesystem::path directory;
  std::uint32_t seed = 1;
  unsigned zero_percent = 10;
};

int fail(const std::string& error) {
  fmt::print(stderr, "tinyvmm: {}\n", error);
  return kExitFailed;
}

// Names of files may be in any encoding; JSON text is UTF-8.
void print_json(const nlohmann::ordered_json& json) {
  fmt::print("{}\n", json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace));
}

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

const char* guest_kind(bool kvm) {
  return kvm ? "kvm" : "threads";
}

// Whether the guest runs on KVM; says so where it does not.
Result<bool> choose_kvm(bool unwanted) {
  Result<bool> here = unwanted ? false : kvm_is_here();
  if (here && !*here) {
    fmt::print(stderr, "tinyvmm: {}: the guest runs as threads of this process\n",
               unwanted ? "without KVM" : "there is no /dev/kvm here");
  }
  return here;
}

Result<nlohmann::ordered_json> make_snapshot(const SnapshotOptions& options, bool kvm) {
  Result<GuestLayout> layout = GuestLayout::plan(options.memory_bytes, options.zero_percent, options.seed);
  if (!layout) return std::unexpected(layout.error());
  Result<GuestMemory> memory = GuestMemory::map(layout->memory_bytes(), 1, false);
  if (!memory) return std::unexpected(memory.error());
  load_guest_code(*memory, *layout);
  const CpuState reset = cpu_before_fill(*layout);
  Result<std::unique_ptr<Guest>> guest =
      kvm ? make_kvm_guest(*memory, *layout, reset) : make_thread_guest(*memory, *layout, 1);
  if (!guest) return std::unexpected(guest.error());

  const Clock::time_point begin = Clock::now();
  Result<CpuState> cpu = (*guest)->fill();
  if (!cpu) return std::unexpected(cpu.error());
  const Clock::time_point filled = Clock::now();
  Result<std::uint64_t> written = save_snapshot(options.directory, {.layout = *layout, .cpu = *cpu}, *memory);
  if (!written) return std::unexpected(written.error());
  return nlohmann::ordered_json{{"guest", guest_kind(kvm)},
                                {"directory", options.directory.string()},
                                {"memory_bytes", layout->memory_bytes()},
                                {"node_pages", layout->node_pages()},
                                {"zero_pages", layout->zero_pages().pages},
                                {"bytes_written", *written},
                                {"fill_ms", ms_between(begin, filled)},
                                {"write_ms", ms_between(filled, Clock::now())}};
}

int snapshot_command(const SnapshotOptions& options, bool no_kvm, bool json) {
  Result<bool> kvm = choose_kvm(no_kvm);
  if (!kvm) return fail(kvm.error());
  Result<nlohmann::ordered_json> made = make_snapshot(options, *kvm);
  if (!made) return fail(made.error());
  if (json) {
    print_json(*made);
  } else {
    fmt::print(
        "snapshot of a guest of {} MiB in {}: {} nodes filled in {:.0f} ms, {} MiB written in {:.0f} ms\n",
        options.memory_bytes >> 20, options.directory.string(), made->at("node_pages").get<std::uint32_t>(),
        made->at("fill_ms").get<double>(), made->at("bytes_written").get<std::uint64_t>() >> 20,
        made->at("write_ms").get<double>());
  }
  return 0;
}

std::string in_ms(const std::optional<double>& value) {
  return value ? fmt::format("{:.2f}", *value) : "-";
}

void print_table(const std::vector<CloneReport>& reports) {
  static constexpr char kLine[] = "{:>5}  {:>7}  {:>14}  {:>10}  {:>8}  {:>8}  {:>9}  {:>10}  {}\n";
  fmt::print(kLine, "clone", "pid", "first instr ms", "done ms", "walked", "zero", "ballooned", "checksum",
             "result");
  for (const CloneReport& report : reports) {
    fmt::print(kLine, report.clone, report.pid, in_ms(report.first_instruction_ms), in_ms(report.done_ms),
               report.pages_walked, report.pages_zero, report.pages_ballooned,
               fmt::format("{:#010x}", report.checksum), report.error.empty() ? "verified" : "failed");
  }
}

int resume_command(ResumeOptions options, unsigned clone_count, unsigned timeout_s, bool no_kvm, bool json,
                   Clock::time_point start) {
  Result<bool> kvm = choose_kvm(no_kvm);
  if (!kvm) return fail(kvm.error());
  options.kvm = *kvm;
  Result<SavedMachine> machine = load_state(options.directory);
  if (!machine) return fail(machine.error());
  // A served guest's memory may be anywhere, but if the file is here it must be right.
  std::error_code unknown;
  if (!options.uffd_socket || std::filesystem::exists(options.directory / kMemoryFile, unknown)) {
    if (Result<void> usable = check_memory_file(options.directory, machine->layout); !usable) {
      return fail(usable.error());
    }
  }
  std::optional<std::chrono::seconds> time_limit;
  if (timeout_s != 0) time_limit = std::chrono::seconds(timeout_s);
  const std::vector<CloneReport> reports = resume_clones(options, *machine, clone_count, start, time_limit);

  bool verified = true;
  for (const CloneReport& report : reports) {
    if (report.error.empty()) continue;
    verified = false;
    fmt::print(stderr, "tinyvmm: clone {}: {}\n", report.clone, report.error);
  }
  if (json) {
    const nlohmann::ordered_json result{{"guest", guest_kind(*kvm)},
                                        {"memory", options.uffd_socket ? "lazy" : "eager"},
                                        {"memory_bytes", machine->layout.memory_bytes()},
                                        {"verified", verified},
                                        {"clones", reports}};
    print_json(result);
  } else {
    print_table(reports);
  }
  return verified ? 0 : kExitFailed;
}

int run(int argc, char** argv, Clock::time_point start) {
  CLI::App app(
      "A small monitor of virtual machines: snapshots a guest that knows its memory, and resumes it.");
  app.require_subcommand(1);
  app.footer(
      "Exit status: 0 all was verified; 1 something failed or was wrong; 2 the command line is wrong.");
  bool no_kvm = false;
  bool json = false;
  const auto add_common = [&](CLI::App* command) {
    command->add_flag("--no-kvm", no_kvm,
                      "run the guest as threads of this process, as is done where /dev/kvm is missing");
    command->add_flag("--json", json, "print the result as JSON");
  };

  SnapshotOptions making;
  CLI::App* const snapshot =
      app.add_subcommand("snapshot", "Let a guest fill its memory, and write it to files.");
  snapshot
      ->add_option("--memory", making.memory_bytes,
                   "the guest's memory, as 256M: multiples of 2 MiB up to 3G")
      ->required()
      ->transform(CLI::AsSizeValue(false));
  snapshot->add_option("--out", making.directory, "directory for vm.mem and vm.state, made if missing")
      ->required();
  snapshot->add_option("--seed", making.seed, "what the pages hold and their order depends on it")
      ->capture_default_str();
  snapshot->add_option("--zero-percent", making.zero_percent, "share of the pages that stays zero")
      ->check(CLI::Range(0, 90))
      ->capture_default_str();
  add_common(snapshot);

  ResumeOptions resuming;
  bool eager = false;
  unsigned clone_count = 1;
  unsigned timeout_s = 0;
  CLI::App* const resume =
      app.add_subcommand("resume", "Go on with a guest from its snapshot, and let it verify its memory.");
  resume->add_option("--dir", resuming.directory, "directory of the snapshot")->required();
  CLI::Option_group* const source = resume->add_option_group("memory", "Where the memory comes from");
  source->add_flag("--eager", eager, "read all of vm.mem before the guest runs");
  source->add_option("--uffd", resuming.uffd_socket,
                     "socket of a server that fills pages when they are touched");
  source->require_option(1);
  resume->add_option("--clones", clone_count, "guests to resume at once, each in its own process")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  resume->add_option("--touch-percent", resuming.touch_percent, "share of the pages that the guest goes over")
      ->check(CLI::Range(0, 100))
      ->capture_default_str();
  resume->add_option("--regions", resuming.region_count, "separate mappings that the memory is split into")
      ->check(CLI::Range(1, 509))
      ->capture_default_str();
  resume->add_option("--threads", resuming.thread_count, "threads of a guest without KVM")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  resume->add_flag("--huge-pages", resuming.huge_pages, "use huge pages of 2 MiB; needs vm.nr_hugepages");
  resume->add_flag("--balloon", resuming.balloon,
                   "take pages away from the running guest, which then verifies that they read as zero");
  resume
      ->add_option("--timeout", timeout_s,
                   "seconds after which clones that have not finished are killed; 0: never")
      ->capture_default_str();
  add_common(resume);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kExitUsage;
  }
  if (*snapshot) return snapshot_command(making, no_kvm, json);
  return resume_command(resuming, clone_count, timeout_s, no_kvm, json, start);
}

}  // namespace
}  // namespace tinyvmm

// NOLINTNEXTLINE(bugprone-exception-escape): only want of memory throws here, and nothing is lost by ending.
int main(int argc, char** argv) {
  const tinyvmm::Clock::time_point start = tinyvmm::Clock::now();
  return tinyvmm::run(argc, argv, start);
}
