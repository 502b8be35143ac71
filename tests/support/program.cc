#include "support/program.h"

#include <fcntl.h>
#include <grp.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <uffdkit/unique_fd.h>
#include <unistd.h>

#include <cerrno>
#include <system_error>

#include "support/arguments.h"
#include "support/paths.h"

namespace uffdkit::test {
namespace {

[[noreturn]] void fail(const std::string& what) {
  throw std::system_error(errno, std::generic_category(), what);
}

std::string read_all(int fd) {
  const off_t size = lseek(fd, 0, SEEK_END);
  std::string text(static_cast<std::size_t>(size), '\0');
  if (pread(fd, text.data(), text.size(), 0) != size) fail("pread");
  return text;
}

}  // namespace

Finished run_program(const std::string& program, const std::vector<std::string>& arguments, uid_t as) {
  const std::string path = built(program);
  // Opened here, since the other user may not be able to reach the path.
  const UniqueFd binary(open(path.c_str(), O_PATH | O_CLOEXEC));
  const UniqueFd out(memfd_create("stdout", MFD_CLOEXEC));
  const UniqueFd err(memfd_create("stderr", MFD_CLOEXEC));
  if (!binary || !out || !err) fail(path);
  std::vector<std::string> words = {path};
  words.insert(words.end(), arguments.begin(), arguments.end());
  const std::vector<char*> argv = exec_pointers(words);

  const pid_t pid = fork();
  if (pid < 0) fail("fork");
  if (pid == 0) {
    const bool ready = dup2(out.get(), STDOUT_FILENO) >= 0 && dup2(err.get(), STDERR_FILENO) >= 0;
    const bool became =
        as == 0 || (setgroups(0, nullptr) == 0 && setresgid(as, as, as) == 0 && setresuid(as, as, as) == 0);
    if (ready && became) fexecve(binary.get(), argv.data(), environ);
    _exit(127);
  }
  int status = 0;
  if (waitpid(pid, &status, 0) != pid) fail("waitpid");
  return {.exit_code = WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status),
          .out = read_all(out.get()),
          .err = read_all(err.get())};
}

}  // namespace uffdkit::test
