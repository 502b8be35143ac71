// The manager as it is, on its own threads and of a real image, and those that follow it when it has ended.
//
// One runs at a time. Its clients, operators and strangers find it by the sockets in its directory, which
// stay where they are.
#pragma once

#include <uffdkit/system_calls.h>

#include <cstdint>
#include <memory>
#include <string>

#include "base/threads.h"
#include "manager/manager.h"
#include "simulate/seeded_threads.h"
#include "simulate/story.h"
#include "support/mapping.h"
#include "support/temp_dir.h"

namespace uffdkit::simulate {

class Managers {
 public:
  static constexpr std::uint64_t kImagePages = 300;
  // How long one may take to end: completing a client's memory, and noticing the end of a process that nobody
  // knows.
  static constexpr std::int64_t kEndNs = 60'000'000'000;

  // Makes the image; the seed says whether it is compressed.
  Managers(Story& story, SeededThreads& threads, SystemCalls& calls);

  void start();
  void tell_to_end();
  // What runs has ended, and goes.
  void bury();
  // Has what runs end, whatever has become of it, and buries it. Its clients must be dead: it would wait for
  // them.
  void give_up();

  bool is_running() const { return manager_ != nullptr; }  // until it is buried
  bool is_ending() const { return ending_; }               // it has been told to
  bool has_ended() const { return ended_; }
  bool has_ended_well() const { return ended_well_; }
  // When it must have ended, after it was told to.
  std::int64_t ends_by_ns() const { return ends_by_ns_; }

  std::string image() const { return directory_ / "image"; }
  std::string firecracker_socket() const { return directory_ / "firecracker"; }
  std::string native_socket() const { return directory_ / "native"; }
  std::string control_socket() const { return directory_ / "control"; }
  // One that operators add and remove.
  std::string added_socket() const { return directory_ / "more"; }

 private:
  Story& story_;
  SeededThreads& threads_;
  SystemCalls& calls_;
  const bool compressed_;
  test::TempDir directory_;
  test::Mapping image_in_memory_;
  std::unique_ptr<Manager> manager_;
  Thread running_;
  bool ending_ = false;
  std::int64_t ends_by_ns_ = 0;
  bool ended_ = false;
  bool ended_well_ = false;
};

}  // namespace uffdkit::simulate
