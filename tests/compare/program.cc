#include "compare/program.h"

#include <fcntl.h>
#include <fmt/format.h>

#include <array>

namespace uffdkit::differential {
namespace {

using sim::Memory;

class Generator {
 public:
  Generator(std::mt19937_64& random, const Limits& limits) : random_(random), huge_(limits.huge) {}

  Program generate(std::size_t operations) {
    Program program;
    // Children of private mappings would need more huge pages than there are.
    forks_ = !huge_ || chance(30);
    protects_ = chance(50);
    const int places = huge_ ? kHugeAreas : 2 + static_cast<int>(below(3));
    for (int i = 0; i < places; ++i) program.push_back(map(huge_ ? kAreas + i : i));
    program.push_back(create());
    if (chance(30)) program.push_back(create());
    for (int i = 0; i < places; ++i)
      if (chance(80)) program.push_back(registration());
    while (program.size() < operations) program.push_back(any());
    return program;
  }

 private:
  std::uint64_t below(std::uint64_t bound) { return random_() % bound; }
  bool chance(unsigned percent) { return below(100) < percent; }
  template <class T, std::size_t N>
  T one_of(const std::array<T, N>& choices) {
    return choices[below(N)];
  }

  std::uint64_t page() const { return huge_ ? 2u << 20 : 4096; }
  int place() {
    return huge_ ? kAreas + static_cast<int>(below(kHugeAreas)) : static_cast<int>(below(kAreas));
  }

  // A range in or around one area: mostly a page or a few, sometimes the whole, sometimes beyond it or
  // crooked.
  void range(Operation& operation) {
    operation.place = place();
    const std::uint64_t pages = huge_ ? kHugeAreaPages : kAreaPages;
    const std::uint64_t first = below(huge_ ? 2 : 6);
    const std::uint64_t count = chance(60) ? 1 : chance(70) ? 1 + below(4) : pages - first;
    operation.start = area_start(operation.place) + first * page();
    operation.length = count * page();
    if (chance(3)) operation.length = 20 * page();
    if (chance(2)) operation.start -= page();
    if (chance(1)) operation.start += 512;
    if (chance(1)) operation.length += 512;
    if (chance(1)) operation.length = 0;
    if (huge_ && chance(4)) operation.start += 4096;
    if (huge_ && chance(4)) operation.length = 4096;
  }

  Operation map(int where) {
    Operation operation{.verb = Verb::map};
    operation.place = where;
    operation.start = area_start(where);
    if (where >= kAreas) {
      operation.memory = (huge_ && forks_) || chance(50) ? Memory::hugetlb_shared : Memory::hugetlb_private;
      operation.length = kHugeAreaPages * page();
      return operation;
    }
    operation.memory = one_of(std::array{Memory::anonymous, Memory::anonymous, Memory::shmem_shared,
                                         Memory::shmem_shared, Memory::shmem_private});
    operation.length = kAreaPages * 4096;
    if (chance(5)) operation.writable = false;
    return operation;
  }

  Operation create() {
    Operation operation{.verb = Verb::create};
    constexpr std::array kChoices = {
        abi::kFeatureEventFork,     abi::kFeatureEventRemap, abi::kFeatureEventRemove,
        abi::kFeatureEventUnmap,    abi::kFeatureThreadId,   abi::kFeatureExactAddress,
        abi::kFeatureWpUnpopulated, abi::kFeatureThreadId,   abi::kFeatureWpUnpopulated,
    };
    for (const std::uint64_t feature : kChoices)
      if (chance(45)) operation.mode |= feature;
    if (chance(6)) operation.mode |= abi::kFeatureSigbus;
    if (chance(8)) operation.mode |= abi::kFeatureWpAsync;
    if (chance(3)) operation.mode |= std::uint64_t{1} << 40;
    operation.other = O_NONBLOCK;
    if (chance(15)) operation.other |= abi::kUserModeOnly;
    return operation;
  }

