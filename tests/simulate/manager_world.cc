#include "simulate/manager_world.h"

#include <fmt/format.h>
#include <uffdkit/sim.h>
#include <uffdkit/units.h>

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <iterator>
#include <string>
#include <vector>

#include "base/check.h"
#include "simulate/clients.h"
#include "simulate/expected.h"
#include "simulate/manager_client.h"
#include "simulate/manager_seam.h"
#include "simulate/managers.h"
#include "simulate/real_descriptors.h"
#include "simulate/story.h"
#include "simulate/visitors.h"

namespace uffdkit::simulate {
namespace {

constexpr std::size_t kClients = 5;
constexpr int kSteps = 1500;
// Nothing that is on its way takes longer: a stranger is shown out after 5 s.
constexpr std::int64_t kPatienceNs = 6'000'000'000;

std::size_t open_descriptors() {
  const std::filesystem::directory_iterator all("/proc/self/fd");
  return static_cast<std::size_t>(std::distance(begin(all), end(all)));
}

class ManagerWorld {
 public:
  ManagerWorld(std::uint64_t seed, ManagerBug bug)
      : story_(seed),
        threads_(seed, bug),
        kernel_({.seed = seed}),
        descriptors_(kernel_.spawn()),
        calls_(threads_, descriptors_, seed, bug),
        managers_(story_, threads_, calls_),
        clients_(story_, kernel_, descriptors_, managers_),
        operators_(story_, managers_),
        strangers_(story_, managers_) {
    // Before there are threads: each has a process that is forked from this one.
    for (std::size_t i = 0; i < kClients; ++i) clients_.add();
    managers_.start();
  }

  ~ManagerWorld() {
    if (managers_.is_running()) give_up();
    while (threads_.others() != 0)
      if (threads_.run_until_idle() && threads_.others() != 0) CHECK(threads_.let_time_pass());
  }

  Found run() {
    for (int step = 0; step < kSteps && story_.is_right(); ++step) {
      act();
      go_on();
    }
    rest();
    look_at_everything();
    end();
    Found found = story_.tell();
    found.trace = threads_.trace() ^ story_.trace();
    return found;
  }

 private:
  // ---- what happens

  void act() {
    ManagerClient& client = *clients_.all()[story_.draw(clients_.all().size())];
    const std::uint64_t what = story_.draw(200);
    if (what < 90) {
      clients_.begin_something(client);
    } else if (what < 150) {
      clients_.turn();
    } else if (what < 160) {
      client.connect();
    } else if (what < 165) {
      client.ask_something();
    } else if (what == 165) {
      if (story_.one_in(3)) client.break_connection();
    } else if (what == 166) {
      if (story_.one_in(6)) client.kill();
    } else if (what == 167) {
      if (story_.one_in(4)) managers_.tell_to_end();
    } else if (what == 168) {
      operators_.ask_something();
    } else if (what == 170) {
      strangers_.add();
    } else if (what == 169) {
      // So what comes by the clock alone comes between other things, too.
      if (threads_.run_until_idle(100)) (void)threads_.let_time_pass();
    }
  }

  // All that follows by itself, and the turn of somebody else.
  void go_on() {
    hear_all();
    for (const std::string& text : kernel_.violations()) story_.fail(text);
    if (managers_.has_ended()) {
      bury_manager();
      managers_.start();
    }
    threads_.yield();
  }

  void hear_all() {
    operators_.hear();
    strangers_.hear();
    for (const auto& client : clients_.all()) client->hear();
  }

  // Nothing of a manager that has ended may be left.
  void bury_manager() {
    managers_.bury();
    hear_all();
    if (threads_.got_stuck()) story_.fail("the threads of a manager that ends wait for each other");
    if (!managers_.has_ended_well()) story_.fail("the manager says that a client could not be completed");
    if (descriptors_.held() != 0)
      story_.fail(fmt::format("the manager has kept {} userfaultfds", descriptors_.held()));
    for (const auto& client : clients_.all()) client->lose_manager();
  }

