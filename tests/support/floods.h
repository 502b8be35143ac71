// Clients that send the manager more messages than it can use, as fast as the kernel lets them.
#pragma once

#include "support/client.h"

namespace uffdkit::test {

// Four threads read missing pages in a system call, with a signal to handle: they do not sleep in the fault
// but make its message again and again until the page is there. Returns when all pages are, and right.
void fault_under_signals(const ClientMemory& memory);
// Four threads give parts of the memory back; never returns.
void give_back_for_ever(const ClientMemory& memory);
// 32 threads touch pages and give them back; never returns.
void fault_for_ever(const ClientMemory& memory);

}  // namespace uffdkit::test
