// /proc/PID/pagemap of a simulated process: PAGEMAP_SCAN.
#pragma once

#include "sim/descriptors.h"

namespace uffdkit::sim {

class PagemapFile final : public File {
 public:
  // Outlives the process, and finds nothing then.
  explicit PagemapFile(std::shared_ptr<AddressSpace> space) : space_(std::move(space)) {}
  int ioctl(Caller& caller, unsigned long request, std::uintptr_t argument) override;
  // The entries themselves are not modelled: -EINVAL. Process::present and write_protected tell as much.
  std::ptrdiff_t read(Caller& caller, std::uintptr_t buffer, std::size_t bytes) override;
  int poll() const override;

 private:
  std::shared_ptr<AddressSpace> space_;
};

}  // namespace uffdkit::sim