  Operation registration() {
    Operation operation{.verb = Verb::reg};
    range(operation);
    if (chance(70)) {
      operation.start = area_start(operation.place);
      operation.length = (huge_ ? kHugeAreaPages : kAreaPages) * page();
    }
    operation.uffd = uffd();
    operation.mode = one_of(std::array<std::uint64_t, 12>{1, 1, 1, 3, 3, 3, 2, 2, 5, 7, 4, 6});
    // Armed huge pages that are registered again without write-protect faults make their writers spin for
    // ever.
    if (huge_)
      operation.mode = protects_ ? operation.mode | 2 : operation.mode == 2 ? 1 : operation.mode & ~2ull;
    if (chance(2)) operation.mode = huge_ ? 8 : below(16);
    return operation;
  }

  int uffd() { return chance(75) ? 0 : static_cast<int>(below(kUffds)); }
  int thread() { return static_cast<int>(chance(85) ? below(kThreads) : below(kSlots)); }

  Operation ioctl(Verb verb) {
    Operation operation{.verb = verb};
    range(operation);
    operation.uffd = uffd();
    operation.value = static_cast<std::uint8_t>(1 + below(250));
    operation.by_target = chance(verb == Verb::move ? 90 : 20);
    // A copy of huge pages from memory that must be faulted in leaks the pool's reservations on Linux 6.18,
    // for as long as the machine runs.
    operation.bad_source = !huge_ && chance(8);
    if (chance(15)) operation.mode |= abi::kDontWake;
    const bool second_mode = verb != Verb::zeropage && verb != Verb::poison;
    if (second_mode && chance(25)) operation.mode |= 2;
    if (chance(1)) operation.mode |= 8;
    if (verb == Verb::writeprotect) operation.mode = chance(97) ? below(3) : 3;
    if (verb == Verb::move) {
      operation.other = area_start(place()) + below(8) * page();
      if (chance(2)) operation.other += 512;
    }
    return operation;
  }

  Operation scan() {
    Operation operation{.verb = Verb::scan};
    range(operation);
    if (chance(40)) {
      operation.start = area_start(operation.place);
      operation.length = (huge_ ? kHugeAreaPages : kAreaPages) * page();
    }
    operation.mode = one_of(std::array<std::uint64_t, 6>{0, 0, 1, 1, 2, 3});
    // Arming huge pages where there is no page table yet can lock the kernel against itself, for ever.
    if (huge_) operation.mode &= ~abi::kScanWpMatching;
    if (chance(1)) operation.mode |= 4;
    const std::uint64_t all = abi::kPageSoftDirty - 1;  // all but soft-dirty, which not every kernel has
    operation.mask = chance(60) ? abi::kPageWritten : random_() & random_() & random_() & all;
    operation.report = chance(50) ? abi::kPageWritten : random_() & all;
    if (chance(25)) operation.inverted = random_() & random_() & all;
    if (chance(25)) operation.any_of = random_() & all;
    if (chance(1)) operation.report |= std::uint64_t{1} << 20;
    operation.value = static_cast<std::uint8_t>(chance(50) ? 8 : below(4));
    if (chance(40)) operation.new_length = (1 + below(6)) * (huge_ && chance(70) ? page() / 4096 : 1);
    return operation;
  }

  Operation access() {
    Operation operation{.verb = Verb::access};
    operation.thread = thread();
    operation.place = place();
    const std::uint64_t pages = huge_ ? kHugeAreaPages : kAreaPages;
    operation.start = area_start(operation.place) + below(chance(90) ? (huge_ ? 2 : 6) : pages + 1) * page();
    operation.write = chance(55);
    operation.kernel_mode = chance(25);
    operation.value = static_cast<std::uint8_t>(1 + below(250));
    return operation;
  }

