// What is the same on both machines: which calls an operation is made of, and what is written down of them.
#pragma once

#include <array>
#include <cstddef>
#include <span>

#include "compare/machine.h"

namespace uffdkit::differential {

// What a thread is to do, and how it ended; shared between processes on the real machine.
struct ThreadReport {
  enum class State : std::uint8_t { none, idle, fault_sleep, event_sleep, dead };
  State state = State::none;
  std::string ended;  // how the last operation ended; empty at first and while one is under way
};

class Driver : public Machine {
 public:
  std::string perform(const Operation& operation, bool order_is_open) override;

 protected:
  // Memory of the calling program that both the manager and the target can read and write.
  struct Buffers {
    std::array<std::byte, 96> args;
    std::array<abi::Msg, 64> messages;
  };
  virtual Buffers& buffers() = 0;
  // `bytes` of memory to copy from, followed by memory that cannot be read.
  virtual std::span<std::byte> source() = 0;

  virtual int create(int flags) = 0;  // by the target
  virtual int ioctl(bool by_target, int fd, unsigned long request, void* args) = 0;
  virtual std::ptrdiff_t read(int fd, std::span<abi::Msg> messages) = 0;
  virtual int poll(int fd) = 0;
  virtual void close(int fd) = 0;
  // A descriptor of the target's /proc/PID/pagemap, opened by the manager.
  virtual int open_pagemap() = 0;
  // pending and total of fdinfo.
  virtual std::string waiting(int fd) = 0;

  // Starts an operation of a thread, which is idle. `new_thread`: of fork.
  virtual void start(int thread, const Operation& operation, int new_thread) = 0;
  virtual void send_signal(int thread) = 0;
  virtual void settle() = 0;
  virtual ThreadReport report(int thread) = 0;
  virtual int thread_of_tid(std::uint32_t tid) = 0;

  virtual void file_write(int place, std::uint64_t page, std::uint8_t value) = 0;
  virtual void punch(int place, std::uint64_t page) = 0;
  virtual void truncate(int place, std::uint64_t pages) = 0;
  virtual void kill_target() = 0;
  virtual bool target_alive() = 0;
  // Present and armed pages of the target: a character for each.
  virtual std::string pagemap() = 0;
  // All bytes that there are, by reading them.
  virtual std::string dump() = 0;

  const std::array<int, kUffds>& uffds() const { return uffds_; }

 private:
  std::string carry_out(const Operation& operation, bool order_is_open);
  std::string read_messages(const Operation& operation, bool order_is_open);
  std::string ioctl_text(const Operation& operation, int fd);
  std::string scan_text(const Operation& operation);
  std::string create_text(const Operation& operation);
  std::string thread_operation(const Operation& operation);
  int add_uffd(int fd);

  std::array<int, kUffds> uffds_ = {-1, -1, -1, -1};
  std::array<Operation, kSlots> current_ = {};
  int children_ = 0;
};

}  // namespace uffdkit::differential
