#include "simulate/client_process.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <iterator>
#include <utility>

namespace uffdkit::simulate {
namespace {

constexpr std::size_t kThreads = 3;
constexpr ByteCount kPlaceBytes(64 * kPage);

}  // namespace

std::string_view to_string(Doing::Kind kind) {
  constexpr std::array kNames = {"nothing", "access", "fork", "madvise", "munmap", "mremap"};
  return kNames[static_cast<std::size_t>(kind)];
}

AddressRange ClientProcess::begin_with(const sim::MapRequest& map, RegisterModes modes,
                                       std::uint64_t first_image_page) {
  const AddressRange range{process.map(map).value(), map.length};
  uffd->register_range(range, modes).value();
  memory.add(range, first_image_page);
  spawn_workers();
  return range;
}

void ClientProcess::begin_as_child(ExpectedMemory its_memory) {
  // Its copy of the parent's descriptor would keep the parent waiting if everybody else had closed theirs.
  for (int fd = 0; process.open_descriptors() > 0; ++fd) process.system_calls().close(fd);
  memory = std::move(its_memory);
  workers.push_back({.thread = process.threads().front()});
  spawn_workers();
}

void ClientProcess::spawn_workers() {
  while (workers.size() < kThreads) workers.push_back({.thread = &process.spawn_thread()});
}

Address ClientProcess::some_page(Random& random) const {
  auto page = memory.pages().begin();
  std::advance(page, static_cast<std::ptrdiff_t>(random.draw(memory.pages().size())));
  return Address(page->first);
}

bool ClientProcess::is_forking() const {
  return std::ranges::any_of(workers,
                             [](const Worker& worker) { return worker.doing.kind == Doing::Kind::fork; });
}

bool ClientProcess::is_changing(AddressRange range) const {
  return std::ranges::any_of(workers, [&](const Worker& worker) {
    return worker.doing.changes_memory() && worker.doing.range.overlaps(range);
  });
}

Doing ClientProcess::some_access(Random& random, Address page, bool write) {
  return {.kind = Doing::Kind::access,
          .access = {.address = page + ByteCount(random.draw(kPage)),
                     .write = write,
                     .kernel_mode = random.one_in(6),
                     .value = static_cast<std::byte>(random.draw(256))}};
}

Doing ClientProcess::some_move(Random& random, AddressRange range, Address to, bool may_stay_mapped) {
  std::uint64_t pages = 0;
  while (pages * kPage < range.length.value && memory.find(range.start + ByteCount(pages * kPage)) != nullptr)
    ++pages;
  range.length = ByteCount(pages * kPage);
  ByteCount length = random.one_in(2) ? range.length : ByteCount((1 + random.draw(8)) * kPage);
  if (!grows) length = std::min(length, range.length);
  return {.kind = Doing::Kind::remap,
          .range = range,
          .remap = {.from = range,
                    .new_length = length,
                    .may_move = true,
                    .dont_unmap = may_stay_mapped && length == range.length && random.one_in(4),
                    .to = to}};
}

void ClientProcess::begin(Worker& worker, Doing doing) {
  switch (doing.kind) {
    case Doing::Kind::nothing:
      break;
    case Doing::Kind::access:
      worker.thread->access(doing.access);
      break;
    case Doing::Kind::fork:
      worker.thread->fork();
      break;
    case Doing::Kind::advise:
      memory.begin_leaving(doing.range);
      worker.thread->advise(doing.range, sim::Advice::dont_need);
      break;
    case Doing::Kind::unmap:
      worker.thread->unmap(doing.range);
      break;
    case Doing::Kind::remap:
      worker.thread->remap(doing.remap);
      break;
  }
  worker.doing = std::move(doing);
}

std::optional<Done> ClientProcess::look_at(Worker& worker, std::span<const AddressRange> leaving) {
  Doing& doing = worker.doing;
  const sim::Thread::State state = worker.thread->state();
  if (doing.kind == Doing::Kind::nothing || state == sim::Thread::State::dead) return std::nullopt;
  if (state != sim::Thread::State::runnable && !std::exchange(doing.begun, true))
    take_effect(worker, leaving);
  if (state != sim::Thread::State::idle) return std::nullopt;
  const sim::Completion ended = worker.thread->last().value();
  if (doing.kind == Doing::Kind::advise) memory.end_leaving(doing.range, ended.result == 0);
  return Done{.doing = std::exchange(doing, {}), .ended = ended};
}

// After the first turn of what it does, in which the deed is done that others see.
void ClientProcess::take_effect(Worker& worker, std::span<const AddressRange> leaving) {
  Doing& doing = worker.doing;
  if (doing.kind == Doing::Kind::unmap) memory.forget(doing.range);
  if (doing.kind == Doing::Kind::fork) {
    doing.of_child = memory.child();
    for (const AddressRange range : leaving) doing.of_child->forget(range);
  }
  if (doing.kind != Doing::Kind::remap) return;
  const bool failed = worker.is_idle() && worker.thread->last().value().result < 0;
  if (failed) return;
  memory.move(doing.remap.from, *doing.remap.to, doing.remap.new_length, doing.remap.dont_unmap);
}

void ClientProcess::check(Story& story, const sim::Access& access, const sim::Completion& ended,
                          bool may_fail) {
  if (ended.kind != sim::Completion::Kind::value) {
    if (!may_fail)
      story.fail(
          fmt::format("{:#x} of process {}: {}", access.address.value, process.pid(), to_string(ended)));
    return;
  }
  const ExpectedMemory::Looked looked = memory.look_at(access, ended);
  if (looked.compared) story.count_checked_byte();
  if (!looked.wrong.empty()) story.fail(fmt::format("process {}: {}", process.pid(), looked.wrong));
}

Address Places::next() {
  return std::exchange(next_, next_ + kPlaceBytes);
}

}  // namespace uffdkit::simulate
