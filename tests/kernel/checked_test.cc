// Each constraint of MOVE and POISON against the running kernel: the checker names it, and the kernel
// refuses.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <uffdkit/checked.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <random>
#include <string>
#include <vector>

#include "support/child.h"
#include "support/huge_pages.h"
#include "support/mapping.h"
#include "support/sanitizers.h"
#include "support/serving.h"

namespace uffdkit {
namespace {

using test::Background;
using test::Channel;
using test::Child;
using test::HugePages;
using test::Mapping;
using test::memory_file;
using test::user_faults;

// mlock(2) itself: the sanitizers turn the library's function into nothing.
bool lock_memory(void* memory, std::size_t bytes) {
  return syscall(SYS_mlock, memory, bytes) == 0;
}

constexpr ByteCount kOnePage(4096);
constexpr int kReadWrite = PROT_READ | PROT_WRITE;
constexpr std::uint64_t kBoth = abi::kFeatureMove | abi::kFeaturePoison;

Mapping anonymous(std::size_t pages, int protection = kReadWrite) {
  return Mapping::map(nullptr, pages * 4096, protection, MAP_PRIVATE | MAP_ANONYMOUS, -1);
}

// The rule that move_checked names; "none" where it asked the kernel, with what that said.
std::string move_rule(const Uffd& uffd, Address to, AddressRange from) {
  const auto checked = move_checked(uffd, to, from);
  if (!checked) return checked.error().text();
  if (checked->violation) return std::string(to_string(checked->violation->rule));
  return "none, " + to_string(checked->outcome.stop);
}

std::string poison_rule(const Uffd& uffd, AddressRange range) {
  const auto checked = poison_checked(uffd, range);
  if (!checked) return checked.error().text();
  if (checked->violation) return std::string(to_string(checked->violation->rule));
  return "none, " + to_string(checked->outcome.stop);
}

// That the rule is named, and that it is not made up.
void expect_move_breaks(const char* rule, const Uffd& uffd, Address to, AddressRange from) {
  EXPECT_EQ(move_rule(uffd, to, from), rule);
  const Outcome raw = uffd.move(to, from, Wake::yes, SourceHoles::allow);
  EXPECT_TRUE(raw.stop == Stop::invalid || raw.stop == Stop::not_ready) << to_string(raw.stop);
}

void expect_poison_breaks(const char* rule, const Uffd& uffd, AddressRange range) {
  EXPECT_EQ(poison_rule(uffd, range), rule);
  const Outcome raw = uffd.poison(range);
  EXPECT_TRUE(raw.stop == Stop::invalid || raw.stop == Stop::not_ready) << to_string(raw.stop);
}

const std::string kMoved = "none, " + to_string(Stop::complete);

TEST(MoveChecked, MovesWhatMayBeMovedAndChangesNothingElse) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4 * 4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing | kWriteProtect));
  const MappedArea before = *read_memory_map()->find(memory.page(1));
  source.write(0, std::byte{0x77});
  EXPECT_EQ(move_rule(uffd, memory.page(1), source.range()), kMoved);
  EXPECT_EQ(memory.read(1), std::byte{0x77});
  const MemoryMap map = read_memory_map().value();
  const MappedArea* after = map.find(memory.page(1));
  EXPECT_EQ(after->range, before.range);
  EXPECT_EQ(after->registered, before.registered);
}

TEST(MoveChecked, TakesAPrivateMappingOfDevZeroForAnonymousMemory) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const UniqueFd zero(::open("/dev/zero", O_RDWR | O_CLOEXEC));
  const Mapping memory = Mapping::of_file(zero.get(), 4096, MAP_PRIVATE);
  const Mapping source = Mapping::of_file(zero.get(), 4096, MAP_PRIVATE);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  source.write(0, std::byte{5});
  EXPECT_EQ(move_rule(uffd, memory.page(0), source.range()), kMoved);
}

TEST(MoveChecked, LeavesHolesAndPresentPagesToTheKernel) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  EXPECT_EQ(move_rule(uffd, memory.page(0), source.range()), "none, " + to_string(Stop::not_ready));
  source.write(0, std::byte{1});
  ASSERT_EQ(uffd.zero(memory.range()).stop, Stop::complete);
  EXPECT_EQ(move_rule(uffd, memory.page(0), source.range()), "none, " + to_string(Stop::present));
}

