// The cases of the kernel's own tests of userfaultfd (tools/testing/selftests/mm: uffd-unit-tests.c,
// uffd-stress.c, uffd-wp-mremap.c, pagemap_ioctl.c), each on every memory type it is for, with descriptors
// made by both ways, on the running kernel and on the model of it: what they share.
//
// KERNEL_CASE(move, kAnonymous) { ... } is one case: a body that is given a Case, and the memory types. It
// becomes the tests move.anon_syscall and move.anon_device, and both again with _model. A body runs as a test
// does: it may use gtest's macros, and skips by throwing Lacking.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "selftests/machine.h"
#include "support/forwarding_calls.h"

namespace uffdkit::selftests {

// A machine's system calls with one way of creating a userfaultfd taken away, so that the other is used.
class OneWay final : public test::ForwardingCalls {
 public:
  OneWay(CreateWay way, SystemCalls& calls) : ForwardingCalls(calls), way_(way) {}

  CreateWay way() const { return way_; }
  // The out field of the last COPY, ZEROPAGE, MOVE, CONTINUE or POISON: an Outcome does not keep it.
  std::int64_t last_out_field() const { return last_out_field_; }

  int userfaultfd(int flags) override;
  int open(const char* path, int flags) override;
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;

 private:
  CreateWay way_;
  std::atomic<std::int64_t> last_out_field_{0};  // cases of several threads ask for none
};

// What one run of a case has: the memory type, and a machine with one way to create.
class Case {
 public:
  Case(MemoryType type, CreateWay way, Machine& machine)
      : type_(type), machine_(machine), system_(way, machine.system()) {}

  MemoryType type() const { return type_; }
  // How many pages an area of this case has: few where they are huge.
  std::size_t pages() const { return is_huge(type_) ? 2 : 32; }
  Area area() { return machine_.map(type_, pages()); }
  // A descriptor with these features, made by this case's way. Throws Lacking.
  Uffd uffd(std::uint64_t features = 0);
  Machine& machine() { return machine_; }
  Thread& here() { return machine_.here(); }
  OneWay& system() { return system_; }
  // The next message, which must come.
  Message next_message(const Uffd& uffd);
  // The userfaultfd of a child, whose fork is the next message.
  Uffd take_child(const Uffd& uffd);
  // Whether the page is mapped as a huge page: PAGEMAP_SCAN.
  bool is_mapped_huge(Address address);

 private:
  MemoryType type_;
  Machine& machine_;
  OneWay system_;
};

// A page's worth of bytes that differs from page to page.
std::vector<std::byte> contents(std::size_t page, ByteCount bytes);
// Whether the page has them, as this thread reads it. False also at SIGBUS.
bool has_contents(Thread& thread, Address at, std::size_t page, ByteCount bytes);
bool is_zero(Thread& thread, Address at, ByteCount bytes);

// Hands the messages of `uffd` to `handle` until all `works` have ended and none is left.
template <class Handle>
void serve(const Uffd& uffd, const std::vector<std::unique_ptr<Work>>& works, const Handle& handle) {
  constexpr int kLookAgainMs = 2;
  for (bool last = false; !last;) {
    last = std::ranges::all_of(works, [](const auto& work) { return work->finished(); });
    if (!uffd.wait_readable(last ? 0 : kLookAgainMs).value()) continue;
    abi::Msg raw;
    while (uffd.read({&raw, 1}).messages == 1) handle(decode(raw));
    last = false;
  }
}

// The same of one.
template <class Handle>
void serve(const Uffd& uffd, std::unique_ptr<Work>& work, const Handle& handle) {
  std::vector<std::unique_ptr<Work>> works;
  works.push_back(std::move(work));
  serve(uffd, works, handle);
  work = std::move(works.front());
}

using Body = void (*)(Case&);
// Registers the tests of a case; returns true.
bool register_case(const char* name, MemoryTypes types, Body body, const char* file, int line);
// Registers the tests of a case that has no memory of its own: name.syscall, name.device, and both with
// _model.
bool register_case(const char* name, Body body, const char* file, int line);

#define KERNEL_CASE(name, ...)                                                   \
  static void name(Case& test);                                                  \
  static const bool name##_is_registered =                                       \
      register_case(#name, __VA_ARGS__ __VA_OPT__(, ) name, __FILE__, __LINE__); \
  static void name(Case& test)

}  // namespace uffdkit::selftests
