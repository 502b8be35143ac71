// `uffdkit serve` as a process of its own, as an operator runs it.
#pragma once

#include <sys/types.h>
#include <uffdkit/unique_fd.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/paths.h"
#include "support/temp_dir.h"

namespace uffdkit::test {

// What a client costs the manager while it is there, and must have given back when it is gone.
struct Footprint {
  std::size_t descriptors;
  std::size_t threads;
  std::size_t state_mappings;  // of sessions' state files
  // Whether there is no more of anything than in `other`.
  bool within(const Footprint& other) const {
    return descriptors <= other.descriptors && threads <= other.threads &&
           state_mappings <= other.state_mappings;
  }
};
std::ostream& operator<<(std::ostream& out, const Footprint& footprint);

// Waits until `holds`; false when it does not within half a minute, far more than anything takes.
bool eventually(const std::function<bool()>& holds);

class ManagerProcess {
 public:
  struct Setting {
    std::vector<std::string> environment = {};  // "NAME=VALUE", added to the test's own
    std::size_t descriptors_max = 0;            // RLIMIT_NOFILE; 0: as it is
    std::string program = built("uffdkit");
    std::chrono::milliseconds lifetime = std::chrono::seconds(100);  // then it is killed
  };

  // Starts `uffdkit serve ARGUMENTS --control DIR/control.sock` and waits until it says that it is ready;
  // throws with what it said if it does not. Its stderr is kept in `directory`.
  ManagerProcess(const TempDir& directory, const std::vector<std::string>& arguments);
  ManagerProcess(const TempDir& directory, const std::vector<std::string>& arguments, const Setting& setting);
  ~ManagerProcess();
  ManagerProcess(const ManagerProcess&) = delete;
  ManagerProcess& operator=(const ManagerProcess&) = delete;

  // The process that was started: the keeper. It and what it has started are a process group of their own.
  pid_t pid() const { return pid_; }
  // The process that serves at this moment.
  pid_t worker_pid() const { return status().at("worker").at("pid").get<pid_t>(); }
  const std::string& control() const { return control_; }
  // The line by which it said that it is ready.
  const std::string& ready_line() const { return ready_line_; }

  // The answer to one line on the control socket.
  nlohmann::json ask(const std::string& line, int attempts_left = 1000) const;
  nlohmann::json status() const { return ask(R"({"command":"status"})"); }
  std::size_t sessions() const { return status().at("sessions").size(); }
  std::uint64_t count(const char* name) const { return status().at(name).get<std::uint64_t>(); }
  // Of all sessions, those that ended too.
  std::uint64_t total(const char* counter) const;

  Footprint footprint() const;
  // User and system time that it has taken so far.
  std::chrono::milliseconds cpu_time() const;

  // What it has written to stderr.
  std::string log() const;
  bool logged(const std::string& text) const { return log().find(text) != std::string::npos; }

  void signal(int number) const;
  // Waits for its end. Returns its exit code, or minus the signal that ended it.
  int wait();
  // Ends it by SIGTERM.
  int stop();
  // Ends all of its processes at once by SIGKILL.
  void kill();

 private:
  std::string control_;
  std::string log_path_;
  std::string ready_line_;
  UniqueFd out_;
  pid_t pid_ = -1;
  pid_t guard_ = -1;
  UniqueFd guard_pipe_;
};

}  // namespace uffdkit::test
