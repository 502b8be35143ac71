// A client of the engine: a simulated process, and the session that serves it. It is that session's host, by
// the clock of its world.
#pragma once

#include <uffdkit/sim.h>
#include <uffdkit/uffd.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "engine/session.h"
#include "simulate/client_process.h"
#include "simulate/engine_seam.h"
#include "simulate/expected.h"
#include "simulate/story.h"
#include "simulate/world.h"

namespace uffdkit::simulate {

struct EngineClient final : ClientProcess, SessionHost {
  EngineClient(Story& its_story, const std::int64_t& clock_ns, sim::Process& its_process)
      : ClientProcess(its_process), story(its_story), clock(clock_ns) {}

  // SessionHost
  std::int64_t now_ns() override { return clock; }
  std::span<std::byte> scratch() override { return scratch_memory; }
  bool gives_way() override { return story.one_in(4); }
  void start_fetch(StoreLane&, std::unique_ptr<Fetch> fetch) override { reading.push_back(std::move(fetch)); }
  bool kill_client() override {
    process.kill();
    return true;
  }
  bool client_has_exited() override { return !process.alive(); }
  bool stop_client() override { return false; }
  void continue_client() override {}
  Result<void> forked(std::unique_ptr<ForkedSession>& born) override {
    newborn = std::move(born);
    return {};
  }
  void page_failed(const Error&) override {}
  void detach_failed(const Error&) override {}
  void warn(const std::string&) override {}

  // A session begins to serve it as the seed says; what it is brought unasked comes by `lane`.
  void begin_session(Uffd its_uffd, SessionState state, std::vector<std::shared_ptr<StoreLane>> lanes,
                     const std::shared_ptr<StoreLane>& lane);
  // Whether the session has something to do now.
  bool is_due(const ManagerCalls& manager) const;
  // Whether something will come for it by itself.
  bool waits() const { return next.wake_at_ns != 0 || !reading.empty(); }
  // One of the reads that it waits for has come, if there are any.
  void give_back_a_fetch(Bug bug);
  // If the session has come to its end, it is gone.
  void look_at_end();

  Story& story;
  const std::int64_t& clock;
  std::unique_ptr<Session> session;
  Session::Next next{.again = true};
  bool shares = false;                      // its memory, with another client
  bool is_ending = false;                   // its session was told to end
  SharingMode sharing = SharingMode::none;  // of the image's memory, which the manager fills for all
  bool huge = false;                        // hugetlbfs
  // Between a fork and what the manager makes of it: the parent has the child's session, or the child knows
  // that one will come.
  std::unique_ptr<ForkedSession> newborn;
  EngineClient* awaits_session_of = nullptr;
  bool mail = false;
  bool was_alive = true;
  std::vector<std::unique_ptr<Fetch>> reading;
  std::vector<std::byte> scratch_memory = std::vector<std::byte>(kFetchGranulesMax * kPage);

 private:
  // Pages of the image in any order are brought before they are asked for.
  void prefetch(const std::shared_ptr<StoreLane>& lane);
  // As an engine would that does not know what was removed while it read.
  void forget_removals(const Fetch& fetch);
};

}  // namespace uffdkit::simulate
