// The machine behind a Kernel: its processes, their threads, and who runs next.
#pragma once

#include <random>

#include "sim/descriptors.h"
#include "sim/thread.h"

namespace uffdkit::sim {

class ProcessImpl;

struct Kernel::State {
  explicit State(KernelOptions settings);
  ~State();

  // A turn for one runnable thread, drawn from the seed; false if there is none.
  bool step();
  std::shared_ptr<AddressSpace> new_space();
  PageCachePtr new_object(PageCache::Kind kind, ByteCount size);
  ProcessImpl& new_process(Credentials who, std::shared_ptr<DescriptorTable> descriptors,
                           std::shared_ptr<AddressSpace> space);
  int next_id() { return ++last_id_; }

  KernelOptions options;
  std::mt19937_64 random;
  HugePoolPtr pool;
  PageCache::Spaces spaces;
  std::vector<std::unique_ptr<ProcessImpl>> processes;

 private:
  int last_id_ = 99;
};
using Machine = Kernel::State;

class ProcessImpl final : public Process {
 public:
  ProcessImpl(Machine& machine, Credentials who, std::shared_ptr<DescriptorTable> descriptors,
              std::shared_ptr<AddressSpace> space);
  ~ProcessImpl() override;

  int pid() const override { return pid_; }
  bool alive() const override { return alive_; }
  SystemCalls& system_calls() override { return *calls_; }
  Thread& spawn_thread() override;
  std::vector<Thread*> threads() override;
  Result<Address> map(const MapRequest& request) override;
  std::optional<std::byte> peek(Address address) const override;
  std::size_t peek(Address address, std::span<std::byte> to) const override;
  std::size_t poke(Address address, std::span<const std::byte> bytes) override;
  bool present(Address address) const override;
  bool write_protected(Address address) const override;
  void unpin() override;
  std::size_t open_descriptors() const override { return descriptors_->size(); }
  int pass_descriptor(int fd, Process& to) override;
  Process& clone_with_files() override;
  void kill() override;
  void exec() override;

  Machine& machine() { return machine_; }
  const std::shared_ptr<AddressSpace>& space() const { return space_; }
  std::shared_ptr<DescriptorTable>& descriptors() { return descriptors_; }
  const Credentials& credentials() const { return who_; }
  Caller caller();
  void pin(FramePtr frame);
  const std::vector<std::unique_ptr<ThreadImpl>>& all_threads() const { return threads_; }

 private:
  const Pte* entry(Address address) const;
  void end_threads();

  Machine& machine_;
  int pid_;
  bool alive_ = true;
  Credentials who_;
  std::shared_ptr<DescriptorTable> descriptors_;
  std::shared_ptr<AddressSpace> space_;
  std::unique_ptr<SystemCalls> calls_;
  std::vector<FramePtr> pinned_;
  // Destroyed first: their operations hold on to userfaultfds and memory.
  std::vector<std::unique_ptr<ThreadImpl>> threads_;
};

// The system calls of a process (system_calls.cc).
std::unique_ptr<SystemCalls> make_system_calls(ProcessImpl& process);

// mmap(2) where nothing is mapped yet: the address, or -errno (mapping.cc).
std::int64_t map_area(Machine& machine, AddressSpace& space, const MapRequest& request);

}  // namespace uffdkit::sim
