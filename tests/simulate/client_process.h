// A client's process on the model: its threads, what each of them is about, and what its memory must contain.
//
// What a thread is about is begun by begin() and followed by look_at(), which is to be called after each turn
// of the machine: it changes what the memory must contain when the deed is done that others see.
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/sim.h>
#include <uffdkit/uffd.h>
#include <uffdkit/units.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "simulate/expected.h"
#include "simulate/story.h"

namespace uffdkit::simulate {

// Of the changes of memory that a userfaultfd can tell of.
inline constexpr std::uint64_t kAllEvents =
    abi::kFeatureEventRemove | abi::kFeatureEventUnmap | abi::kFeatureEventRemap | abi::kFeatureEventFork;

// What a thread of a client is about.
struct Doing {
  enum class Kind : std::uint8_t { nothing, access, fork, advise, unmap, remap };
  Kind kind = Kind::nothing;
  sim::Access access{};
  AddressRange range{};
  sim::Remap remap{};
  bool begun = false;
  std::optional<ExpectedMemory> of_child = {};  // of fork
  bool unserved = false;  // of fork: who read of it was killed, and nobody has the child's userfaultfd

  bool changes_memory() const { return kind > Kind::fork; }
};

std::string_view to_string(Doing::Kind kind);

// What it has done.
struct Done {
  Doing doing;
  sim::Completion ended;
};

struct Worker {
  bool is_idle() const { return thread->state() == sim::Thread::State::idle; }

  sim::Thread* thread;
  Doing doing{};
};

struct ClientProcess {
  explicit ClientProcess(sim::Process& its_process) : process(its_process) {}

  // Its memory shows the image from that page on, and is registered with its userfaultfd; it has threads.
  AddressRange begin_with(const sim::MapRequest& map, RegisterModes modes, std::uint64_t first_image_page);
  // It is the child of a fork(2), and has no userfaultfd.
  void begin_as_child(ExpectedMemory its_memory);

  // One of the pages that it has.
  Address some_page(Random& random) const;
  bool is_forking() const;
  // Whether a thread is changing memory there. Threads that change the same memory at once get what they get.
  bool is_changing(AddressRange range) const;

  // What could be done. A move takes what is mapped side by side from the start of the range.
  static Doing some_access(Random& random, Address page, bool write);
  Doing some_move(Random& random, AddressRange range, Address to, bool may_stay_mapped);

  void begin(Worker& worker, Doing doing);
  // What has been done, if it was not told before. A child of fork(2) is not known to have what is `leaving`.
  std::optional<Done> look_at(Worker& worker, std::span<const AddressRange> leaving = {});
  // An access must have come through, unless it `may_fail`, and have read what it must.
  void check(Story& story, const sim::Access& access, const sim::Completion& ended, bool may_fail);

  sim::Process& process;
  std::optional<Uffd> uffd;  // the client's own descriptor of it
  std::vector<Worker> workers;
  ExpectedMemory memory;
  bool grows = false;  // it has no file, beyond whose end there would be nothing

 private:
  void spawn_workers();
  void take_effect(Worker& worker, std::span<const AddressRange> leaving);
};

// Where clients move memory to: each time to a place of its own.
class Places {
 public:
  Address next();

 private:
  Address next_{0x300000000000};
};

}  // namespace uffdkit::simulate
