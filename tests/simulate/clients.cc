#include "simulate/clients.h"

#include <fmt/format.h>

#include <cstddef>
#include <optional>
#include <utility>

namespace uffdkit::simulate {
namespace {

constexpr std::size_t kClientsMax = 9;  // with children of fork

}  // namespace

Clients::Clients(Story& story, sim::Kernel& kernel, RealDescriptors& descriptors, const Managers& managers)
    : story_(story),
      kernel_(kernel),
      descriptors_(descriptors),
      around_{.story = story, .descriptors = descriptors, .managers = managers, .places = places_} {}

void Clients::add() {
  all_.push_back(std::make_unique<ManagerClient>(around_, kernel_.spawn()));
}

void Clients::begin_something(ManagerClient& client) {
  Worker& worker = client.workers[story_.draw(client.workers.size())];
  if (!client.may_run() || !worker.is_idle() || client.memory.pages().empty()) return;
  const Address address = client.some_page(story_);
  Doing doing{};
  const std::uint64_t what = story_.draw(client.speaks() == Speaks::firecracker ? 39 : 44);
  if (what < 33) {
    doing = ClientProcess::some_access(story_, address, what < 8);
  } else if (what == 43) {
    if (all_.size() + newcomers_.size() >= kClientsMax) return;
    doing.kind = Doing::Kind::fork;
  } else {
    doing.range = {address, ByteCount((1 + story_.draw(6)) * kPage)};
    if (client.is_changing(doing.range)) return;
    doing.kind = what < 38 ? Doing::Kind::advise : what == 38 ? Doing::Kind::unmap : Doing::Kind::remap;
    if (doing.kind == Doing::Kind::remap) doing = client.some_move(story_, doing.range, places_.next(), true);
  }
  if (client.may_do(doing)) begin(client, worker, std::move(doing));
}

void Clients::begin(ManagerClient& client, Worker& worker, Doing doing) {
  const Address address = doing.kind == Doing::Kind::access ? doing.access.address : doing.range.start;
  story_.note(fmt::format("process {}, thread {}: {} {:#x}+{:#x}", client.process.pid(), worker.thread->tid(),
                          to_string(doing.kind), address.value, doing.range.length.value));
  descriptors_.alone([&] { client.begin(worker, std::move(doing)); });
}

bool Clients::turn() {
  const bool moved = descriptors_.alone([&] {
    if (!kernel_.step()) return false;
    for (const auto& client : all_)
      for (Worker& worker : client->workers) look_at(*client, worker);
    return true;
  });
  for (auto& child : std::exchange(newcomers_, {})) all_.push_back(std::move(child));
  return moved;
}

void Clients::look_at(ManagerClient& client, Worker& worker) {
  const std::optional<Done> done = client.look_at(worker, client.dropping());
  if (!done) return;
  const auto& [doing, ended] = *done;
  story_.hear(fmt::format("{}={} ", worker.thread->tid(), to_string(ended)));
  if (doing.kind == Doing::Kind::fork) {
    newcomers_.push_back(std::make_unique<ManagerClient>(around_, *ended.child, client, *doing.of_child));
    story_.note(fmt::format("process {} has a child, {}", client.process.pid(), ended.child->pid()));
  } else if (doing.kind == Doing::Kind::remap && ended.result < 0) {
    // Where a manager has unregistered part of it, that is a mapping of its own: it may have been moved
    // alone.
    client.forget(doing.remap.from);
    client.forget({*doing.remap.to, doing.remap.new_length});
  } else if (doing.kind == Doing::Kind::access) {
    const Address address = doing.access.address;
    const bool is_mapped = client.memory.find(address) != nullptr;
    if (is_mapped || !client.is_unknown(address)) client.check(story_, doing.access, ended, !is_mapped);
  }
}

std::string Clients::wait_for() const {
  for (const auto& client : all_)
    if (std::string text = client->waits_for(); !text.empty()) return text;
  return "";
}

}  // namespace uffdkit::simulate
