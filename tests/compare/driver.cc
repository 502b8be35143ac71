#include "compare/driver.h"

#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace uffdkit::differential {
namespace {

std::string name_of(int os_error) {
  return os_error == 0 ? "ok" : strerrorname_np(os_error);
}

std::string out_field(std::int64_t value) {
  if (value == kUntouched) return "untouched";
  return value < 0 ? "-" + name_of(static_cast<int>(-value)) : fmt::format("{:#x}", value);
}

}  // namespace

std::string Driver::perform(const Operation& operation, bool order_is_open) {
  std::string text = carry_out(operation, order_is_open);
  settle();
  for (int thread = 0; thread < kSlots; ++thread) {
    const ThreadReport seen = report(thread);
    if (seen.state == ThreadReport::State::none) continue;
    constexpr std::array kNames = {"none", "idle", "asleep in a fault", "asleep for an event", "dead"};
    text += fmt::format("\n    thread {}: {}", thread, kNames[static_cast<std::size_t>(seen.state)]);
    if (!seen.ended.empty()) text += ", " + seen.ended;
  }
  for (int uffd = 0; uffd < kUffds; ++uffd)
    if (const int fd = uffds_[static_cast<std::size_t>(uffd)]; fd >= 0)
      text += fmt::format("\n    uffd {}: {}", uffd, waiting(fd));
  if (target_alive()) text += "\n    pages: " + pagemap();
  return text;
}

int Driver::add_uffd(int fd) {
  const auto free = std::ranges::find(uffds_, -1);
  if (free == uffds_.end()) {
    close(fd);
    return -1;
  }
  *free = fd;
  return static_cast<int>(free - uffds_.begin());
}

std::string Driver::create_text(const Operation& operation) {
  if (!target_alive()) return "the target is dead";
  const int fd = create(static_cast<int>(operation.other));
  if (fd < 0) return name_of(-fd);
  abi::ApiArgs args{.api = abi::kApi, .features = operation.mode, .ioctls = 0};
  std::memcpy(buffers().args.data(), &args, sizeof(args));
  const int result = ioctl(true, fd, abi::kIoctlApi, buffers().args.data());
  std::memcpy(&args, buffers().args.data(), sizeof(args));
  std::string text = fmt::format("{}, api {:#x}, features {:#x}, ioctls {:#x}", name_of(-std::min(result, 0)),
                                 args.api, args.features, args.ioctls);
  if (result < 0) {
    close(fd);
    return text;
  }
  return text + fmt::format(", uffd {}", add_uffd(fd));
}

std::string Driver::ioctl_text(const Operation& o, int fd) {
  const bool by_target = o.by_target && target_alive();
  const auto call = [&](unsigned long request, auto& args) {
    std::memcpy(buffers().args.data(), &args, sizeof(args));
    const int result = ioctl(by_target, fd, request, buffers().args.data());
    std::memcpy(&args, buffers().args.data(), sizeof(args));
    return name_of(-std::min(result, 0));
  };
  const auto fill = [&](unsigned long request) {
    abi::FillArgs args{.range = {o.start, o.length}, .mode = o.mode, .done = kUntouched};
    const std::string result = call(request, args);
    return fmt::format("{}, done {}", result, out_field(args.done));
  };
  switch (o.verb) {
    case Verb::reg: {
      abi::RegisterArgs args{.range = {o.start, o.length}, .mode = o.mode, .ioctls = 0};
      const std::string result = call(abi::kIoctlRegister, args);
      return fmt::format("{}, ioctls {:#x}", result, args.ioctls);
    }
    case Verb::unregister:
    case Verb::wake: {
      abi::RangeArgs args{o.start, o.length};
      return call(o.verb == Verb::wake ? abi::kIoctlWake : abi::kIoctlUnregister, args);
    }
    case Verb::copy: {
      const std::span<std::byte> bytes = source();
      const std::uint64_t page = o.place < kAreas ? 4096 : 2u << 20;
      for (std::size_t at = 0; at < bytes.size() && at < o.length; at += page)
        std::memset(bytes.data() + at, copied_byte(o.value, at / page), page);
      const auto begin = reinterpret_cast<std::uintptr_t>(bytes.data());
      abi::CopyArgs args{.dst = o.start,
                         .src = o.bad_source ? begin + bytes.size() - page : begin,
                         .len = o.length,
                         .mode = o.mode,
                         .done = kUntouched};
      const std::string result = call(abi::kIoctlCopy, args);
      return fmt::format("{}, done {}", result, out_field(args.done));
    }
    case Verb::move: {
      abi::CopyArgs args{.dst = o.start, .src = o.other, .len = o.length, .mode = o.mode, .done = kUntouched};
      const std::string result = call(abi::kIoctlMove, args);
      return fmt::format("{}, done {}", result, out_field(args.done));
    }
    case Verb::writeprotect: {
      abi::WriteprotectArgs args{.range = {o.start, o.length}, .mode = o.mode};
      return call(abi::kIoctlWriteprotect, args);
    }
    case Verb::zeropage:
      return fill(abi::kIoctlZeropage);
    case Verb::resume:
      return fill(abi::kIoctlContinue);
    default:
      return fill(abi::kIoctlPoison);
  }
}

