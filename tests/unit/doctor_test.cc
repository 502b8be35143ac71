// What the doctor makes of a report: needs, advice and its printing.
#include <gtest/gtest.h>

#include <algorithm>
#include <cerrno>
#include <nlohmann/json.hpp>
#include <sstream>

#include "tool/doctor_report.h"

namespace uffdkit::tool {
namespace {

// A machine on which all works.
DoctorReport healthy() {
  DoctorReport report;
  report.kernel_release = "6.18.0";
  for (const CreateWay way :
       {CreateWay::device, CreateWay::system_call, CreateWay::device_user_mode, CreateWay::user_mode})
    report.kernel.ways.push_back({.way = way, .os_error = 0, .reason = {}, .remedy = {}});
  report.kernel.features = Features(abi::kFeaturesKnown);
  report.kernel.fork_events_permitted = true;
  report.kernel.pagemap_scan_error = 0;
  const auto accepts = [](RegisterModes modes, bool asynchronous) {
    return RegisterProbe{
        .modes = modes, .asynchronous = asynchronous, .os_error = 0, .ioctls = RangeIoctls(0x13c)};
  };
  report.kernel.memory = {{.name = "anonymous",
                           .lacking = {},
                           .modes = {accepts(kWriteProtect, false), accepts(kWriteProtect, true)}},
                          {.name = "shmem shared", .lacking = {}, .modes = {accepts(kMinor, false)}}};
  report.huge_pages = {{.page_kib = 2048, .pages = 4, .free = 2}};
  report.kvm = {.os_error = 0, .api_version = 12};
  report.shmem_thp = "never";
  report.descriptors = {.soft = 65536, .hard = 65536};
  report.map_count_max = 65530;
  return report;
}

// The same without these ways.
DoctorReport without_ways(std::initializer_list<CreateWay> refused) {
  DoctorReport report = healthy();
  for (CreateAttempt& attempt : report.kernel.ways)
    if (std::ranges::find(refused, attempt.way) != refused.end())
      attempt = {.way = attempt.way, .os_error = EPERM, .reason = "refused here", .remedy = "ask for it"};
  return report;
}

bool is_met(std::string_view need, const DoctorReport& report) {
  const NeedAnswer answer = answer_need(need, report);
  EXPECT_EQ(answer.need, need);
  EXPECT_EQ(answer.reason.empty(), answer.met) << need;
  EXPECT_EQ(answer.remedy.empty(), answer.met) << need;
  return answer.met;
}

TEST(Needs, AreAllMetOnAHealthyMachine) {
  for (const std::string& need : need_words()) EXPECT_TRUE(is_met(need, healthy())) << need;
}

TEST(Needs, HoldEveryFeatureThatIsKnown) {
  const std::vector<std::string> words = need_words();
  for (const FeatureInfo& info : known_features())
    EXPECT_EQ(std::ranges::count(words, info.name), 1) << info.name;
}

TEST(Needs, KernelFaultsTakeOneWayThatSeesThem) {
  EXPECT_TRUE(is_met("kernel-faults", without_ways({CreateWay::device})));
  EXPECT_TRUE(is_met("kernel-faults", without_ways({CreateWay::system_call})));
  EXPECT_FALSE(is_met("kernel-faults", without_ways({CreateWay::device, CreateWay::system_call})));
}

TEST(Needs, UserFaultsTakeAnyWay) {
  EXPECT_TRUE(is_met("user-faults", without_ways({CreateWay::device, CreateWay::system_call})));
  EXPECT_FALSE(is_met("user-faults", without_ways({CreateWay::device, CreateWay::system_call,
                                                   CreateWay::device_user_mode, CreateWay::user_mode})));
}

TEST(Needs, KernelFaultsNameOnlyTheWaysThatSeeThem) {
  const NeedAnswer answer =
      answer_need("kernel-faults", without_ways({CreateWay::device, CreateWay::system_call}));
  EXPECT_EQ(answer.remedy, "/dev/userfaultfd: ask for it\nuserfaultfd system call: ask for it");
}

TEST(Needs, FeaturesAreMetByTheKernelsBitsAndNameTheirVersion) {
  DoctorReport report = healthy();
  report.kernel.features = report.kernel.features - Features(abi::kFeaturePoison);
  const NeedAnswer answer = answer_need("poison", report);
  EXPECT_FALSE(answer.met);
  EXPECT_NE(answer.remedy.find("6.6"), std::string::npos);
  EXPECT_TRUE(is_met("move", report));
}

TEST(Needs, FeaturesOfAKernelThatGivesNoUserfaultfdSayWhy) {
  DoctorReport report = without_ways(
      {CreateWay::device, CreateWay::system_call, CreateWay::device_user_mode, CreateWay::user_mode});
  report.kernel.features = Features();
  const NeedAnswer answer = answer_need("poison", report);
  EXPECT_FALSE(answer.met);
  EXPECT_NE(answer.reason.find("refused here"), std::string::npos);
  EXPECT_NE(answer.remedy.find("ask for it"), std::string::npos);
}

TEST(Needs, RegistrationMustHaveBeenSeenToWork) {
  DoctorReport report = healthy();
  for (MemoryProbe& memory : report.kernel.memory)
    for (RegisterProbe& mode : memory.modes) mode.os_error = EINVAL;
  for (const char* need : {"wp", "wp-async", "minor"}) EXPECT_FALSE(is_met(need, report)) << need;
}

TEST(Needs, ForkEventsMustBePermittedToo) {
  DoctorReport report = healthy();
  report.kernel.fork_events_permitted = false;
  EXPECT_FALSE(is_met("fork-events", report));
  EXPECT_FALSE(is_met("event-fork", report));
}

TEST(Needs, HugePagesMustBeFree) {
  DoctorReport report = healthy();
  report.huge_pages[0].free = 0;
  EXPECT_FALSE(is_met("huge-pages", report));
  report.huge_pages.clear();
  EXPECT_FALSE(is_met("huge-pages", report));
}

TEST(Needs, KvmMustOpen) {
  DoctorReport report = healthy();
  for (const int error : {EACCES, ENOENT, EIO}) {
    report.kvm.os_error = error;
    EXPECT_FALSE(is_met("kvm", report)) << error;
  }
}

TEST(Needs, PagemapScanMustAnswer) {
  DoctorReport report = healthy();
  for (const int error : {ENOTTY, EACCES}) {
    report.kernel.pagemap_scan_error = error;
    EXPECT_FALSE(is_met("pagemap-scan", report)) << error;
  }
}

TEST(ParseNeeds, SplitsAListAtItsCommas) {
  EXPECT_EQ(parse_needs("wp,kvm,event-remove").value(),
            (std::vector<std::string>{"wp", "kvm", "event-remove"}));
}

TEST(ParseNeeds, RefusesWhatItDoesNotKnowAndListsWhatItKnows) {
  for (const char* list : {"", ",", "wp,", "wp,,kvm", "WP", " wp", "unknown"}) {
    const auto needs = parse_needs(list);
    ASSERT_FALSE(needs) << list;
    EXPECT_NE(needs.error().remedy().find("kernel-faults"), std::string::npos);
  }
}

TEST(Advice, IsSilentOnAHealthyMachine) {
  EXPECT_TRUE(advise(healthy()).empty());
}

TEST(Advice, GivesARemedyForEachLack) {
  DoctorReport report = without_ways({CreateWay::device, CreateWay::system_call});
  report.huge_pages.clear();
  report.kvm.os_error = ENOENT;
  report.pidfd_open_error = ENOSYS;
  report.peer_pidfd_error = ENOPROTOOPT;
  report.descriptors.soft = 1024;
  report.map_count_max = 1000;
  report.shmem_thp = "always";
  const std::vector<NeedAnswer> advice = advise(report);
  EXPECT_EQ(advice.size(), 9u);
  for (const NeedAnswer& answer : advice) {
    EXPECT_FALSE(answer.reason.empty()) << answer.need;
    EXPECT_FALSE(answer.remedy.empty()) << answer.need;
  }
}

DoctorReport under_a_filter(std::vector<CallReport> calls) {
  DoctorReport report = healthy();
  report.confinement.seccomp_mode = 2;
  report.confinement.calls = std::move(calls);
  return report;
}

TEST(Advice, NamesTheCallsThatAFilterRefuses) {
  const DoctorReport report =
      under_a_filter({{"userfaultfd", EPERM}, {"memfd_create", 0}, {"openat2", ENOSYS}});
  const std::vector<NeedAnswer> advice = advise(report);
  ASSERT_EQ(advice.size(), 1u);
  EXPECT_EQ(advice[0].need, "seccomp");
  EXPECT_NE(advice[0].reason.find("userfaultfd (Operation not permitted), openat2"), std::string::npos)
      << advice[0].reason;
  EXPECT_EQ(advice[0].reason.find("memfd_create"), std::string::npos);
  EXPECT_NE(advice[0].remedy.find("--security-opt"), std::string::npos);
  EXPECT_NE(doctor_text(report).find("a filter is active; refused: userfaultfd, openat2"), std::string::npos);
  EXPECT_EQ(doctor_json(report, {}).at("confinement").at("system_calls").at(2).at("errno"), ENOSYS);
}

TEST(Advice, IsSilentAboutAFilterThatRefusesNothingThatIsNeeded) {
  const DoctorReport report = under_a_filter({{"userfaultfd", 0}, {"openat2", EINVAL}});
  EXPECT_TRUE(advise(report).empty());
  EXPECT_NE(doctor_text(report).find("no call that serving needs is refused"), std::string::npos);
}

TEST(Advice, TellsAContainersDeviceListFromPermissions) {
  EXPECT_EQ(advise(without_ways({CreateWay::device})).at(0).need, "device");  // EPERM
  DoctorReport report = without_ways({CreateWay::device});
  report.kernel.ways[0].os_error = EACCES;
  EXPECT_TRUE(advise(report).empty());
}

TEST(DoctorText, StaysWithinAHundredColumnsWhateverTheReasons) {
  DoctorReport report = without_ways({CreateWay::device, CreateWay::system_call});
  for (CreateAttempt& attempt : report.kernel.ways)
    for (int i = 0; i < 50; ++i) attempt.reason += " because";
  std::istringstream lines(doctor_text(report));
  for (std::string line; std::getline(lines, line);) EXPECT_LE(line.size(), 100u) << line;
}

TEST(DoctorText, ShowsBitsThatOnlyTheKernelKnows) {
  DoctorReport report = healthy();
  report.kernel.features = Features(abi::kFeaturesKnown | 1ull << 17);
  EXPECT_NE(doctor_text(report).find("bit 17"), std::string::npos);
}

TEST(DoctorJson, KeepsBitsThatOnlyTheKernelKnows) {
  DoctorReport report = healthy();
  report.kernel.features = Features(abi::kFeaturesKnown | 1ull << 17 | 1ull << 63);
  EXPECT_EQ(doctor_json(report, {}).at("features").at("unknown_bits"), nlohmann::json({17, 63}));
}

TEST(Wrapped, BreaksAtSpacesAndIndentsEveryLine) {
  const std::string words(99, 'a');
  EXPECT_EQ(wrapped("one two", 2), "  one two");
  EXPECT_EQ(wrapped("one\ntwo", 2), "  one\n  two");
  EXPECT_EQ(wrapped(words + " b", 1), " " + words + "\n b");
}

}  // namespace
}  // namespace uffdkit::tool
