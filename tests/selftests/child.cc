#include "selftests/child.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <exception>
#include <variant>

namespace uffdkit::selftests {
namespace {

int fork_and_wait(const std::function<int()>& body) {
  const pid_t child = fork();
  if (child == 0) {
    // A test program that is killed must not leave the child behind.
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    try {
      _exit(body());
    } catch (const std::exception&) {
      _exit(99);
    }
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return -1;
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

}  // namespace

ForkedChild::ForkedChild(const Uffd& uffd, AddressRange served, const std::function<int()>& body)
    : waiter_(uffd, served, [this, body] { status_ = fork_and_wait(body); }) {}

int ForkedChild::wait() {
  waiter_.join();
  return status_;
}

Uffd take_child(const Uffd& uffd) {
  return uffd.adopt_child(std::get<ForkEvent>(test::next_message(uffd)).child_fd);
}

}  // namespace uffdkit::selftests
