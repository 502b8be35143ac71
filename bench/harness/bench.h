// What every bench has: options, a directory for its images and sockets, tables for people and for programs.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace uffdkit::bench {

// A column shows this member of each row; `decimals` -1 for text.
struct Column {
  std::string key;
  std::string heading;
  int decimals = -1;
};

class Report {
 public:
  void table(const std::string& name, const std::string& title, std::vector<Column> columns);
  // To the table that was begun last; members that a row lacks show as "-".
  void row(nlohmann::ordered_json values);
  void note(const std::string& text);

  void print() const;
  nlohmann::ordered_json json() const;

 private:
  struct Table {
    std::string name;
    std::string title;
    std::vector<Column> columns;
    std::vector<nlohmann::ordered_json> rows;
    std::vector<std::string> notes;
  };
  std::vector<Table> tables_;
};

struct Options {
  bool smoke = false;     // small and quick: shows that the bench works, measures nothing
  unsigned rounds = 0;    // 0: the bench's own choice
  std::string json;       // a file to write; "-" for standard output, in place of the tables
  std::string uffdkit;    // the program under test
  std::string directory;  // of this run's own

  // The number of rounds, and what smoke makes of it.
  unsigned rounds_or(unsigned usual) const { return rounds != 0 ? rounds : smoke ? 2 : usual; }
};

// An option of a bench's own: a whole number from `least` to `most`.
template <class T>
void add_number(CLI::App& app, const std::string& name, T& value, const std::string& what, int least,
                int most) {
  app.add_option(name, value, what)->check(CLI::Range(least, most))->capture_default_str();
}

// A bench's main(): reads the options, those of `add_options` too, makes the directory and removes it, and
// prints the report. Exit codes: 0 done, 1 failed, 77 this machine lacks what it needs.
int run_bench(int argc, char** argv, const std::string& question,
              const std::function<void(CLI::App&)>& add_options,
              const std::function<void(const Options&, Report&)>& measure);

// The same for a bench whose own options are in `Settings`, with what these are if nothing is said.
template <class Settings>
int run_bench(int argc, char** argv, const std::string& question, void (*add_options)(CLI::App&, Settings&),
              void (*measure)(const Options&, const Settings&, Report&)) {
  Settings settings;
  return run_bench(
      argc, argv, question, [&](CLI::App& app) { add_options(app, settings); },
      [&](const Options& options, Report& report) { measure(options, settings, report); });
}

}  // namespace uffdkit::bench
