// What smaps says, and which constraint of MOVE or POISON it breaks.
#include <gtest/gtest.h>
#include <uffdkit/checked.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>
#include <random>
#include <string>

#include "support/scripted_system_calls.h"

namespace uffdkit {
namespace {

using test::ScriptedSystemCalls;

// One area of smaps; `head` is all after the addresses.
std::string area(const std::string& span, const std::string& head, const std::string& flags,
                 const std::string& page = "4 kB") {
  return span + " " + head + "\nSize:    8 kB\nKernelPageSize:  " + page +
         "\nTHPeligible:           0\nProtectionKey:         0\nVmFlags: " + flags + " \n";
}

const std::string kAnonymous = "rw-p 00000000 00:00 0 ";
constexpr Address kDst(0x100000);
constexpr Address kSrc(0x200000);

// A registered destination and a source, of two pages each.
MemoryMap two_areas(const std::string& dst_flags, const std::string& src_flags) {
  return {.areas = parse_smaps(area("100000-102000", kAnonymous, dst_flags) +
                               area("200000-202000", kAnonymous, src_flags))
                       .value(),
          .lowest = Address(4096)};
}

MemoryMap one_area(const std::string& head, const std::string& flags, const std::string& page = "4 kB") {
  return {.areas = parse_smaps(area("100000-102000", head, flags, page)).value(), .lowest = Address(4096)};
}

std::string move_rule(const MemoryMap& map, Address to = kDst, AddressRange from = {kSrc, ByteCount(4096)}) {
  const auto violation = check_move(map, to, from);
  if (!violation) return "none";
  return std::string(violation->side == Side::source ? "source " : "destination ") +
         std::string(to_string(violation->rule));
}

std::string poison_rule(const MemoryMap& map, AddressRange range = {kDst, ByteCount(4096)}) {
  const auto violation = check_poison(map, range);
  return violation ? std::string(to_string(violation->rule)) : "none";
}

Backing backing_of(const std::string& head, const std::string& flags, std::string_view mounts = {}) {
  return parse_smaps(area("100000-102000", head, flags), mounts).value().at(0).backing;
}

TEST(Smaps, GivesRangeNameFlagsKeyAndPageSizeOfEachArea) {
  const std::string text = area("7f00-8f00", "rw-s 00001000 fe:00 5308828      /a file (deleted)",
                                "rd wr sh mr mw me ms lo uw ui", "2048 kB");
  const auto areas = parse_smaps(text);
  ASSERT_TRUE(areas) << areas.error().text();
  ASSERT_EQ(areas->size(), 1u);
  const MappedArea& only = areas->front();
  EXPECT_EQ(only.range, (AddressRange{Address(0x7f00), ByteCount(0x1000)}));
  EXPECT_EQ(only.name, "/a file (deleted)");
  EXPECT_EQ(only.page_size, kPage2M);
  EXPECT_TRUE(only.readable && only.writable && only.shared && only.locked);
  EXPECT_FALSE(only.executable || only.special || only.tagged);
  EXPECT_EQ(only.registered, kWriteProtect | kMinor);
}

TEST(Smaps, TellsAnonymousMemoryFromWhatOnlyLooksLikeIt) {
  EXPECT_EQ(backing_of(kAnonymous, "rd wr"), Backing::anonymous);
  EXPECT_EQ(backing_of(kAnonymous + "  [heap]", "rd wr"), Backing::anonymous);
  EXPECT_EQ(backing_of(kAnonymous + "  [anon:pool]", "rd wr"), Backing::anonymous);
  EXPECT_EQ(backing_of("rw-p 00000000 00:06 4   /dev/zero", "rd wr"), Backing::anonymous);
  EXPECT_EQ(backing_of("rw-s 00000000 00:01 9   /dev/zero (deleted)", "rd wr sh"), Backing::shmem);
  EXPECT_EQ(backing_of("rw-s 00000000 00:01 9   /memfd:x (deleted)", "rd wr sh"), Backing::shmem);
  EXPECT_EQ(backing_of("r-xp 00000000 00:00 0   [vdso]", "rd ex"), Backing::other);
  EXPECT_EQ(backing_of("rw-p 00000000 fe:00 7   /x", "rd wr"), Backing::other);
  EXPECT_EQ(backing_of("rw-p 00000000 fe:00 7   /x", "rd wr um"), Backing::shmem);
  EXPECT_EQ(backing_of("rw-p 00000000 00:0d 7   /x", "rd wr ht um"), Backing::huge_pages);
}

TEST(Smaps, FindsTheFilesOfATmpfsByItsMount) {
  const std::string_view mounts =
      "24 27 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
      "25 24 0:23 / /dev/shm rw,relatime shared:2 master:1 - tmpfs tmpfs rw\n"
      "broken\n";
  EXPECT_EQ(backing_of("rw-s 00000000 00:17 9   /dev/shm/x", "rd wr sh uw", mounts), Backing::shmem);
  EXPECT_EQ(backing_of("rw-s 00000000 00:18 9   /other/x", "rd wr sh uw", mounts), Backing::other);
  EXPECT_EQ(backing_of("rw-s 00000000 fe:00 9   /x", "rd wr sh uw", mounts), Backing::other);
}

TEST(Smaps, RefusesWhatIsNoSmapsAndNamesTheLine) {
  const std::string good = area("1000-2000", kAnonymous, "rd");
  const std::map<std::string, std::string> wrong = {
      {"hello\n", "line 1"},
      {"VmFlags: rd\n", "line 1"},
      {"2000-1000 " + kAnonymous + "\n", "line 1"},
      {"1000-g000 " + kAnonymous + "\n", "line 1"},
      {"1000-2000 rw-p\n", "line 1"},
      {"1000-11111111111111111 " + kAnonymous + "\n", "line 1"},
      {"1000-2000 " + kAnonymous + "\n", "line 1: an area ends without VmFlags"},
      {"1000-2000 " + kAnonymous + "\n" + good, "line 2: an area ends without VmFlags"},
      {good + good, "line 7: an area out of order"},
      {good + "VmFlags: wr\n", "line 7: VmFlags a second time"},
      {"1000-2000 " + kAnonymous + "\nKernelPageSize: 5 kB\n", "line 2: no page size"},
      {"1000-2000 " + kAnonymous + "\nKernelPageSize: 18014398509481988 kB\n", "line 2: no page size"},
      {"1000-2000 " + kAnonymous + "\nProtectionKey: x\n", "line 2: no protection key"},
  };
  for (const auto& [text, where] : wrong) {
    const auto areas = parse_smaps(text);
    ASSERT_FALSE(areas) << text;
    EXPECT_NE(areas.error().text().find(where), std::string::npos) << text << areas.error().text();
  }
}

TEST(Smaps, TakesAnyGarbageWithoutLosingItsOrder) {
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  const std::string good =
      area("1000-2000", kAnonymous, "rd wr um") + area("3000-5000", kAnonymous + " [heap]", "rd", "2048 kB");
  const std::string_view bytes = "0f-: \n:kBVmFlags[/";
  int taken = 0;
  for (int i = 0; i < 20'000; ++i) {
    std::string text = good;
    for (int change = static_cast<int>(random() % 4); change >= 0; --change) {
      const std::size_t at = random() % text.size();
      if (random() % 2 == 0)
        text[at] = bytes[random() % bytes.size()];
      else
        text.erase(at, 1 + random() % 9);
    }
    const auto areas = parse_smaps(text, text);
    if (!areas) continue;
    ++taken;
    for (std::size_t a = 1; a < areas->size(); ++a)
      ASSERT_LE((*areas)[a - 1].range.end(), (*areas)[a].range.start) << text;
  }
  EXPECT_GT(taken, 0);
}

// Files below /proc, each read in pieces.
class ProcFiles : public ScriptedSystemCalls {
 public:
  std::map<std::string, std::string> files;
  int open(const char* path, int flags) override {
    const auto file = files.find(path);
    if (file == files.end()) return -ENOENT;
    const int fd = ScriptedSystemCalls::open(path, flags);
    rest_[fd] = file->second;
    return fd;
  }
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override {
    if (read_error != 0) return -read_error;
    std::string& rest = rest_[fd];
    const std::size_t count = std::min({bytes, rest.size(), std::size_t{7}});
    std::memcpy(buffer, rest.data(), count);
    rest.erase(0, count);
    return static_cast<std::ptrdiff_t>(count);
  }

