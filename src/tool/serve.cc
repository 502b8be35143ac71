// uffdkit serve: the manager.
#include <fmt/format.h>
#include <signal.h>
#include <systemd/sd-daemon.h>
#include <uffdkit/error.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "manager/keeper.h"
#include "manager/manager.h"
#include "manager/read_rings.h"
#include "manager/sandbox.h"
#include "tool/command.h"

namespace uffdkit::tool {
namespace {

// A year: what can be counted in nanoseconds.
constexpr double kSecondsMax = 31'536'000;

struct Options {
  std::vector<std::string> firecracker;  // SOCKET=IMAGE
  std::vector<std::string> listen;
  std::vector<std::string> images;  // NAME=FILE
  std::vector<std::string> image_directories;
  std::string control;
  std::vector<std::string> allow;          // WHO=IMAGES
  std::vector<std::string> allow_control;  // WHO
  UserLimits user_limits;
  bool no_sandbox = false;
  unsigned workers = 0;
  std::uint64_t fault_around = 16;
  std::uint64_t shared_fault_around = 64;
  std::int64_t spin_us = 20;
  double handshake_seconds = 5;
  double drain_seconds = 60;
  double watchdog_seconds = 10;
  OnError on_error = OnError::poison;
  unsigned read_retries = ReadRetries().count;
  std::vector<std::string> store_faults;
  std::uint64_t image_cache_bytes = image::kCacheBytesDefault.value;
  bool no_keeper = false;
  bool record = false;
  bool no_prefetch = false;
  bool no_io_uring = false;
  Background background = Background::off;
  std::uint64_t background_bytes_per_second = 64u << 20;
};

// The two sides of the first "=" of a text that is_pair() accepts.
std::pair<std::string, std::string> split(const std::string& text) {
  const std::size_t equals = text.find('=');
  return {text.substr(0, equals), text.substr(equals + 1)};
}

// Accepts texts of two sides around "=", which `form` shows: SOCKET=IMAGE.
CLI::Validator is_pair(const std::string& form) {
  const auto check = [form](const std::string& text) {
    const std::size_t equals = text.find('=');
    const bool good = equals != std::string::npos && equals != 0 && equals + 1 != text.size();
    return good ? std::string() : text + " is not of the form " + form;
  };
  return CLI::Validator(check, form, form);
}

Result<void> allow_whom_the_options_name(Manager& manager, const Options& options) {
  for (const std::string& rule : options.allow)
    if (auto allowed = manager.allow(rule); !allowed) return allowed;
  for (const std::string& who : options.allow_control)
    if (auto allowed = manager.allow_control(who); !allowed) return allowed;
  return {};
}

Result<void> open_everything(Manager& manager, const Options& options) {
  for (const std::string& text : options.images) {
    const auto [name, path] = split(text);
    if (auto added = manager.add_image(name, path); !added) return added;
  }
  for (const std::string& directory : options.image_directories)
    if (auto added = manager.add_image_directory(directory); !added) return added;
  for (const std::string& text : options.firecracker) {
    const auto [socket, image] = split(text);
    if (auto listening = manager.listen_firecracker(socket, image); !listening) return listening;
  }
  for (const std::string& socket : options.listen)
    if (auto listening = manager.listen_native(socket); !listening) return listening;
  if (!options.control.empty()) return manager.listen_control(options.control);
  return {};
}

Result<std::vector<StoreFault>> store_faults(const Options& options) {
  std::vector<StoreFault> faults;
  for (const std::string& text : options.store_faults) {
    Result<StoreFault> fault = parse_store_fault(text);
    if (!fault) return Failure(std::move(fault).error());
    faults.push_back(*std::move(fault));
  }
  return faults;
}

// Where a worker goes on with what there is, images that clients may ask for by name.
void add_images(Manager& manager, const Options& options) {
  for (const std::string& text : options.images) {
    const auto [name, path] = split(text);
    if (auto added = manager.add_image(name, path); !added) report(added.error());
  }
  for (const std::string& directory : options.image_directories)
    if (auto added = manager.add_image_directory(directory); !added) report(added.error());
}

// Serves until the end. `records` is nullptr where nobody keeps this process.
int serve(const Options& options, const std::vector<StoreFault>& faults, Records* records) {
  if (!options.no_sandbox)
    if (auto dropped = drop_privileges(); !dropped) return report(dropped.error());
  std::shared_ptr<ReadRings> rings;
  if (!options.no_io_uring) {
    Result<std::shared_ptr<ReadRings>> made = ReadRings::create();
    if (made)
      rings = std::move(*made);
    else if (records == nullptr || records->shared().is_ready == 0)
      report(made.error());
  }
  Result<std::unique_ptr<Manager>> manager =
      Manager::create({.workers = options.workers,
                       .fault_around = PageCount(options.fault_around),
                       .shared_fault_around = PageCount(options.shared_fault_around),
                       .spin_ns = options.spin_us * 1000,
                       .handshake_ms = static_cast<std::int64_t>(options.handshake_seconds * 1000),
                       .drain_ms = static_cast<std::int64_t>(options.drain_seconds * 1000),
                       .user_limits = options.user_limits,
                       .watchdog_ms = static_cast<std::int64_t>(options.watchdog_seconds * 1000),
                       .on_error = options.on_error,
                       .read_retries = {.count = options.read_retries},
                       .store_faults = faults,
                       .record = options.record,
                       .prefetch = !options.no_prefetch,
                       .background = options.background,
                       .background_bytes_per_second = ByteCount(options.background_bytes_per_second),
                       .image_cache_bytes = ByteCount(options.image_cache_bytes),
                       .readers = rings,
                       .records = records});
  if (!manager) return report(manager.error());
  const bool takes_up = records != nullptr && records->shared().is_ready != 0;
  const auto give_up = [&](const Error& error) {
    report(error);
    // Nothing may be closed or removed: the next worker takes it up.
    if (takes_up) ::_exit(kExitFailed);
    return kExitFailed;
  };
  if (auto allowed = allow_whom_the_options_name(**manager, options); !allowed)
    return give_up(allowed.error());
  if (takes_up) {
    if (auto taken = (*manager)->take_up(); !taken) return give_up(taken.error());
    add_images(**manager, options);
  } else if (auto opened = open_everything(**manager, options); !opened) {
    return give_up(opened.error());
  }
  if (auto signalled = (*manager)->stop_at_signals(); !signalled) return give_up(signalled.error());
  if (!options.no_sandbox)
    if (auto filtered = filter_system_calls(options.record ? ReplacesFiles::yes : ReplacesFiles::no,
                                            rings ? ReadsByRing::yes : ReadsByRing::no);
        !filtered)
      return give_up(filtered.error());

  if (!takes_up) {
    fmt::print("uffdkit: ready{}\n", (*manager)->listening());
    std::fflush(stdout);
  }
  if (records != nullptr) {
    records->tell_serving();
  } else {
    ::sd_notify(0, "READY=1");
    (*manager)->on_ending([] { ::sd_notify(0, "STOPPING=1"); });
  }
  const bool good = (*manager)->run();
  return good ? kExitDone : kExitFailed;
}

int run(const Options& options) {
  sigset_t signals;
  ::sigemptyset(&signals);
  for (const int signal : {SIGTERM, SIGINT, SIGHUP, Keeper::stop_signal()}) ::sigaddset(&signals, signal);
  if (options.no_keeper) ::sigdelset(&signals, SIGHUP);
  ::pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  ::signal(SIGPIPE, SIG_IGN);
  raise_descriptor_limit();

  Result<std::vector<StoreFault>> faults = store_faults(options);
  if (!faults) {
    report(faults.error());
    return kExitUsage;
  }
  if (options.no_keeper) return serve(options, *faults, nullptr);
  Result<std::unique_ptr<Keeper>> keeper = Keeper::create();
  if (!keeper) return report(keeper.error());
  return (*keeper)->run([&](Records& records) { return serve(options, *faults, &records); },
                        [](const std::string& line) { ::sd_notify(0, line.c_str()); });
}

}  // namespace

void add_serve(CLI::App& app, int& exit_code) {
  CLI::App* command =
      app.add_subcommand("serve", "Serve the page faults of other processes from memory images");
  const auto options = std::make_shared<Options>();
  command
      ->add_option(
          "--firecracker", options->firecracker,
          "SOCKET=IMAGE: clients that connect to SOCKET and hand over as Firecracker does are served from "
          "IMAGE, a raw memory file or one made by uffdkit image; repeatable")
      ->check(is_pair("SOCKET=IMAGE"));
  command->add_option("--listen", options->listen,
                      "SOCKET for clients of uffdkit's own protocol; repeatable");
  command
      ->add_option("--image", options->images,
                   "NAME=FILE: an image that these clients may ask for; repeatable")
      ->check(is_pair("NAME=FILE"));
  command->add_option("--images", options->image_directories,
                      "DIRECTORY: likewise every file below it, by its path there; repeatable");
  command->add_option("--control", options->control, "SOCKET for 'uffdkit status' and 'uffdkit listen'");
  command
      ->add_option("--allow", options->allow,
                   "WHO=IMAGES: who else may have the images whose name, or path of a Firecracker socket, "
                   "matches IMAGES ('*' is anything); WHO: user:NAME, group:NAME, anyone, or several with "
                   "commas; repeatable")
      ->check(is_pair("WHO=IMAGES"));
  command->add_option("--allow-control", options->allow_control,
                      "WHO: who else may use the control socket; repeatable");
  command->add_option("--user-sessions", options->user_limits.sessions,
                      "How many sessions each user may have; 0: no limit");
  command->add_option("--user-regions", options->user_limits.regions,
                      "How many regions each user may have in all its sessions; 0: no limit");
  command
      ->add_option("--user-memory", options->user_limits.memory_bytes,
                   "How many bytes each user may have in all its regions, say 64G; 0: no limit")
      ->transform(CLI::AsSizeValue(false));
  command->add_option("--user-requests", options->user_limits.requests_per_second,
                      "How many connections and requests each user may make in a second; 0: no limit");
  add_fault_around_option(*command, "--fault-around", options->fault_around, kFaultAroundHelp);
  add_fault_around_option(*command, "--shared-fault-around", options->shared_fault_around,
                          "The same where clients share the image");
  add_workers_option(*command, options->workers);
  command
      ->add_option("--spin-us", options->spin_us,
                   "How long a worker that has just served a fault looks for the next one before it sleeps")
      ->check(CLI::Range(0, 10'000))
      ->capture_default_str();
  command
      ->add_option("--handshake-seconds", options->handshake_seconds,
                   "How long a client may take to say what it wants")
      ->check(CLI::Range(0.001, kSecondsMax))
      ->capture_default_str();
  command
      ->add_option(
          "--drain-seconds", options->drain_seconds,
          "At the end: how long to complete the memory of Firecracker clients; those that are not complete "
          "then are killed")
      ->check(CLI::Range(0.0, kSecondsMax))
      ->capture_default_str();
  command
      ->add_option("--watchdog-seconds", options->watchdog_seconds,
                   "How long a fault may wait before the log says which page waits, and why; 0 turns it off")
      ->check(CLI::Range(0.0, kSecondsMax))
      ->capture_default_str();
  command
      ->add_option(
          "--on-error", options->on_error,
          "What becomes of a client that touches a page which cannot be read: poison (the page answers "
          "with SIGBUS), kill, or pause (it is stopped until 'uffdkit resume')")
      ->transform(CLI::CheckedTransformer(std::map<std::string, OnError>{
          {"poison", OnError::poison}, {"kill", OnError::kill}, {"pause", OnError::pause}}))
      ->default_str("poison");
  command
      ->add_option("--read-retries", options->read_retries,
                   "How often a page that cannot be read is tried again, after 5, 20, 80 ms and so on")
      ->check(CLI::Range(0, 8))
      ->capture_default_str();
  command
      ->add_option("--image-cache", options->image_cache_bytes,
                   "Bytes of memory for decompressed parts of images, of all together; K, M and G may follow")
      ->transform(CLI::AsSizeValue(false))
      ->default_str("256M");
  command->add_flag(
      "--record", options->record,
      "When a session ends, write beside its image (IMAGE.ws) which pages it was asked for, and in "
      "which order; several recordings are merged. Pages come one at a time meanwhile");
  command->add_flag("--no-io-uring", options->no_io_uring,
                    "Read images by threads also where the system has io_uring for that");
  command->add_flag("--no-prefetch", options->no_prefetch,
                    "Bring nothing before it is asked for: neither what was recorded, nor what a client that "
                    "goes through its memory in order will come to");
  command
      ->add_option(
          "--background", options->background,
          "Whether pages that nobody has asked for are brought in the end: off, idle (while no fault "
          "comes), full (as fast as faults leave room)")
      ->transform(CLI::CheckedTransformer(std::map<std::string, Background>{
          {"off", Background::off}, {"idle", Background::idle}, {"full", Background::full}}))
      ->default_str("off");
  command
      ->add_option("--background-rate", options->background_bytes_per_second,
                   "Bytes that are read a second in the background, for all sessions together; K, M or G may "
                   "follow; 0: no limit")
      ->transform(CLI::AsSizeValue(false))
      ->default_str("64M");
  command->add_option("--store-fault", options->store_faults,
                      "KIND[,KEY=VALUE]...: for tests, has reads of images fail, lie or last; repeatable");
  add_no_sandbox_option(*command, options->no_sandbox);
  command->add_flag("--no-keeper", options->no_keeper,
                    "Serve in this process alone, which nothing takes over from: for debuggers");
  command->footer(
      "Ends at SIGTERM or SIGINT, after completing the memory of its Firecracker clients; at a second one, "
      "at once.\n"
      "Exit codes: 0 every client came to a good end; 1 it could not start, or killed clients at its end; 2 "
      "usage.");
  command->callback([options, &exit_code] {
    if (options->firecracker.empty() && options->listen.empty() && options->control.empty())
      throw CLI::ValidationError("serve", "nothing to do: give --firecracker, --listen or --control");
    exit_code = run(*options);
  });
}

}  // namespace uffdkit::tool
