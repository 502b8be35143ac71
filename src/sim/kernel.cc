#include <fmt/format.h>

#include <algorithm>
#include <cerrno>
#include <utility>

#include "base/check.h"
#include "sim/machine.h"

namespace uffdkit::sim {

// ---- the machine ----------------------------------------------------------------------------------------

Kernel::State::State(KernelOptions settings)
    : options(std::move(settings)),
      random(options.seed),
      pool(std::make_shared<HugePool>(options.huge_pages)) {}

Kernel::State::~State() {
  // Processes refer to each other through userfaultfds; ending them one by one keeps that orderly.
  for (const auto& process : processes) process->kill();
}

bool Kernel::State::step() {
  std::vector<ThreadImpl*> runnable;
  for (const auto& process : processes)
    for (const auto& thread : process->all_threads())
      if (thread->state() == Thread::State::runnable) runnable.push_back(thread.get());
  if (runnable.empty()) return false;
  runnable[random() % runnable.size()]->turn();
  return true;
}

std::shared_ptr<AddressSpace> Kernel::State::new_space() {
  auto space = std::make_shared<AddressSpace>();
  space->reads_map_zero_page = options.reads_map_zero_page;
  std::erase_if(spaces, [](const auto& gone) { return gone.expired(); });
  spaces.push_back(space);
  return space;
}

PageCachePtr Kernel::State::new_object(PageCache::Kind kind, ByteCount size) {
  return std::make_shared<PageCache>(kind, size, pool, spaces);
}

ProcessImpl& Kernel::State::new_process(Credentials who, std::shared_ptr<DescriptorTable> descriptors,
                                        std::shared_ptr<AddressSpace> space) {
  processes.push_back(
      std::make_unique<ProcessImpl>(*this, std::move(who), std::move(descriptors), std::move(space)));
  return *processes.back();
}

// ---- the public face ------------------------------------------------------------------------------------

Kernel::Kernel(KernelOptions options) : state_(std::make_unique<State>(std::move(options))) {}
Kernel::~Kernel() = default;

Process& Kernel::spawn(Credentials credentials) {
  return state_->new_process(std::move(credentials),
                             std::make_shared<DescriptorTable>(state_->options.descriptors_max),
                             state_->new_space());
}

ObjectPtr Kernel::make_shmem(ByteCount size) {
  return state_->new_object(PageCache::Kind::shmem, size);
}
ObjectPtr Kernel::make_hugetlb(ByteCount size) {
  return state_->new_object(PageCache::Kind::hugetlb, size);
}
ObjectPtr Kernel::make_file(ByteCount size) {
  return state_->new_object(PageCache::Kind::file, size);
}

bool Kernel::step() {
  return state_->step();
}

bool Kernel::run(std::size_t turns_max) {
  for (std::size_t turn = 0; turn < turns_max; ++turn)
    if (!state_->step()) return true;
  return false;
}

std::size_t Kernel::spare_huge_pages() const {
  return state_->pool->spare();
}

KernelOptions& Kernel::options() {
  return state_->options;
}

// ---- what must always hold ------------------------------------------------------------------------------

namespace {

void check_threads(const ProcessImpl& process, std::vector<std::string>& wrong) {
  for (const auto& thread : process.all_threads()) {
    const bool asleep =
        thread->state() == Thread::State::fault_sleep || thread->state() == Thread::State::event_sleep;
    const Context* context = thread->waits_for();
    if (asleep && (context == nullptr || context->released || !context->has_queued(*thread)))
      wrong.push_back(fmt::format("thread {} sleeps, and nobody can wake it", thread->tid()));
    if (asleep && !process.alive())
      wrong.push_back(fmt::format("thread {} outlived its process", thread->tid()));
  }
}

void check_memory(const ProcessImpl& process, std::vector<std::string>& wrong) {
  std::uint64_t last_end = 0;
  for (const auto& [start, area] : process.space()->areas()) {
    if (area.start != start || area.start >= area.end || area.start < last_end)
      wrong.push_back(fmt::format("area {:#x} is out of place", start));
    last_end = area.end;
    if ((area.context != nullptr) != (area.modes != 0))
      wrong.push_back(fmt::format("area {:#x} is half registered", start));
    if (area.context && (area.context->released || area.context->space() != process.space()))
      wrong.push_back(fmt::format("area {:#x} belongs to a userfaultfd that cannot serve it", start));
  }
  for (const auto& [page, pte] : process.space()->pages()) {
    const Area* area = process.space()->find(page);
    if (area == nullptr || page % area->page() != 0)
      wrong.push_back(fmt::format("page {:#x} lies in no area", page));
    else if (pte.writable && (!area->writable || pte.zero))
      wrong.push_back(fmt::format("page {:#x} is writable and must not be", page));
  }
}

}  // namespace

std::vector<std::string> Kernel::violations() const {
  std::vector<std::string> wrong;
  for (const auto& process : state_->processes) {
    check_threads(*process, wrong);
    check_memory(*process, wrong);
  }
  return wrong;
}

// ---- words ----------------------------------------------------------------------------------------------

Credentials user(unsigned uid, std::vector<unsigned> gids) {
  return {.uid = uid, .gids = std::move(gids), .cap_sys_ptrace = false, .cap_dac_override = false};
}

PageSize page_size(Memory memory) {
  return memory == Memory::hugetlb_shared || memory == Memory::hugetlb_private ? kPage2M : kPage4K;
}

std::string to_string(Memory memory) {
  switch (memory) {
    case Memory::anonymous:
      return "anonymous";
    case Memory::shmem_shared:
      return "shmem shared";
    case Memory::shmem_private:
      return "shmem private";
    case Memory::hugetlb_shared:
      return "hugetlb shared";
    case Memory::hugetlb_private:
      return "hugetlb private";
    case Memory::file_shared:
      return "file shared";
    case Memory::file_private:
      return "file private";
  }
  return "?";
}

std::string to_string(Thread::State state) {
  switch (state) {
    case Thread::State::idle:
      return "idle";
    case Thread::State::runnable:
      return "runnable";
    case Thread::State::fault_sleep:
      return "asleep in a fault";
    case Thread::State::event_sleep:
      return "asleep for an event";
    case Thread::State::dead:
      return "dead";
  }
  return "?";
}

std::string to_string(const Completion& completion) {
  switch (completion.kind) {
    case Completion::Kind::value:
      return fmt::format("byte {:#04x}", std::to_integer<int>(completion.value));
    case Completion::Kind::result:
      return fmt::format("result {}", completion.result);
    case Completion::Kind::sigsegv:
      return fmt::format("SIGSEGV code {} at {:#x}", completion.result, completion.address.value);
    case Completion::Kind::sigbus:
      return fmt::format("SIGBUS code {} at {:#x}", completion.result, completion.address.value);
  }
  return "?";
}

}  // namespace uffdkit::sim
