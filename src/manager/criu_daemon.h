// The other end of `criu restore --lazy-pages`: fills the memory of one restored process tree.
//
// Tasks are served from the moment that they hand their memory over. Once criu says that all of them are in
// place, whatever is still missing is brought in too, in the children that they fork as well; when the last
// of them is complete or gone, run() returns. Nothing but the socket is made in the directory, so that any
// number of restores can be made from one set of images. Threads: one, besides the engine's.
#pragma once

#include <uffdkit/error.h>
#include <uffdkit/units.h>

#include <memory>
#include <string>

namespace uffdkit {

struct CriuDaemonOptions {
  std::string images;          // the directory of the checkpoint
  std::string socket;          // where criu connects: lazy-pages.socket in its work directory
  unsigned workers = 0;        // see EngineOptions
  PageCount fault_around{16};  // see SessionOptions
};

class CriuDaemon {
 public:
  // Reads what the images say of the tasks, and listens. A socket that is at the path already is replaced. No
  // thread is started yet: the process may still fork.
  // Errors: no such directory; images that are missing, malformed or of an unknown format; no socket there.
  static Result<std::unique_ptr<CriuDaemon>> create(const CriuDaemonOptions& options);
  ~CriuDaemon();

  // Serves one restore to its end. SIGTERM or SIGINT, which the caller has blocked in all threads, ends it
  // only as long as criu can still give up: tasks that run would read zeros instead of what is missing.
  // Errors: the restore failed; it was ended by a signal; pages could not be read, and answer with SIGBUS
  // (everything else was brought).
  Result<void> run();

 private:
  class Impl;
  explicit CriuDaemon(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace uffdkit
