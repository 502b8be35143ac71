// The requests of ioctl(2) that serving the memory of others takes, for whoever filters system calls.
#pragma once

#include <uffdkit/abi.h>

#include <array>

namespace uffdkit {

// Without UFFDIO_API and those that make a userfaultfd: who serves is handed those that clients have made.
inline constexpr std::array kServingRequests = {
    abi::kIoctlCopy,         abi::kIoctlWake,   abi::kIoctlZeropage,
    abi::kIoctlContinue,     abi::kIoctlPoison, abi::kIoctlRegister,
    abi::kIoctlWriteprotect, abi::kIoctlMove,   abi::kIoctlUnregister};

}  // namespace uffdkit