  Operation advise() {
    Operation operation{.verb = Verb::advise};
    range(operation);
    operation.thread = thread();
    operation.mode = below(3);
    // Holes in files of huge pages are whole pages here: the model does not do the zeroing at their edges.
    if (huge_) {
      operation.start = operation.start / page() * page();
      operation.length = (operation.length + page() - 1) / page() * page();
    }
    return operation;
  }

  Operation remap() {
    Operation operation{.verb = Verb::remap};
    range(operation);
    operation.thread = thread();
    operation.length = (1 + below(4)) * page();
    operation.new_length = chance(60) ? operation.length : (1 + below(6)) * page();
    operation.may_move = chance(85);
    operation.fixed = operation.may_move;
    operation.dont_unmap = operation.fixed && !huge_ && chance(20);
    operation.other = area_start(place()) + below(huge_ ? 3 : kAreaStride) * page();
    return operation;
  }

  Operation any() {
    const std::uint64_t pick = below(100);
    if (pick < 26) return access();
    if (pick < 30) return scan();
    if (pick < 42) {
      Operation operation{.verb = Verb::read};
      operation.uffd = uffd();
      operation.all = chance(60);
      return operation;
    }
    if (pick < 54) return ioctl(Verb::copy);
    if (pick < 57) return ioctl(Verb::zeropage);
    if (pick < 61) return ioctl(Verb::resume);
    if (pick < 63) return ioctl(Verb::poison);
    if (pick < 69) return ioctl(Verb::writeprotect);
    if (pick < 72) return ioctl(Verb::move);
    if (pick < 74) return ioctl(Verb::wake);
    if (pick < 78) return registration();
    if (pick < 80) {
      Operation operation = ioctl(Verb::unregister);
      if (chance(40)) {
        operation.start = area_start(operation.place);
        operation.length = (huge_ ? kHugeAreaPages : kAreaPages) * page();
      }
      return operation;
    }
    if (pick < 85) return advise();
    // Moving a part of a private mapping of huge pages leaks reservations of the pool on Linux 6.18, for as
    // long as the machine runs.
    if (pick < 87 && forks_) return remap();
    if (pick < 90) {
      Operation operation{.verb = chance(50) ? Verb::unmap : Verb::protect};
      range(operation);
      operation.thread = thread();
      operation.readable = chance(70);
      operation.writable = chance(60);
      return operation;
    }
    if (pick < 92) {
      Operation operation = map(place());
      operation.thread = thread();
      return operation;
    }
    if (pick < 94 && forks_) {
      Operation operation{.verb = Verb::fork};
      operation.thread = thread();
      return operation;
    }
    if (pick < 97) {
      Operation operation{.verb = one_of(std::array{Verb::file_write, Verb::file_write, Verb::file_write,
                                                    Verb::punch, Verb::punch, Verb::truncate})};
      operation.place = place();
      operation.start = below(huge_ ? 2 : 6);
      operation.value = static_cast<std::uint8_t>(1 + below(250));
      return operation;
    }
    if (pick < 98) {
      Operation operation{.verb = Verb::signal};
      operation.thread = thread();
      return operation;
    }
    Operation operation{.verb = chance(50) ? Verb::poll : chance(80) ? Verb::close : Verb::kill};
    operation.uffd = uffd();
    return operation;
  }

