// Descriptor tables, and what descriptors can be open on.
#pragma once

#include <map>

#include "sim/context.h"

namespace uffdkit::sim {

// The process and the settings behind a system call.
struct Caller {
  const Credentials& who;
  const KernelOptions& options;
  // nullptr: a process without memory of its own in the model.
  std::shared_ptr<AddressSpace> space;
  DescriptorTable& descriptors;
};

// An open file description. Descriptors share it; when the last one goes, so does it.
class File {
 public:
  virtual ~File() = default;
  virtual int ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) = 0;
  // -EAGAIN: nothing to read yet.
  virtual std::ptrdiff_t read(Caller& caller, std::uintptr_t buffer, std::size_t bytes) = 0;
  // poll(2)'s events.
  virtual int poll() const = 0;
};
using FilePtr = std::shared_ptr<File>;

class UffdFile final : public File {
 public:
  explicit UffdFile(ContextPtr context) : context_(std::move(context)) {}
  // NOLINTNEXTLINE(bugprone-exception-escape): only want of memory throws.
  ~UffdFile() override { context_->release(); }
  int ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(Caller& caller, std::uintptr_t buffer, std::size_t bytes) override;
  int poll() const override;
  Context& context() const { return *context_; }

 private:
  ContextPtr context_;
};

// /dev/userfaultfd.
class DeviceFile final : public File {
 public:
  int ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(Caller& caller, std::uintptr_t buffer, std::size_t bytes) override;
  int poll() const override;
};

// /proc/self/fdinfo/FD, as it was when it was opened.
class TextFile final : public File {
 public:
  explicit TextFile(std::string text) : text_(std::move(text)) {}
  int ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(Caller& caller, std::uintptr_t buffer, std::size_t bytes) override;
  int poll() const override;

 private:
  std::string text_;
  std::size_t position_ = 0;
};

// What fdinfo says of a userfaultfd with these creation flags.
std::string fdinfo_text(const Context& context);

class DescriptorTable {
 public:
  explicit DescriptorTable(std::size_t most) : most_(most) {}
  // fork(2)'s copy: other descriptors, the same files.
  DescriptorTable(const DescriptorTable&) = default;
  DescriptorTable& operator=(const DescriptorTable&) = delete;

  // The lowest free descriptor, or -EMFILE. `flags`: O_CLOEXEC is the descriptor's, O_NONBLOCK the file's.
  int install(FilePtr file, int flags);
  // nullptr: not open.
  FilePtr file(int fd) const;
  // fcntl(2) with F_GETFL, or -EBADF.
  int flags(int fd) const;
  int close(int fd);
  void close_on_exec();
  std::size_t size() const { return entries_.size(); }

 private:
  struct Entry {
    FilePtr file;
    int flags;
  };
  std::size_t most_;
  std::map<int, Entry> entries_;
};

// userfaultfd(2) or USERFAULTFD_IOC_NEW, once allowed.
int new_userfaultfd(Caller& caller, int flags);

}  // namespace uffdkit::sim
