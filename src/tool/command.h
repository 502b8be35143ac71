// What subcommands have in common. A subcommand is a function that adds itself to the command line and, when
// it has run, leaves its exit code in `exit_code`.
#pragma once

#include <uffdkit/error.h>

#include <array>
#include <cstdint>
#include <string>

namespace CLI {
class App;
}

namespace uffdkit::tool {

inline constexpr int kExitDone = 0;
inline constexpr int kExitFailed = 1;  // the answer is no, or the work failed
inline constexpr int kExitUsage = 2;   // the command line is wrong

// Prints "uffdkit: <error>" with its remedy on stderr; returns kExitFailed.
int report(const Error& error);

// Where a manager answers questions if nothing else is said: /run/uffdkit.sock for root, else in the user's
// runtime directory.
std::string default_control_socket();

// As many descriptors as this process may have: each client takes a few.
void raise_descriptor_limit();

// The options of whatever serves faults.
inline constexpr char kFaultAroundHelp[] =
    "Pages of 4 KiB that are brought with each fault, its own included; 1 turns it off";
void add_fault_around_option(CLI::App& command, const std::string& name, std::uint64_t& pages,
                             const std::string& help);
void add_workers_option(CLI::App& command, unsigned& workers);
void add_no_sandbox_option(CLI::App& command, bool& no_sandbox);

void add_serve(CLI::App& app, int& exit_code);
void add_status(CLI::App& app, int& exit_code);
void add_listen(CLI::App& app, int& exit_code);
void add_upgrade(CLI::App& app, int& exit_code);
void add_drain(CLI::App& app, int& exit_code);
void add_doctor(CLI::App& app, int& exit_code);
void add_resume(CLI::App& app, int& exit_code);
void add_criu(CLI::App& app, int& exit_code);
void add_image(CLI::App& app, int& exit_code);

inline constexpr std::array kSubcommands = {add_serve,   add_image,  add_status, add_listen, add_drain,
                                            add_upgrade, add_resume, add_criu,   add_doctor};

}  // namespace uffdkit::tool