  std::mt19937_64& random_;
  bool huge_;
  bool forks_ = false;
  bool protects_ = false;
};

std::string place_of(std::uint64_t address) {
  for (int place = kAreas + kHugeAreas - 1; place >= 0; --place) {
    if (address < area_start(place)) continue;
    const std::uint64_t page = place < kAreas ? 4096 : 2u << 20;
    const std::uint64_t offset = address - area_start(place);
    std::string text = fmt::format("area {}", place);
    if (offset / page != 0) text += fmt::format(" + {} pages", offset / page);
    if (offset % page != 0) text += fmt::format(" + {} bytes", offset % page);
    return text;
  }
  return fmt::format("{:#x}", address);
}

std::string range_of(const Operation& operation) {
  return fmt::format("{}, {:#x} bytes", place_of(operation.start), operation.length);
}

}  // namespace

Program random_program(std::mt19937_64& random, const Limits& limits) {
  return Generator(random, limits).generate(limits.operations);
}

std::string to_string(const Operation& o) {
  const auto ioctl = [&](const char* name) {
    return fmt::format("{}(uffd {}, {}, mode {}){}", name, o.uffd, range_of(o), o.mode,
                       o.by_target ? " by the target" : "");
  };
  switch (o.verb) {
    case Verb::map:
      return fmt::format("thread {}: mmap {} at {}, {:#x} bytes{}", o.thread, sim::to_string(o.memory),
                         place_of(o.start), o.length, o.writable ? "" : ", read-only");
    case Verb::create:
      return fmt::format("create(flags {:#x}, features {:#x})", o.other, o.mode);
    case Verb::reg:
      return ioctl("REGISTER");
    case Verb::unregister:
      return ioctl("UNREGISTER");
    case Verb::wake:
      return ioctl("WAKE");
    case Verb::copy:
      return ioctl("COPY") + fmt::format(" of {:#04x}{}", o.value, o.bad_source ? ", one page readable" : "");
    case Verb::zeropage:
      return ioctl("ZEROPAGE");
    case Verb::resume:
      return ioctl("CONTINUE");
    case Verb::poison:
      return ioctl("POISON");
    case Verb::writeprotect:
      return ioctl("WRITEPROTECT");
    case Verb::move:
      return ioctl("MOVE") + " from " + place_of(o.other);
    case Verb::scan:
      return fmt::format(
          "PAGEMAP_SCAN {}, flags {}, mask {:#x}, inverted {:#x}, any of {:#x}, report {:#x}, "
          "{} entries, at most {} pages",
          range_of(o), o.mode, o.mask, o.inverted, o.any_of, o.report, o.value, o.new_length);
    case Verb::access:
      return fmt::format("thread {}: {} {}{}", o.thread, o.write ? "write" : "read", place_of(o.start),
                         o.kernel_mode ? " in kernel mode" : "");
    case Verb::advise:
      return fmt::format("thread {}: madvise {} {}", o.thread,
                         o.mode == 0   ? "DONTNEED"
                         : o.mode == 1 ? "FREE"
                                       : "REMOVE",
                         range_of(o));
    case Verb::unmap:
      return fmt::format("thread {}: munmap {}", o.thread, range_of(o));
    case Verb::remap:
      return fmt::format("thread {}: mremap {} to {:#x} bytes{}{}", o.thread, range_of(o), o.new_length,
                         o.fixed ? " at " + place_of(o.other) : " in place",
                         o.dont_unmap ? ", DONTUNMAP" : "");
    case Verb::protect:
      return fmt::format("thread {}: mprotect {} {}{}", o.thread, range_of(o), o.readable ? "r" : "-",
                         o.writable ? "w" : "-");
    case Verb::fork:
      return fmt::format("thread {}: fork", o.thread);
    case Verb::signal:
      return fmt::format("signal thread {}", o.thread);
    case Verb::read:
      return fmt::format("read uffd {} {}", o.uffd, o.all ? "until it is empty" : "once");
    case Verb::poll:
      return fmt::format("poll uffd {}", o.uffd);
    case Verb::file_write:
      return fmt::format("write file {}, page {}", o.place, o.start);
    case Verb::punch:
      return fmt::format("punch file {}, page {}", o.place, o.start);
    case Verb::truncate:
      return fmt::format("truncate file {} to {} pages", o.place, o.start);
    case Verb::close:
      return fmt::format("close uffd {}", o.uffd);
    case Verb::kill:
      return "kill the target";
    case Verb::dump:
      return "dump all memory";
  }
  return "?";
}

std::string to_string(const Program& program) {
  std::string text;
  for (const Operation& operation : program) text += "  " + to_string(operation) + "\n";
  return text;
}

}  // namespace uffdkit::differential