TEST(MoveChecked, MovesDownOverItsOwnPlaceAndUpOnlyOverHoles) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4 * 4096);
  memory.write(1, std::byte{1});
  memory.write(2, std::byte{2});
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  EXPECT_EQ(move_rule(uffd, memory.page(0), memory.pages(1, 2)), kMoved);
  EXPECT_EQ(memory.read(0), std::byte{1});
  EXPECT_EQ(memory.read(1), std::byte{2});
  EXPECT_EQ(move_rule(uffd, memory.page(1), memory.pages(0, 2)), "none, " + to_string(Stop::present));
  // Page 2 is a hole by now: what is moved there is then moved on.
  const auto twice = move_checked(uffd, memory.page(2), memory.pages(1, 2), Wake::yes, SourceHoles::allow);
  ASSERT_TRUE(twice);
  EXPECT_EQ(twice->outcome.stop, Stop::complete);
  EXPECT_EQ(memory.read(3), std::byte{2});
}

TEST(MoveChecked, SaysChangingWhileAnEventIsOnItsWay) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth | abi::kFeatureEventRemove));
  const Mapping memory = Mapping::anonymous(2 * 4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  source.write(0, std::byte{1});
  Background remover(uffd, memory.range(), [&] { madvise(memory.data(), 4096, MADV_DONTNEED); });
  ASSERT_TRUE(uffd.wait_readable(-1).value());
  EXPECT_EQ(move_rule(uffd, memory.page(1), source.range()), "none, " + to_string(Stop::changing));
}

TEST(MoveChecked, NamesWhatIsWrongWithTheNumbers) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  source.write(0, std::byte{1});
  const Address to = memory.page(0);
  const Address from = source.page(0);
  expect_move_breaks("not-empty", uffd, to, {from, ByteCount(0)});
  expect_move_breaks("aligned", uffd, to + ByteCount(1), {from, kOnePage});
  expect_move_breaks("aligned", uffd, to, {from + ByteCount(2048), kOnePage});
  expect_move_breaks("aligned", uffd, to, {from, ByteCount(100)});
  expect_move_breaks("in-reach", uffd, to, {from, ByteCount(0) - kOnePage});
  EXPECT_EQ(move_rule(uffd, to, {from, kOnePage}), kMoved);
}

TEST(MoveChecked, NamesWhereAMappingEndsOrIsMissing) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4 * 4096);
  const Mapping source = Mapping::anonymous(4 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  ASSERT_EQ(munmap(source.data() + 3 * 4096, 4096), 0);
  ASSERT_EQ(mprotect(source.data(), 4096, PROT_READ), 0);
  ASSERT_TRUE(uffd.unregister_range(memory.pages(3, 1)));
  source.write(1, std::byte{1});
  source.write(2, std::byte{1});
  expect_move_breaks("mapped", uffd, memory.page(0), source.pages(3, 1));
  expect_move_breaks("one-mapping", uffd, memory.page(0), source.pages(2, 2));
  expect_move_breaks("one-mapping", uffd, memory.page(2), source.pages(1, 2));
  expect_move_breaks("writable", uffd, memory.page(0), source.pages(0, 1));
  expect_move_breaks("registered", uffd, memory.page(3), source.pages(1, 1));
  EXPECT_EQ(move_rule(uffd, memory.page(0), source.pages(1, 2)), kMoved);
}

TEST(MoveChecked, NamesWhatIsWrongWithTheMappings) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  const Address to = memory.page(0);
  const UniqueFd file = memory_file(4096);
  const Mapping shared = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  const Mapping of_file = Mapping::of_file(file.get(), 4096, MAP_PRIVATE);
  const Mapping executable = anonymous(1, kReadWrite | PROT_EXEC);
  const Mapping locked = anonymous(1);
  for (const Mapping* source : {&shared, &of_file, &executable, &locked}) source->write(0, std::byte{1});
  expect_move_breaks("private-memory", uffd, to, shared.range());
  expect_move_breaks("anonymous", uffd, to, of_file.range());
  expect_move_breaks("same-protection", uffd, to, executable.range());
  if (lock_memory(locked.data(), 4096)) expect_move_breaks("same-locked", uffd, to, locked.range());
  munlock(locked.data(), 4096);

  const Mapping shared_to = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  ASSERT_TRUE(uffd.register_range(shared_to.range(), kMissing));
  expect_move_breaks("private-memory", uffd, shared_to.page(0), locked.range());
  ASSERT_EQ(mprotect(memory.data(), 4096, PROT_READ), 0);
  ASSERT_EQ(mprotect(locked.data(), 4096, PROT_READ), 0);
  expect_move_breaks("writable", uffd, to, locked.range());
}

