// uffdkit doctor: what this kernel and this user can do, and what to do about what they cannot.
#include <fmt/format.h>

#include <CLI/CLI.hpp>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "tool/command.h"
#include "tool/doctor_report.h"

namespace uffdkit::tool {
namespace {

struct Options {
  std::optional<std::string> needs;  // as given
  bool json = false;
};

int report_usage(const Error& error) {
  fmt::print(stderr, "uffdkit doctor: {}\n{}\n", error.message(), wrapped(error.remedy(), 2));
  return kExitUsage;
}

void print_answers(std::span<const NeedAnswer> answers) {
  for (const NeedAnswer& answer : answers) fmt::print("{:20} {}\n", answer.need, answer.met ? "yes" : "no");
}

void report_lack(const NeedAnswer& answer) {
  const std::string lack = fmt::format("uffdkit doctor: {}: {}", answer.need, answer.reason);
  fmt::print(stderr, "{}\n{}\n", wrapped(lack, 0), wrapped(answer.remedy, 2));
}

int run(const Options& options) {
  std::vector<std::string> needs;
  if (options.needs) {
    auto parsed = parse_needs(*options.needs);
    if (!parsed) return report_usage(parsed.error());
    needs = std::move(*parsed);
  }
  const DoctorReport report = examine_machine();
  std::vector<NeedAnswer> answers;
  answers.reserve(needs.size());
  for (const std::string& need : needs) answers.push_back(answer_need(need, report));

  if (options.json)
    fmt::print("{}\n", doctor_json(report, answers).dump(2));
  else if (needs.empty())
    fmt::print("{}", doctor_text(report));
  else
    print_answers(answers);
  for (const NeedAnswer& answer : answers)
    if (!answer.met) report_lack(answer);
  return std::ranges::all_of(answers, &NeedAnswer::met) ? kExitDone : kExitFailed;
}

}  // namespace

void add_doctor(CLI::App& app, int& exit_code) {
  CLI::App* command = app.add_subcommand("doctor", "Say what this kernel and this user can do");
  const auto options = std::make_shared<Options>();
  command
      ->add_option(
          "--need", options->needs,
          "Abilities that must be there, comma separated; says yes or no to each instead of reporting")
      ->type_name("LIST");
  command->add_flag("--json", options->json, "Print the whole report as JSON");
  command->footer(
      fmt::format("Abilities:\n{}\n\n"
                  "Exit codes: 0 all that was asked for is there; 1 something is not (stderr says what, and "
                  "the remedy);\n"
                  "2 wrong use, such as an unknown ability.",
                  wrapped(fmt::format("{}", fmt::join(need_words(), ", ")), 2)));
  command->callback([options, &exit_code] { exit_code = run(*options); });
}

}  // namespace uffdkit::tool
