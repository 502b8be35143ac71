#include "selftests/case.h"

#include <string.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <string>
#include <utility>
#include <variant>

namespace uffdkit::selftests {
namespace {

constexpr std::uint64_t kSeeds = 3;  // of each case on the model

const char* name_of(MemoryType type) {
  switch (type) {
    case MemoryType::anon:
      return "anon";
    case MemoryType::shmem:
      return "shmem";
    case MemoryType::shmem_private:
      return "shmem_private";
    case MemoryType::hugetlb:
      return "hugetlb";
    case MemoryType::hugetlb_private:
      return "hugetlb_private";
    case MemoryType::file_private:
      return "file_private";
  }
  std::unreachable();
}

enum class On : bool { kernel, model };

class CaseTest : public testing::Test {
 public:
  CaseTest(MemoryType type, CreateWay way, On on, Body body) : type_(type), way_(way), on_(on), body_(body) {}

  void TestBody() override {
    try {
      if (on_ == On::kernel) return run(*make_kernel());
      for (std::uint64_t seed = 1; seed <= kSeeds && !HasFailure(); ++seed) {
        SCOPED_TRACE("seed " + std::to_string(seed));
        const std::unique_ptr<Machine> model = make_model(seed);
        run(*model);
      }
    } catch (const Lacking& lacking) {
      GTEST_SKIP() << lacking.what();
    }
  }

 private:
  void run(Machine& machine) {
    Case test(type_, way_, machine);
    body_(test);
    EXPECT_EQ(machine.mistakes(), "");
  }

  MemoryType type_;
  CreateWay way_;
  On on_;
  Body body_;
};

void register_tests(const char* name, const std::string& memory, MemoryType type, Body body, const char* file,
                    int line) {
  for (const On on : {On::kernel, On::model})
    for (const CreateWay way : {CreateWay::system_call, CreateWay::device}) {
      const std::string test =
          memory + (way == CreateWay::device ? "device" : "syscall") + (on == On::model ? "_model" : "");
      testing::RegisterTest(name, test.c_str(), nullptr, nullptr, file, line,
                            [=]() -> testing::Test* { return new CaseTest(type, way, on, body); });
    }
}

}  // namespace

// ---- a machine with one way taken away ------------------------------------------------------------------

int OneWay::userfaultfd(int flags) {
  return way_ == CreateWay::system_call ? calls_.userfaultfd(flags) : -ENOSYS;
}

int OneWay::open(const char* path, int flags) {
  if (way_ != CreateWay::device && strcmp(path, abi::kDevicePath) == 0) return -ENOENT;
  return calls_.open(path, flags);
}

int OneWay::ioctl(int fd, unsigned long request, std::uintptr_t argument) {
  const int result = calls_.ioctl(fd, request, argument);
  switch (request) {
    case abi::kIoctlCopy:
    case abi::kIoctlMove:
      last_out_field_ = reinterpret_cast<const abi::CopyArgs*>(argument)->done;
      break;
    case abi::kIoctlZeropage:
    case abi::kIoctlContinue:
    case abi::kIoctlPoison:
      last_out_field_ = reinterpret_cast<const abi::FillArgs*>(argument)->done;
      break;
    default:
      break;
  }
  return result;
}

// ---- memory ---------------------------------------------------------------------------------------------

std::vector<std::byte> contents(std::size_t page, ByteCount bytes) {
  std::vector<std::byte> made(bytes.value);
  for (std::size_t i = 0; i < made.size(); ++i) made[i] = std::byte(1 + (page * 7 + i) % 251);
  return made;
}

bool has_contents(Thread& thread, Address at, std::size_t page, ByteCount bytes) {
  std::vector<std::byte> seen(bytes.value);
  return thread.read(at, seen) && seen == contents(page, bytes);
}

bool is_zero(Thread& thread, Address at, ByteCount bytes) {
  std::vector<std::byte> seen(bytes.value);
  return thread.read(at, seen) && std::ranges::all_of(seen, [](std::byte b) { return b == std::byte{0}; });
}

// ---- cases ----------------------------------------------------------------------------------------------

Uffd Case::uffd(std::uint64_t features) {
  Result<Uffd> made = Uffd::create({.required = Features(features)}, system_);
  if (!made) throw Lacking("needs a userfaultfd: " + made.error().text());
  EXPECT_EQ(made->way(), system_.way());
  return std::move(*made);
}

Message Case::next_message(const Uffd& uffd) {
  constexpr int kPatienceMs = 30'000;
  for (int turns = 0; turns < kPatienceMs; ++turns) {
    if (!uffd.wait_readable(1).value()) continue;
    abi::Msg raw;
    if (uffd.read({&raw, 1}).messages == 1) return decode(raw);
  }
  throw std::runtime_error("no message came");
}

Uffd Case::take_child(const Uffd& uffd) {
  return uffd.adopt_child(std::get<ForkEvent>(next_message(uffd)).child_fd);
}

bool Case::is_mapped_huge(Address address) {
  const Result<Pagemap> pagemap = Pagemap::open(0, system_);
  std::array<ScannedRange, 1> found;
  const Result<ScanResult> scan = pagemap->scan(
      {.range = {address, kPage4K.bytes()}, .mask = abi::kPageHuge, .report = abi::kPageHuge}, found);
  if (!scan) throw Lacking("needs PAGEMAP_SCAN: " + scan.error().text());
  return scan->ranges == 1;
}

bool register_case(const char* name, MemoryTypes types, Body body, const char* file, int line) {
  for (const MemoryType type : types)
    register_tests(name, std::string(name_of(type)) + "_", type, body, file, line);
  return true;
}

bool register_case(const char* name, Body body, const char* file, int line) {
  register_tests(name, "", MemoryType::anon, body, file, line);
  return true;
}

}  // namespace uffdkit::selftests