  // ---- what must come of it

  // What is under way still; empty if nothing is.
  std::string unfinished() const {
    if (!operators_.unanswered().empty())
      return "an operator waits for an answer: " + operators_.unanswered();
    if (!strangers_.are_gone()) return "a stranger is not shown out";
    return clients_.wait_for();
  }

  // Nothing new is begun; all that is under way comes to its end.
  void rest() {
    std::int64_t until_ns = threads_.clock_ns() + kPatienceNs;
    while (story_.is_right()) {
      for (const auto& client : clients_.all()) client->connect();
      const bool moved = clients_.turn();
      if (managers_.has_ended()) until_ns = threads_.clock_ns() + kPatienceNs;
      if (managers_.is_ending() && !managers_.has_ended())
        until_ns = std::max(until_ns, managers_.ends_by_ns());
      go_on();
      if (moved) continue;
      const bool idle = threads_.run_until_idle();
      hear_all();
      const std::string left = unfinished();
      if (left.empty() && !managers_.is_ending()) return;
      if (threads_.clock_ns() > until_ns)
        return story_.fail(left.empty() ? "the manager does not end" : left);
      if (clients_.turn() || managers_.has_ended() || !idle) continue;
      if (!threads_.let_time_pass()) return story_.fail(left);
    }
  }

  void look_at_everything() {
    for (const auto& client : clients_.all()) {
      if (!client->process.alive()) continue;
      std::vector<Address> addresses;
      for (const auto& [address, page] : client->memory.pages()) addresses.emplace_back(address);
      for (const Address address : addresses) {
        if (!story_.is_right()) return;
        Worker& worker = client->workers[story_.draw(client->workers.size())];
        if (!worker.is_idle()) rest();
        if (!story_.is_right()) return;
        if (client->memory.find(address) == nullptr) continue;
        clients_.begin(
            *client, worker,
            {.kind = Doing::Kind::access, .access = {.address = address + ByteCount(story_.draw(kPage))}});
        clients_.turn();
      }
      rest();
    }
  }

  // The last manager ends while nobody does anything, and nothing is left of it.
  void end() {
    if (!story_.is_right()) return;
    managers_.tell_to_end();
    const std::int64_t until_ns = threads_.clock_ns() + Managers::kEndNs;
    while (!managers_.has_ended()) {
      while (clients_.turn()) continue;
      hear_all();
      const bool idle = threads_.run_until_idle();
      if (threads_.clock_ns() > until_ns) return story_.fail("the manager does not end");
      if (managers_.has_ended() || clients_.turn() || !idle) continue;
      CHECK(threads_.let_time_pass());
    }
    bury_manager();
    (void)threads_.run_until_idle();
    if (threads_.others() != 0) story_.fail(fmt::format("{} threads are left", threads_.others()));
  }

  // Something was wrong: who waits for what does not come would not end, and the manager not before its
  // clients.
  void give_up() {
    threads_.mend();
    for (const auto& client : clients_.all()) client->kill();
    managers_.give_up();
  }

  Story story_;
  PlantedThreads threads_;
  sim::Kernel kernel_;
  RealDescriptors descriptors_;
  YieldingCalls calls_;
  Managers managers_;
  Clients clients_;
  Operators operators_;
  Strangers strangers_;
};

}  // namespace

Found run_manager(std::uint64_t seed, ManagerBug bug) {
  const std::size_t before = open_descriptors();
  Found found;
  {
    ManagerWorld world(seed, bug);
    found = world.run();
  }
  const std::size_t after = open_descriptors();
  if (found.wrong.empty() && after != before)
    found.wrong = fmt::format("{} descriptors are open in the end, of {} before", after, before);
  return found;
}

std::uint64_t first_seed_that_finds(ManagerBug bug, std::uint64_t most) {
  for (std::uint64_t seed = 1; seed <= most; ++seed)
    if (!run_manager(seed, bug).wrong.empty()) return seed;
  return 0;
}

}  // namespace uffdkit::simulate
