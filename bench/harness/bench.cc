#include "harness/bench.h"

#include <fmt/format.h>
#include <sys/utsname.h>
#include <uffdkit/uffd.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <fstream>
#include <stdexcept>
#include <thread>

#include "support/paths.h"
#include "support/temp_dir.h"

namespace uffdkit::bench {
namespace {

constexpr int kExitSkipped = 77;

std::string cell(const nlohmann::ordered_json& row, const Column& column) {
  if (!row.contains(column.key)) return "-";
  const auto& value = row.at(column.key);
  if (value.is_string()) return value.get<std::string>();
  return fmt::format("{:.{}f}", value.get<double>(), std::max(column.decimals, 0));
}

}  // namespace

void Report::table(const std::string& name, const std::string& title, std::vector<Column> columns) {
  tables_.push_back({.name = name, .title = title, .columns = std::move(columns), .rows = {}, .notes = {}});
}

void Report::row(nlohmann::ordered_json values) {
  tables_.back().rows.push_back(std::move(values));
}

void Report::note(const std::string& text) {
  tables_.back().notes.push_back(text);
}

// As Markdown, so that it can be put into a document as it is.
void Report::print() const {
  for (const Table& table : tables_) {
    fmt::print("\n{}\n\n", table.title);
    std::vector<std::size_t> widths;
    for (const Column& column : table.columns) {
      std::size_t width = column.heading.size();
      for (const auto& row : table.rows) width = std::max(width, cell(row, column).size());
      widths.push_back(width);
    }
    const auto line = [&](const std::function<std::string(std::size_t)>& text_of) {
      for (std::size_t i = 0; i < table.columns.size(); ++i) {
        const std::string text = text_of(i);
        const std::string blank(widths[i] - text.size(), ' ');
        fmt::print("| {} ", table.columns[i].decimals < 0 ? text + blank : blank + text);
      }
      fmt::print("|\n");
    };
    line([&](std::size_t i) { return table.columns[i].heading; });
    line([&](std::size_t i) {
      const bool number = table.columns[i].decimals >= 0;
      return std::string(widths[i] - (number ? 1 : 0), '-') + (number ? ":" : "");
    });
    for (const auto& row : table.rows) line([&](std::size_t i) { return cell(row, table.columns[i]); });
    for (const std::string& note : table.notes) fmt::print("\n{}\n", note);
  }
}

nlohmann::ordered_json Report::json() const {
  nlohmann::ordered_json tables = nlohmann::ordered_json::object();
  for (const Table& table : tables_)
    tables[table.name] = {{"title", table.title}, {"rows", table.rows}, {"notes", table.notes}};
  return tables;
}

int run_bench(int argc, char** argv, const std::string& question,
              const std::function<void(CLI::App&)>& add_options,
              const std::function<void(const Options&, Report&)>& measure) {
  CLI::App app(question);
  Options options;
  options.uffdkit = test::built("uffdkit");
  app.add_flag("--smoke", options.smoke, "Small and quick: shows that the bench works, measures nothing");
  app.add_option("--rounds", options.rounds, "Rounds in which all take their turn; 0: the bench's choice")
      ->capture_default_str();
  app.add_option("--json", options.json,
                 "Write the results to this file as JSON too; - to print nothing else");
  app.add_option("--uffdkit", options.uffdkit, "The program that is measured")->capture_default_str();
  add_options(app);
  CLI11_PARSE(app, argc, argv);

  if (const auto uffd = Uffd::create({.kernel_faults = false}); !uffd) {
    fmt::print(stderr, "needs a userfaultfd: {}\n", uffd.error().text());
    return kExitSkipped;
  }
  try {
    Report report;
    {
      const test::TempDir directory;
      options.directory = directory.path();
      measure(options, report);
    }
    utsname system;
    ::uname(&system);
    const nlohmann::ordered_json results = {{"question", question},
                                            {"kernel", system.release},
                                            {"cpus", std::thread::hardware_concurrency()},
                                            {"smoke", options.smoke},
                                            {"tables", report.json()}};
    if (options.json == "-") {
      fmt::print("{}\n", results.dump(2));
      return 0;
    }
    fmt::print("{}\n", question);
    report.print();
    if (!options.json.empty() && !(std::ofstream(options.json) << results.dump(2) << '\n'))
      throw std::runtime_error("cannot write " + options.json);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}

}  // namespace uffdkit::bench
