// Threads that serve faults must not run the program's signal handlers: a handler may touch memory that only
// this very thread could bring.
#pragma once

#include <signal.h>

namespace uffdkit {

// While it lives, signals are blocked in the calling thread, and in threads that it starts from then on; all
// but those that a thread's own mistake raises.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t blocked;
    ::sigfillset(&blocked);
    for (const int mistake : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS})
      ::sigdelset(&blocked, mistake);
    ::pthread_sigmask(SIG_BLOCK, &blocked, &before_);
  }
  ~SignalsBlocked() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

 private:
  sigset_t before_;
};

}  // namespace uffdkit
