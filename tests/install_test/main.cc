// A program of somebody else's: it needs the installed headers, the library and what the library needs.
#include <uffdkit/uffd.h>

#include <cstdio>

int main() {
  const uffdkit::Features known = uffdkit::known_features().front().bit;
  const uffdkit::Result<uffdkit::KernelFeatures> kernel = uffdkit::probe_features();
  std::printf("%s; %s\n", uffdkit::to_string(known).c_str(),
              kernel ? uffdkit::to_string(kernel->available).c_str() : kernel.error().text().c_str());
  return uffdkit::to_string(known) == uffdkit::known_features().front().name ? 0 : 1;
}
