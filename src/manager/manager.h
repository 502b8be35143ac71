// Many clients: sockets at which they arrive, the sessions that the engine serves for them, and who asks
// about it.
//
// The manager's thread accepts, decodes and refuses; it never touches a page. Data flows one way: a
// connection makes an AttachRequest and a userfaultfd of what its client sends, the manager checks it against
// the image, and the engine serves it from then on. A session belongs to its client's process, not to a
// connection. Threads: run() is the manager's own; stop() from any; the rest before run().
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/faulty_store.h>
#include <uffdkit/system_calls.h>
#include <uffdkit/units.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/threads.h"
#include "engine/session.h"
#include "image/frame_cache.h"
#include "manager/quotas.h"

namespace uffdkit {

class BatchReaders;
class Records;

struct ManagerOptions {
  unsigned workers = 0;               // see EngineOptions
  PageCount fault_around{16};         // see SessionOptions
  PageCount shared_fault_around{64};  // likewise
  std::int64_t spin_ns = 20'000;      // see EngineOptions
  std::int64_t handshake_ms = 5'000;  // how long a client may take to say what it wants
  // How long the end waits for the memory of clients that hold no descriptor for a successor to be complete.
  std::int64_t drain_ms = 60'000;
  UserLimits user_limits = {};                // of each user
  std::int64_t watchdog_ms = 10'000;          // how long a fault may wait before the log says so; 0: for ever
  OnError on_error = OnError::poison;         // see SessionOptions
  ReadRetries read_retries = {};              // of all images
  std::vector<StoreFault> store_faults = {};  // likewise; for tests
  // Whether sessions note which pages they were asked for, beside the image, when they end; then one page
  // comes at a time. Else whether the pages come at once that were noted of sessions of before.
  bool record = false;
  bool prefetch = true;
  // See SessionOptions; bytes a second of all sessions together, 0: no limit.
  Background background = Background::off;
  ByteCount background_bytes_per_second{64u << 20};
  // What decompressed frames of all images may take.
  ByteCount image_cache_bytes = image::kCacheBytesDefault;
  // By which images are read that wait for a disk; nullptr: threads do it.
  std::shared_ptr<BatchReaders> readers = nullptr;
  // By which clients' userfaultfds are used. Outlives the manager.
  SystemCalls& system = linux_system_calls();
  // By which it runs, and times all but what a keeper does.
  Threads threads = {};
  // What a successor finds all by; nullptr: nothing outlives this process. Outlives the manager.
  Records* records = nullptr;
};

class Manager {
 public:
  static Result<std::unique_ptr<Manager>> create(const ManagerOptions& options);
  ~Manager();

  // Native clients may ask for the file at `path` as `name`, or for any file below a directory by its path
  // there.
  Result<void> add_image(const std::string& name, const std::string& path);
  Result<void> add_image_directory(const std::string& directory);

  // Who may have which images, in addition to root and the user that this process runs as; see
  // AccessRules::allow and allow_control. The image of a Firecracker socket is known by its path.
  Result<void> allow(const std::string& rule);
  Result<void> allow_control(const std::string& who);

  // Clients that connect to `socket` and hand over as Firecracker does are served from the file at `image`.
  Result<void> listen_firecracker(const std::string& socket, const std::string& image);
  // Clients that speak the native protocol (docs/protocol.md).
  Result<void> listen_native(const std::string& socket);
  // Who asks for status, and adds and removes sockets.
  Result<void> listen_control(const std::string& socket);

  // In the place of listening: goes on with all that the records say that a manager of before had, which has
  // ended. Before anything else is opened, so that its descriptors can be told from this process's. Errors:
  // no descriptors to be had. What of it cannot be taken up is logged.
  Result<void> take_up();

  // Called once when the end begins, on the thread of run().
  void on_ending(std::function<void()> tell);

  // "firecracker=/run/a.sock native=/run/b.sock ...", for the line that says that all is ready.
  std::string listening() const;

  // Serves until stop(). Then no more clients are accepted; those that keep no descriptor of their own for a
  // successor (Firecracker's) are completed within ManagerOptions::drain_ms, the others are left to find a
  // successor. Returns whether every client came to a good end: one that could not be completed is killed,
  // because it would hang.
  bool run();
  // A second call ends the waiting.
  void stop();
  // Has SIGTERM and SIGINT call stop(), or with records the keeper's signal. The caller has blocked them in
  // all threads, before create().
  Result<void> stop_at_signals();

 private:
  class Impl;
  explicit Manager(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace uffdkit