 private:
  std::map<int, std::string> rest_;
};

TEST(MemoryMap, IsReadInPiecesAndClosesWhatItOpens) {
  ProcFiles system;
  system.files = {{"/proc/7/smaps", area("1000-2000", kAnonymous, "rd wr um")},
                  {"/proc/sys/vm/mmap_min_addr", "65536\n"}};
  const auto map = read_memory_map(7, system);
  ASSERT_TRUE(map) << map.error().text();
  EXPECT_EQ(map->areas.size(), 1u);
  EXPECT_EQ(map->lowest, Address(65536));
  EXPECT_NE(map->find(Address(0x1fff)), nullptr);
  EXPECT_EQ(map->find(Address(0x2000)), nullptr);
  EXPECT_EQ(map->find(Address(0xfff)), nullptr);
  EXPECT_TRUE(system.open_descriptors().empty());
}

TEST(MemoryMap, SaysWhyItCannotBeRead) {
  ProcFiles system;
  EXPECT_NE(read_memory_map(7, system).error().text().find("open /proc/7/smaps"), std::string::npos);
  system.files = {{"/proc/self/smaps", ""}};
  system.read_error = EACCES;
  const auto map = read_memory_map(0, system);
  EXPECT_EQ(map.error().os_error(), EACCES);
  EXPECT_FALSE(map.error().remedy().empty());
  EXPECT_TRUE(system.open_descriptors().empty());
}

TEST(CheckMove, FindsNothingWrongWithTwoAnonymousMappings) {
  EXPECT_EQ(move_rule(two_areas("rd wr um", "rd wr")), "none");
  EXPECT_EQ(move_rule(two_areas("rd wr um lo", "rd wr lo uw")), "none");
}

TEST(CheckMove, NamesWhatIsWrongWithTheNumbers) {
  const MemoryMap map = two_areas("rd wr um", "rd wr");
  EXPECT_EQ(move_rule(map, kDst, {kSrc, ByteCount(0)}), "destination not-empty");
  EXPECT_EQ(move_rule(map, Address(0x100800)), "destination aligned");
  EXPECT_EQ(move_rule(map, kDst, {Address(0x200001), ByteCount(4096)}), "source aligned");
  EXPECT_EQ(move_rule(map, kDst, {kSrc, ByteCount(4097)}), "destination aligned");
  EXPECT_EQ(move_rule(map, Address(0)), "destination in-reach");
  EXPECT_EQ(move_rule(map, kDst, {kSrc, ByteCount(0) - ByteCount(4096)}), "destination in-reach");
  EXPECT_EQ(move_rule(map, Address(0x300000)), "destination mapped");
  EXPECT_EQ(move_rule(map, kDst, {Address(0x202000), ByteCount(4096)}), "source mapped");
  EXPECT_EQ(move_rule(map, Address(0x101000), {kSrc, ByteCount(8192)}), "destination one-mapping");
  EXPECT_EQ(move_rule(map, kDst, {Address(0x201000), ByteCount(8192)}), "source one-mapping");
}

TEST(CheckMove, NamesWhatIsWrongWithTheMappings) {
  EXPECT_EQ(move_rule(two_areas("rd wr", "rd wr")), "destination registered");
  EXPECT_EQ(move_rule(two_areas("rd wr um", "rd wr sh")), "source private-memory");
  EXPECT_EQ(move_rule(two_areas("rd wr sh um", "rd wr")), "destination private-memory");
  EXPECT_EQ(move_rule(two_areas("rd wr um", "rd wr ht")), "source anonymous");
  EXPECT_EQ(move_rule(two_areas("rd um", "rd")), "destination writable");
  EXPECT_EQ(move_rule(two_areas("rd wr um", "rd")), "source writable");
  EXPECT_EQ(move_rule(two_areas("rd wr um", "rd wr ex")), "source same-protection");
  EXPECT_EQ(move_rule(two_areas("rd wr um", "wr")), "source same-protection");
  EXPECT_EQ(move_rule(two_areas("rd wr um", "rd wr mt")), "source same-protection");
  EXPECT_EQ(move_rule(two_areas("rd wr um", "rd wr lo")), "source same-locked");
  for (const char* flag : {"pf", "io", "mm", "ss"})
    EXPECT_EQ(move_rule(two_areas("rd wr um", std::string("rd wr ") + flag)), "source ordinary") << flag;
  MemoryMap keyed = two_areas("rd wr um", "rd wr");
  keyed.areas[1].protection_key = 3;
  EXPECT_EQ(move_rule(keyed), "source same-protection");
}

TEST(CheckPoison, NamesWhatIsWrong) {
  const std::string file = "rw-s 00000000 fe:00 7   /x";
  EXPECT_EQ(poison_rule(one_area(kAnonymous, "rd um")), "none");
  EXPECT_EQ(poison_rule(one_area(kAnonymous, "rd wr")), "registered");
  EXPECT_EQ(poison_rule(one_area(file, "rd wr sh uw")), "fillable");
  EXPECT_EQ(poison_rule(one_area(file, "rd wr sh ui")), "none");
  const MemoryMap map = one_area(kAnonymous, "rd um");
  EXPECT_EQ(poison_rule(map, {kDst, ByteCount(0)}), "not-empty");
  EXPECT_EQ(poison_rule(map, {kDst, ByteCount(100)}), "aligned");
  EXPECT_EQ(poison_rule(map, {Address(0x101000), ByteCount(8192)}), "one-mapping");
  EXPECT_EQ(poison_rule(map, {Address(0x102000), ByteCount(4096)}), "mapped");
}

TEST(CheckPoison, AsksForWholeHugePagesOnHugetlbfs) {
  const MemoryMap map = {
      .areas = parse_smaps(area("200000-600000", "rw-s 00000000 00:0d 7  /h", "rd wr sh ht um", "2048 kB"))
                   .value(),
      .lowest = Address(4096)};
  EXPECT_EQ(poison_rule(map, {Address(0x200000), ByteCount(2u << 20)}), "none");
  EXPECT_EQ(poison_rule(map, {Address(0x201000), ByteCount(4096)}), "aligned");
  EXPECT_EQ(poison_rule(map, {Address(0x200000), ByteCount(4096)}), "aligned");
}

TEST(Violation, SaysWhatWasWrongWhereAndWhatToDo) {
  const auto violation =
      check_move(two_areas("rd wr um", "rd wr"), kDst, {Address(0x201000), ByteCount(8192)});
  ASSERT_TRUE(violation);
  EXPECT_EQ(violation->where, Address(0x202000));
  const Error error = violation->error();
  EXPECT_EQ(error.message(),
            "cannot move: the source 0x201000 (length 0x2000) is not within one mapping (from 0x202000)");
  EXPECT_FALSE(error.remedy().empty());
  EXPECT_EQ(error.os_error(), EINVAL);
}

TEST(Checked, AKernelWithoutTheCallIsNamedBeforeAnythingIsRead) {
  ScriptedSystemCalls system;
  system.kernel_features = Features(abi::kFeaturesKnown) - Features(abi::kFeatureMove | abi::kFeaturePoison);
  int calls = 0;
  system.on_ioctl = [&](unsigned long, void*) {
    ++calls;
    return -EINVAL;
  };
  const Uffd uffd = Uffd::adopt(system.make_descriptor(), {}, system);
  const auto moved =
      move_checked(uffd, kDst, {kSrc, ByteCount(4096)}, Wake::yes, SourceHoles::refuse, system);
  const auto poisoned = poison_checked(uffd, {kDst, ByteCount(4096)}, Wake::yes, 0, system);
  ASSERT_TRUE(moved && poisoned);
  EXPECT_EQ(moved->violation.value().rule, Rule::kernel_has_it);
  EXPECT_EQ(poisoned->violation.value().rule, Rule::kernel_has_it);
  EXPECT_EQ(moved->outcome.stop, Stop::invalid);
  EXPECT_EQ(calls, 0);
}

}  // namespace
}  // namespace uffdkit
