// The example programs, as a reader would run them.
#include <fcntl.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "daemon/fixture.h"
#include "support/program.h"

namespace uffdkit::test {
namespace {

TEST(Attach, PrintsHowMuchOfAnImageItWentThrough) {
  if (const std::string lacking = clients_lack(); !lacking.empty()) GTEST_SKIP() << lacking;
  const TempDir directory;
  const Image image(directory / "image", 256);
  const std::string socket = directory / "native.sock";
  ManagerProcess manager(directory, {"--listen", socket, "--image", "guest=" + image.path()});
  const Finished run = run_program("attach", {socket, "guest"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  std::uint64_t sum = 0;
  std::array<std::byte, 4096> bytes;
  for (std::size_t page = 0; page < image.pages(); ++page) {
    image.fill(page, bytes);
    for (const std::byte byte : bytes) sum += std::to_integer<std::uint64_t>(byte);
  }
  EXPECT_NE(run.out.find("1048576 bytes"), std::string::npos) << run.out;
  EXPECT_NE(run.out.find("sum " + std::to_string(sum)), std::string::npos) << run.out;
  EXPECT_EQ(run_program("attach", {socket, "other"}).exit_code, 1);
  EXPECT_EQ(run_program("attach", {}).exit_code, 2);
}

#ifdef HAVE_TINYVMM

// A guest of 64 MiB; with KVM, or as threads.
class Tinyvmm : public testing::TestWithParam<bool> {
 protected:
  void SetUp() override {
    if (const std::string lacking = clients_lack(); !lacking.empty()) GTEST_SKIP() << lacking;
    if (GetParam() && access("/dev/kvm", R_OK | W_OK) != 0) GTEST_SKIP() << "needs /dev/kvm";
    run({"snapshot", "--memory", "64M", "--out", snapshot_});
  }

  void run(std::vector<std::string> arguments) const {
    if (!GetParam()) arguments.push_back("--no-kvm");
    const Finished run = run_program("tinyvmm", arguments);
    EXPECT_EQ(run.exit_code, 0) << testing::PrintToString(arguments) << run.out << run.err;
  }
  // Resumes a guest that `manager` serves lazily.
  void resume(const std::vector<std::string>& further) const {
    const std::string socket = directory_ / "fc.sock";
    ManagerProcess manager(directory_, {"--firecracker", socket + "=" + snapshot_ + "/vm.mem"});
    std::vector<std::string> arguments = {"resume", "--dir", snapshot_, "--uffd", socket, "--timeout", "60"};
    arguments.insert(arguments.end(), further.begin(), further.end());
    run(arguments);
    EXPECT_TRUE(eventually([&] { return manager.sessions() == 0; }));
    EXPECT_GT(manager.total("pages_copied"), 0u);
    EXPECT_EQ(manager.count("clients_refused"), 0u) << manager.log();
  }

  const TempDir directory_;
  const std::string snapshot_ = directory_ / "snapshot";
};

INSTANTIATE_TEST_SUITE_P(Guest, Tinyvmm, testing::Bool(), [](const testing::TestParamInfo<bool>& kvm) {
  return kvm.param ? "WithKvm" : "WithoutKvm";
});

TEST_P(Tinyvmm, AGuestThatIsReadEagerlyVerifiesItsMemory) {
  run({"resume", "--dir", snapshot_, "--eager"});
}

TEST_P(Tinyvmm, AGuestThatIsServedLazilyVerifiesItsMemory) {
  resume({});
}

TEST_P(Tinyvmm, FourClonesAtOnceVerifyTheirMemory) {
  resume({"--clones", "4"});
}

TEST_P(Tinyvmm, AGuestWithABalloonAndSixRegionsVerifiesItsMemory) {
  resume({"--balloon", "--regions", "6"});
}

#endif

}  // namespace
}  // namespace uffdkit::test