TEST(MoveChecked, NamesAnotherUserfaultfdsRangeAndLeavesItAlone) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  UFFD_OR_SKIP(other, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4096);
  const Mapping source = Mapping::anonymous(4096);
  ASSERT_TRUE(other.register_range(memory.range(), kMissing));
  source.write(0, std::byte{1});
  expect_move_breaks("own", uffd, memory.page(0), source.range());
  EXPECT_EQ(move_rule(other, memory.page(0), source.range()), kMoved);
}

TEST(MoveChecked, NamesAnotherProcessAndRegistersNothingThere) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4096);
  const Mapping source = Mapping::anonymous(4096);
  source.write(0, std::byte{1});
  Child child([&](const Channel&) {
    // Its own userfaultfd for the same addresses, so that only the process is wrong.
    const auto own = Uffd::create(user_faults());
    if (!own || !own->register_range(memory.range(), kMissing)) return 1;
    if (move_rule(uffd, memory.page(0), source.range()) != "same-process") return 2;
    return uffd.move(memory.page(0), source.range()).stop == Stop::invalid ? 0 : 3;
  });
  EXPECT_EQ(child.wait(), 0);
  EXPECT_TRUE(read_memory_map()->find(memory.page(0))->registered.empty());
}

TEST(MoveChecked, NamesHugePagesAsNotAnonymous) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const HugePages pool(1);
  if (!pool.lacking().empty()) GTEST_SKIP() << pool.lacking();
  const Mapping memory = Mapping::map(nullptr, HugePages::kBytes, kReadWrite,
                                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | (21 << MAP_HUGE_SHIFT), -1);
  const Mapping source = Mapping::anonymous(HugePages::kBytes);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  expect_move_breaks("anonymous", uffd, memory.page(0), source.range());
  expect_poison_breaks("aligned", uffd, memory.pages(0, 1));
  expect_poison_breaks("aligned", uffd, memory.pages(1, 511));
  EXPECT_EQ(poison_rule(uffd, memory.range()), kMoved);
}

TEST(PoisonChecked, PoisonsWhatMayBePoisoned) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const UniqueFd file = memory_file(4096);
  const Mapping shared = Mapping::of_file(file.get(), 4096, MAP_SHARED);
  const Mapping read_only = anonymous(1, PROT_READ);
  ASSERT_TRUE(uffd.register_range(shared.range(), kWriteProtect));
  ASSERT_TRUE(uffd.register_range(read_only.range(), kMissing));
  EXPECT_EQ(poison_rule(uffd, shared.range()), kMoved);
  EXPECT_EQ(poison_rule(uffd, read_only.range()), kMoved);
  EXPECT_EQ(poison_rule(uffd, read_only.range()), "none, " + to_string(Stop::present));
}

TEST(PoisonChecked, NamesEachConstraint) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(3 * 4096);
  ASSERT_TRUE(uffd.register_range(memory.pages(0, 1), kMissing));
  ASSERT_EQ(munmap(memory.data() + 2 * 4096, 4096), 0);
  expect_poison_breaks("not-empty", uffd, memory.pages(0, 0));
  expect_poison_breaks("aligned", uffd, {memory.page(0) + ByteCount(8), kOnePage});
  expect_poison_breaks("aligned", uffd, {memory.page(0), ByteCount(8)});
  expect_poison_breaks("in-reach", uffd, {memory.page(0), ByteCount(0) - kOnePage});
  expect_poison_breaks("one-mapping", uffd, memory.pages(0, 2));
  expect_poison_breaks("registered", uffd, memory.pages(1, 1));
  expect_poison_breaks("mapped", uffd, memory.pages(2, 1));
}

TEST(PoisonChecked, NamesAFileThatIsOnlyWriteProtected) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth | abi::kFeatureWpAsync));
  const UniqueFd program(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  const Mapping memory = Mapping::of_file(program.get(), 4096, MAP_PRIVATE);
  ASSERT_TRUE(uffd.register_range(memory.range(), kWriteProtect));
  expect_poison_breaks("fillable", uffd, memory.range());
}

TEST(PoisonChecked, ReadsTheMappingsOfTheProcessThatIsServed) {
  UFFD_OR_SKIP(uffd, user_faults(kBoth));
  const Mapping memory = Mapping::anonymous(4096);
  ASSERT_TRUE(uffd.register_range(memory.range(), kMissing));
  const pid_t creator = getpid();
  Child child([&](const Channel&) {
    const auto checked = poison_checked(uffd, memory.range(), Wake::yes, creator);
    if (!checked) return 77;  // the right to ptrace
    return !checked->violation && checked->outcome.stop == Stop::complete ? 0 : 2;
  });
  const int code = child.wait();
  if (code == 77) GTEST_SKIP() << "needs the right to read the mappings of the parent";
  EXPECT_EQ(code, 0);
}

