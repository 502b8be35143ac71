// A userfaultfd that answers what the test says; it has no memory and no threads.
#pragma once

#include <uffdkit/abi.h>
#include <uffdkit/features.h>
#include <uffdkit/system_calls.h>

#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace uffdkit::test {

class ScriptedSystemCalls : public SystemCalls {
 public:
  // What the kernel under test would be.
  int device_error = 0;       // errno of opening /dev/userfaultfd
  int system_call_error = 0;  // errno of userfaultfd(2) with kernel faults
  int user_mode_error = 0;    // errno of userfaultfd(2) with UFFD_USER_MODE_ONLY
  Features kernel_features{abi::kFeaturesKnown};
  bool fork_permitted = true;  // false: UFFDIO_API with EVENT_FORK is refused with EPERM
  int descriptor_flags = 0;    // of F_GETFL
  std::string file_text;       // what any other opened file holds
  int read_error = 0;          // errno of reading any descriptor
  int poll_answer = 0;         // of poll_readable
  // The answer to an ioctl that is not UFFDIO_API or USERFAULTFD_IOC_NEW; may write to its argument.
  std::function<int(unsigned long request, void* argument)> on_ioctl;

  // What was asked.
  std::vector<int> creation_flags;       // of each userfaultfd made or refused
  std::vector<Features> features_asked;  // of each UFFDIO_API
  const std::set<int>& open_descriptors() const { return open_; }
  // A descriptor that somebody else has opened.
  int make_descriptor();

  int userfaultfd(int flags) override;
  int open(const char* path, int flags) override;
  int ioctl(int fd, unsigned long request, std::uintptr_t argument) override;
  std::ptrdiff_t read(int fd, void* buffer, std::size_t bytes) override;
  int poll_readable(int fd, int timeout_ms) override;
  int get_flags(int fd) override;
  int duplicate(int fd) override;
  int close(int fd) override;

 private:
  int enable(int fd, abi::ApiArgs& args);

  int next_ = 100;
  std::set<int> open_;
  std::set<int> enabled_;
};

}  // namespace uffdkit::test
