// Cuts a program off after each of its stores into some memory, to see what somebody would find there who
// goes on with that memory after its death.
//
// The memory is kept read-only; a store into it raises SIGSEGV, is let through, and the instruction after it
// raises SIGTRAP. x86-64 only, and without sanitizers, which have handlers of their own. Threads: one.
#pragma once

#include <cstddef>
#include <functional>
#include <span>
#include <string>

namespace uffdkit::test {

// Why that cannot be done here; empty if it can.
std::string stores_cannot_be_cut();

// Runs `work`, and `look` after each instruction of it that stores into `memory` (whole pages, mapped for
// reading and writing). `look` does not touch the memory by this mapping.
void after_each_store(std::span<std::byte> memory, const std::function<void()>& work,
                      const std::function<void()>& look);

// Where this process has mapped the beginning of a file, as long as the mapping is.
std::span<std::byte> mapping_of(int fd);

}  // namespace uffdkit::test
