// What every test of a running manager needs.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "support/client.h"
#include "support/image.h"
#include "support/manager_process.h"
#include "support/temp_dir.h"

namespace uffdkit::test {

// A directory of the test's own; skipped where this user can have no client's memory served.
class ManagerTest : public testing::Test {
 protected:
  void SetUp() override {
    if (const std::string lacking = clients_lack(); !lacking.empty()) GTEST_SKIP() << lacking;
  }

  // The options for one Firecracker socket.
  static std::vector<std::string> firecracker(const std::string& socket, const Image& image) {
    return {"--firecracker", socket + "=" + image.path()};
  }

  const TempDir directory_;
};

}  // namespace uffdkit::test
