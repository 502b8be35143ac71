// All clients of the manager, and what the threads of each do to its memory: they read, write, madvise,
// munmap, mremap and fork, one turn at a time.
#pragma once

#include <uffdkit/sim.h>
#include <uffdkit/units.h>

#include <memory>
#include <string>
#include <vector>

#include "simulate/client_process.h"
#include "simulate/manager_client.h"
#include "simulate/managers.h"
#include "simulate/real_descriptors.h"
#include "simulate/story.h"

namespace uffdkit::simulate {

class Clients {
 public:
  Clients(Story& story, sim::Kernel& kernel, RealDescriptors& descriptors, const Managers& managers);
  Clients(const Clients&) = delete;
  Clients& operator=(const Clients&) = delete;

  // A new one. Not beside other threads.
  void add();
  const std::vector<std::unique_ptr<ManagerClient>>& all() const { return all_; }

  void begin_something(ManagerClient& client);
  void begin(ManagerClient& client, Worker& worker, Doing doing);
  // One turn of one thread, if any can move; what it has done is looked at at once, so that all is in a known
  // order.
  bool turn();
  // What one of them waits for still; empty: for nothing.
  std::string wait_for() const;

 private:
  void look_at(ManagerClient& client, Worker& worker);

  Story& story_;
  sim::Kernel& kernel_;
  RealDescriptors& descriptors_;
  Places places_;
  const ManagerClient::Surroundings around_;
  std::vector<std::unique_ptr<ManagerClient>> all_;
  std::vector<std::unique_ptr<ManagerClient>> newcomers_;  // born in this turn
};

}  // namespace uffdkit::simulate
