// A client of the manager: a simulated process with its memory, and a real one that connects for it and is
// watched. It asks to be served as Firecracker does, or by the native protocol, by which it also adds and
// drops regions, detaches and comes back. A child of fork(2) says nothing: its parent's manager hears of it.
#pragma once

#include <uffdkit/sim.h>
#include <uffdkit/unique_fd.h>
#include <uffdkit/units.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "simulate/client_process.h"
#include "simulate/managers.h"
#include "simulate/real_descriptors.h"
#include "simulate/story.h"
#include "support/child.h"
#include "wire/native.h"

namespace uffdkit::simulate {

enum class Speaks : std::uint8_t { firecracker, native, nothing };

class ManagerClient final : public ClientProcess {
 public:
  // What all have in common.
  struct Surroundings {
    Story& story;
    RealDescriptors& descriptors;  // by which the manager gets at their memory
    const Managers& managers;
    Places& places;
  };

  // Not beside other threads: a process is forked from this one.
  ManagerClient(const Surroundings& around, sim::Process& simulated);
  // The child of a fork(2).
  ManagerClient(const Surroundings& around, sim::Process& simulated, const ManagerClient& parent,
                ExpectedMemory its_memory);

  Speaks speaks() const { return speaks_; }
  // One that speaks the native protocol touches its memory when it has been told that it may.
  bool may_run() const { return process.alive() && (speaks_ != Speaks::native || has_session_); }
  // Whether a thread may do that now: what the client has asked for may forbid it.
  bool may_do(const Doing& doing) const;
  // What it has asked to drop, and has no answer of.
  std::span<const AddressRange> dropping() const { return dropping_; }
  // Nobody knows what memory shows there: it is not looked at any more.
  void forget(AddressRange range);
  bool is_unknown(Address address) const;

  // It says that it wants to be served, if it is not; what comes of that is heard later.
  void connect();
  // One of the things that one can ask that is served.
  void ask_something();
  void break_connection();
  void kill();
  // All that has come for it; also whether the manager has killed it.
  void hear();
  // The manager has ended. What a successor could not find is complete.
  void lose_manager();
  // What it waits for still, if it is alive; empty: for nothing.
  std::string waits_for() const;

 private:
  enum class Stage : std::uint8_t {
    outside,   // nobody serves it
    asking,    // it has connected, and wants to be served
    served,    //
    complete,  // nobody needs to serve it any more
  };
  using Hear = std::function<void(native::Answer&)>;

  ManagerClient(const Surroundings& around, sim::Process& simulated, Speaks how);
  void ask(native::Request request, Hear hear);
  void ask_to_be_served();
  void add_region();
  void drop_region();
  void ask_to_drop(AddressRange range);
  void detach();
  void hear(Piece piece);
  void hear_attached(native::Answer& answer);
  void lose_connection();
  // Whether something is under way there.
  bool is_in_use(AddressRange range) const;

  Story& story_;
  RealDescriptors& descriptors_;
  const Managers& managers_;
  Places& places_;
  const Speaks speaks_;
  Stage stage_ = Stage::outside;
  AddressRange region_{};
  std::uint64_t first_page_ = 0;  // of the image, which the region shows
  std::unique_ptr<test::Child> real_;

  UniqueFd socket_;
  int handed_over_ = -1;  // what goes through it
  native::FrameReader reader_{native::FrameReader::Reads::answers};
  std::uint32_t last_request_ = 0;
  std::map<std::uint32_t, Hear> asked_;  // by request
  std::vector<AddressRange> dropping_;
  std::vector<AddressRange> dropped_;  // where mappings begin and end that mremap(2) takes for several
  std::vector<AddressRange> unknown_;  // what it shows
  bool has_session_ = false;
  bool detaching_ = false;
  bool releasing_ = false;  // it wants no more of what it has not got, from then on
  native::SessionId session_{};
  UniqueFd state_file_;
};

}  // namespace uffdkit::simulate