std::string Driver::scan_text(const Operation& o) {
  if (!target_alive()) return "the target is dead";
  const int pagemap = open_pagemap();
  std::array<abi::PageRegion, 8> found{};
  abi::ScanArgs args{.size = sizeof(args),
                     .flags = o.mode,
                     .start = o.start,
                     .end = o.start + o.length,
                     .walk_end = 0,
                     .vec = o.value == 0 ? 0 : reinterpret_cast<std::uintptr_t>(found.data()),
                     .vec_len = o.value,
                     .max_pages = o.new_length,
                     .category_inverted = o.inverted,
                     .category_mask = o.mask,
                     .category_anyof_mask = o.any_of,
                     .return_mask = o.report};
  const int result = ioctl(false, pagemap, abi::kIoctlPagemapScan, &args);
  close(pagemap);
  if (result < 0) return name_of(-result);
  std::string text = fmt::format("{} ranges, walked to {:#x}", result, args.walk_end);
  for (const abi::PageRegion& region : std::span(found).first(static_cast<std::size_t>(result)))
    text += fmt::format(" [{:#x}, {:#x}) {:#x}", region.start, region.end, region.categories);
  return text;
}

std::string Driver::read_messages(const Operation& operation, bool order_is_open) {
  const int fd = uffds_[static_cast<std::size_t>(operation.uffd)];
  std::vector<SeenMessage> seen;
  std::string error;
  const bool all = operation.all || order_is_open;
  // What is read may be followed at once by what it lets others do, so "all" is one read.
  const std::ptrdiff_t bytes = read(fd, std::span(buffers().messages).first(all ? 64 : 1));
  if (bytes < 0) return name_of(static_cast<int>(-bytes));
  for (std::size_t i = 0; i < static_cast<std::size_t>(bytes) / sizeof(abi::Msg); ++i) {
    const abi::Msg& message = buffers().messages[i];
    const bool fault = message.event == abi::kEventPagefault;
    const int child =
        message.event == abi::kEventFork ? add_uffd(static_cast<int>(message.arg.fork.ufd)) : -1;
    const int thread = fault ? thread_of_tid(message.arg.pagefault.ptid) : -1;
    seen.push_back({.fault = fault, .text = describe(message, thread, child)});
  }
  return describe(std::move(seen), order_is_open);
}

std::string Driver::thread_operation(const Operation& operation) {
  const ThreadReport before = report(operation.thread);
  if (before.state != ThreadReport::State::idle) return "not idle";
  int new_thread = -1;
  if (operation.verb == Verb::fork) {
    if (children_ == kChildren) return "no more children";
    new_thread = kThreads + children_++;
  }
  current_[static_cast<std::size_t>(operation.thread)] = operation;
  start(operation.thread, operation, new_thread);
  return "started";
}

std::string Driver::carry_out(const Operation& operation, bool order_is_open) {
  const int fd = uffds_[static_cast<std::size_t>(operation.uffd)];
  switch (operation.verb) {
    case Verb::create:
      return create_text(operation);
    case Verb::reg:
    case Verb::unregister:
    case Verb::wake:
    case Verb::copy:
    case Verb::zeropage:
    case Verb::resume:
    case Verb::poison:
    case Verb::writeprotect:
    case Verb::move:
      return fd < 0 ? "no such uffd" : ioctl_text(operation, fd);
    case Verb::scan:
      return scan_text(operation);
    case Verb::read:
      return fd < 0 ? "no such uffd" : read_messages(operation, order_is_open);
    case Verb::poll:
      return fd < 0 ? "no such uffd" : fmt::format("events {:#x}", poll(fd));
    case Verb::close:
      if (fd < 0) return "no such uffd";
      close(fd);
      uffds_[static_cast<std::size_t>(operation.uffd)] = -1;
      return "closed";
    case Verb::signal: {
      // Only to a thread in user mode: one in the kernel would spin, and never settle.
      const Operation& current = current_[static_cast<std::size_t>(operation.thread)];
      if (report(operation.thread).state != ThreadReport::State::fault_sleep || current.kernel_mode)
        return "not asleep in user mode";
      send_signal(operation.thread);
      return "sent";
    }
    case Verb::file_write:
      file_write(operation.place, operation.start, operation.value);
      return "written";
    case Verb::punch:
      punch(operation.place, operation.start);
      return "punched";
    case Verb::truncate:
      if (operation.place >= kAreas) return "not for huge pages";
      truncate(operation.place, operation.start);
      return "truncated";
    case Verb::kill:
      if (!target_alive()) return "the target is dead";
      kill_target();
      return "killed";
    case Verb::dump:
      return target_alive() ? dump() : "the target is dead";
    default:
      return thread_operation(operation);
  }
}

}  // namespace uffdkit::differential
