// Those who serve a client's faults: a real `uffdkit serve`, or the raw loop in a process of its own.
#pragma once

#include <sys/types.h>
#include <uffdkit/units.h>

#include <memory>
#include <string>
#include <vector>

#include "harness/raw_loop.h"
#include "support/child.h"

namespace uffdkit::bench {

class Server {
 public:
  virtual ~Server() = default;
  virtual pid_t pid() const = 0;
  // Whether it wants a userfaultfd whose read(2) does not block.
  virtual bool non_blocking() const = 0;
  // Called in the client: gives away `uffd`, whose `memory` shows the image from its start on. The connection
  // is to be kept until the client's end.
  virtual UniqueFd hand_over(int uffd, AddressRange memory) const = 0;
};

// The raw loop: a process, and in it a thread for each client.
class RawServer final : public Server {
 public:
  RawServer(raw_way way, const std::string& image);
  pid_t pid() const override { return child_.pid(); }
  bool non_blocking() const override { return way_ == RAW_POLL; }
  UniqueFd hand_over(int uffd, AddressRange memory) const override;

 private:
  const raw_way way_;
  test::Child child_;
};

// `uffdkit serve --firecracker DIRECTORY/...=IMAGE OPTIONS...`
class UffdkitServer final : public Server {
 public:
  // Returns when it is ready. Throws if it does not come up.
  UffdkitServer(const std::string& binary, const std::string& directory, const std::string& image,
                const std::vector<std::string>& options);
  pid_t pid() const override { return child_->pid(); }
  bool non_blocking() const override { return true; }
  UniqueFd hand_over(int uffd, AddressRange memory) const override;

 private:
  std::string socket_;
  std::unique_ptr<test::Child> child_;
};

}  // namespace uffdkit::bench
