// A stand-in for `criu restore --lazy-pages`: makes the checkpoint of a process tree that never was, restores
// it with whoever listens at lazy-pages.socket, and has each task do a piece of work on its memory, in which
// every byte that it sees is compared.
//
// It keeps criu's order: one connection for all tasks, each of which opens its userfaultfd, hands it over,
// moves its empty mappings into place, registers them, closes its own descriptor, and touches a few pages
// before criu says that the restore is finished.
#pragma once

#include <uffdkit/units.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "support/child.h"

namespace uffdkit::test {

// What a task does once it runs.
enum class CriuWork : std::uint8_t {
  idle,        // nothing until the memory is complete
  sequential,  // reads page after page
  random,      // reads them in any order
  threads,     // four threads read them in any order
  forks,       // forks children, and they theirs, which read and write, while it does; one child stays
  changes,     // mremap, munmap, MADV_DONTNEED, and reads and writes in between
  exits,       // exits at once
  executes,    // exec of another program
  is_killed,   // by SIGKILL, while a thread of it waits for a page
  zombie,      // nothing: it has no memory
};

// Anonymous memory of a task's.
struct CriuArea {
  Address address;
  std::size_t pages;
  // Every page is lazy and in the checkpoint; else some were never there, some were put into place by the
  // restorer, and some are in the checkpoint before.
  bool dense = false;
};

struct CriuTask {
  std::int32_t pid;  // in the images
  std::vector<CriuArea> areas;
  CriuWork work = CriuWork::sequential;
  unsigned early_faults = 3;  // pages that are touched before the restore is finished
};

// The image files of these tasks; in `directory`, and those before in its subdirectory "before".
void write_criu_checkpoint(const std::string& directory, const std::vector<CriuTask>& tasks);

class CriuRestore {
 public:
  struct Setting {
    bool fails = false;  // ends without saying that it is finished
    std::uint32_t seed = 1;
  };
  // Starts to restore. `work_directory` has the socket.
  CriuRestore(const std::string& work_directory, std::vector<CriuTask> tasks, Setting setting);
  ~CriuRestore();

  // Waits until every task runs. False if the restore did not come so far.
  bool wait_released();
  // Waits for those tasks that do not wait for the memory to be complete.
  bool wait_worked();
  // Whoever serves says that all is in: lets the others look. Then waits for all. Returns 0 if every byte was
  // right.
  int finish();

  // Nanoseconds from the end of the restore until the work of task `index` was done.
  std::uint64_t work_ns(std::size_t index) const;
  // When the tasks were released, on the monotonic clock.
  std::int64_t released_at_ns() const;

 private:
  struct Shared;
  class Restorer;
  class Task;
  Shared* shared_;
  std::unique_ptr<Child> child_;
};

}  // namespace uffdkit::test