// Mappings of every kind side by side, and calls at random places of them: the checker and the kernel agree.
TEST(Checked, NamesAViolationExactlyWhenTheKernelRefusesAtRandom) {
  if (test::kThreadSanitized)
    GTEST_SKIP() << "needs a build without the thread sanitizer, which maps memory of its own into holes";
  UFFD_OR_SKIP(uffd, user_faults(kBoth | abi::kFeatureWpAsync));
  UFFD_OR_SKIP(other, user_faults(kBoth));
  const unsigned seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937 random(seed);
  constexpr std::size_t kPages = 40;
  const UniqueFd file = memory_file(kPages * 4096);
  const UniqueFd zero(::open("/dev/zero", O_RDWR | O_CLOEXEC));
  const UniqueFd program(::open("/proc/self/exe", O_RDONLY | O_CLOEXEC));
  int refused = 0;
  int done = 0;
  for (int round = 0; round < 30; ++round) {
    const Mapping arena = anonymous(kPages);
    for (std::size_t page = 0; page < kPages;) {
      const std::size_t count = std::min<std::size_t>(1 + random() % 5, kPages - page);
      std::byte* at = arena.data() + page * 4096;
      const AddressRange range = arena.pages(page, count);
      page += count;
      const auto put = [&](int protection, int flags, int fd) {
        ASSERT_NE(mmap(at, count * 4096, protection, flags | MAP_FIXED, fd, 0), MAP_FAILED);
      };
      switch (random() % 14) {
        case 0:
          put(kReadWrite, MAP_SHARED, file.get());
          break;
        case 1:
          put(kReadWrite, MAP_PRIVATE, file.get());
          break;
        case 2:
          put(kReadWrite, MAP_PRIVATE, zero.get());
          break;
        case 3:
          put(kReadWrite, MAP_PRIVATE, program.get());
          break;
        case 4:
          put(PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1);
          break;
        case 5:
          put(kReadWrite | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1);
          break;
        case 6:
          put(kReadWrite, MAP_SHARED | MAP_ANONYMOUS, -1);
          break;
        case 7:
          munmap(at, count * 4096);
          break;
        case 8:
          (void)lock_memory(at, count * 4096);
          break;
        default:
          break;  // anonymous, as it was
      }
      // Touched before it is registered: nobody serves a fault here.
      const MemoryMap map = read_memory_map().value();
      const MappedArea* area = map.find(range.start);
      if (area != nullptr && area->writable && random() % 2 == 0) *at = std::byte{1};
      const auto how = random() % 6;
      if (how < 2) static_cast<void>(uffd.register_range(range, kMissing));
      if (how == 2) static_cast<void>(uffd.register_range(range, kWriteProtect));
      if (how == 3) static_cast<void>(other.register_range(range, kMissing));
    }
    const auto place = [&] {
      const Address page = arena.page(random() % kPages);
      return random() % 20 == 0 ? page + ByteCount(512) : page;
    };
    for (int call = 0; call < 25; ++call) {
      const ByteCount length(random() % 20 == 0 ? random() % 9000 : 4096 * (1 + random() % 3));
      const AddressRange from{place(), length};
      const Address to = place();
      const bool moves = random() % 3 != 0;
      const auto checked = moves ? move_checked(uffd, to, from) : poison_checked(uffd, {to, length});
      ASSERT_TRUE(checked) << checked.error().text();
      if (!checked->violation) {
        EXPECT_NE(checked->outcome.stop, Stop::invalid)
            << (moves ? "move " : "poison ") << std::hex << to.value << ' ' << from.start.value << ' '
            << length.value;
        ++done;
        continue;
      }
      const Outcome raw =
          moves ? uffd.move(to, from, Wake::yes, SourceHoles::allow) : uffd.poison({to, length});
      EXPECT_TRUE(raw.stop == Stop::invalid || raw.stop == Stop::not_ready)
          << checked->violation->error().text() << ": " << to_string(raw.stop);
      ++refused;
    }
  }
  EXPECT_GT(refused, 0);
  EXPECT_GT(done, 0);
}

}  // namespace
}  // namespace uffdkit
