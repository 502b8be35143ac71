// uffdkit doctor as a program: exit codes, and what goes to which stream.
#include <gtest/gtest.h>
#include <seccomp.h>
#include <sys/mman.h>
#include <uffdkit/uffd.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "support/client.h"
#include "support/huge_pages.h"
#include "support/program.h"

namespace uffdkit {
namespace {

using test::Finished;
using test::kNobody;

Finished doctor(std::vector<std::string> arguments, uid_t as = 0) {
  arguments.insert(arguments.begin(), "doctor");
  return test::run_program("uffdkit", arguments, as);
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

bool can_create(bool kernel_faults) {
  return Uffd::create({.kernel_faults = kernel_faults}).has_value();
}

TEST(Doctor, ReportsWithinAHundredColumns) {
  const Finished run = doctor({});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.err, "");
  std::istringstream lines(run.out);
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
  for (const char* part : {"Ways to create", "event-remove", "anonymous", "RLIMIT_NOFILE", "/dev/kvm"})
    EXPECT_TRUE(contains(run.out, part)) << part;
}

TEST(Doctor, JsonHoldsTheWholeReport) {
  const Finished run = doctor({"--json"});
  ASSERT_EQ(run.exit_code, 0) << run.err;
  const auto report = nlohmann::json::parse(run.out);
  EXPECT_EQ(report.at("ways").size(), 4u);
  EXPECT_EQ(report.at("features").at("known").size(), known_features().size());
  EXPECT_EQ(report.at("user").at("uid").get<uid_t>(), geteuid());
  EXPECT_FALSE(report.contains("needs"));
  if (const Result<KernelFeatures> kernel = probe_features()) {
    EXPECT_EQ(report.at("features").at("mask").get<std::uint64_t>(), kernel->available.bits);
    EXPECT_EQ(report.at("memory").size(), 7u);
  }
}

TEST(Doctor, JsonAnswersWhatWasAskedFor) {
  const Finished run = doctor({"--json", "--need", "user-faults,event-remove"});
  const auto needs = nlohmann::json::parse(run.out).at("needs");
  ASSERT_EQ(needs.size(), 2u);
  EXPECT_EQ(needs[0].at("need"), "user-faults");
  EXPECT_EQ(run.exit_code == 0, needs[0].at("met").get<bool>() && needs[1].at("met").get<bool>());
}

TEST(Doctor, FindsTheAbilitiesThatThisProcessHas) {
  const Result<Uffd> uffd =
      Uffd::create({.required = Features(abi::kFeaturePoison | abi::kFeatureEventFork)});
  if (!uffd) GTEST_SKIP() << "needs a userfaultfd with every feature: " << uffd.error().text();
  const Finished run = doctor({"--need", "kernel-faults,user-faults,poison,fork-events,event-fork"});
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.err, "");
}

TEST(Doctor, SaysForKernelFaultsWhatThisProcessFinds) {
  EXPECT_EQ(doctor({"--need", "kernel-faults"}).exit_code, can_create(true) ? 0 : 1);
  EXPECT_EQ(doctor({"--need", "user-faults"}).exit_code, can_create(false) ? 0 : 1);
}

TEST(Doctor, RefusesAnUnknownAbilityAndListsThoseThatThereAre) {
  for (const char* list : {"telepathy", "wp,telepathy", "", "wp,", ",wp"}) {
    const Finished run = doctor({"--need", list});
    EXPECT_EQ(run.exit_code, 2) << list;
    EXPECT_EQ(run.out, "") << list;
    EXPECT_TRUE(contains(run.err, "kernel-faults, user-faults")) << run.err;
  }
}

TEST(Doctor, RefusesAnUnknownOption) {
  EXPECT_EQ(doctor({"--cure"}).exit_code, 2);
}

TEST(Doctor, SaysWhatASeccompFilterRefusesAndWhatToDo) {
  test::Child confined = test::program([](const test::Channel&) {
    const std::unique_ptr<void, decltype(&seccomp_release)> filter(seccomp_init(SCMP_ACT_ALLOW),
                                                                   &seccomp_release);
    test::require(seccomp_rule_add(filter.get(), SCMP_ACT_ERRNO(EPERM), SCMP_SYS(userfaultfd), 0) == 0 &&
                      seccomp_rule_add(filter.get(), SCMP_ACT_ERRNO(ENOSYS), SCMP_SYS(openat2), 0) == 0 &&
                      seccomp_load(filter.get()) == 0,
                  "no filter");
    const Finished text = doctor({});
    test::require(
        contains(text.out, "a filter is active; no new privileges; refused: userfaultfd, openat2") &&
            contains(text.out, "--security-opt"),
        text.out);
    const auto report = nlohmann::json::parse(doctor({"--json"}).out);
    test::require(report.at("confinement").at("seccomp_mode") == 2, "the mode");
    bool advised = false;
    for (const auto& advice : report.at("advice")) advised = advised || advice.at("need") == "seccomp";
    test::require(advised, "no advice");
  });
  EXPECT_EQ(confined.wait(), 0);
}

class DoctorForNobody : public testing::Test {
 protected:
  void SetUp() override {
    if (geteuid() != 0) GTEST_SKIP() << "needs root, to become a user without rights";
    int everybody = 0;
    std::ifstream("/proc/sys/vm/unprivileged_userfaultfd") >> everybody;
    if (everybody != 0) GTEST_SKIP() << "needs vm.unprivileged_userfaultfd=0";
  }
};

TEST_F(DoctorForNobody, RefusesKernelFaultsWithTheRemediesOnTheErrorStream) {
  const Finished run = doctor({"--need", "kernel-faults"}, kNobody);
  EXPECT_EQ(run.exit_code, 1);
  EXPECT_TRUE(contains(run.out, "kernel-faults")) << run.out;
  for (const char* part : {"/dev/userfaultfd", "setfacl", "CAP_SYS_PTRACE", "vm.unprivileged_userfaultfd=1"})
    EXPECT_TRUE(contains(run.err, part)) << run.err;
}

TEST_F(DoctorForNobody, AllowsUserFaults) {
  const Finished run = doctor({"--need", "user-faults,event-remove"}, kNobody);
  EXPECT_EQ(run.exit_code, 0) << run.err;
  EXPECT_EQ(run.err, "");
}

TEST_F(DoctorForNobody, SaysThatForkEventsAreThereButNotPermitted) {
  const Finished run = doctor({"--json", "--need", "fork-events"}, kNobody);
  EXPECT_EQ(run.exit_code, 1);
  const auto report = nlohmann::json::parse(run.out);
  EXPECT_FALSE(report.at("fork_events_permitted"));
  EXPECT_FALSE(report.at("user").at("cap_sys_ptrace"));
  EXPECT_TRUE(contains(run.err, "CAP_SYS_PTRACE"));
}

TEST(DoctorOnHugePages, FindsTheFreeOnesAndTakesNone) {
  const test::HugePages pool(2);
  if (!pool.lacking().empty()) GTEST_SKIP() << pool.lacking();
  const auto free_pages = [] {
    std::size_t pages = 0;
    std::ifstream("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages") >> pages;
    return pages;
  };
  const std::size_t before = free_pages();
  EXPECT_EQ(doctor({"--need", "huge-pages"}).exit_code, 0);
  EXPECT_EQ(free_pages(), before);
}

}  // namespace
}  // namespace uffdkit
