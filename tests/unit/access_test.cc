#include "manager/access.h"

#include <gtest/gtest.h>

namespace uffdkit {
namespace {

constexpr uid_t kManager = 500;

Peer peer(uid_t uid, gid_t gid = 9000, std::vector<gid_t> groups = {}) {
  return {.pid = 1, .uid = uid, .gid = gid, .groups = std::move(groups), .pidfd = UniqueFd()};
}

AccessRules rules(const std::vector<std::string>& texts) {
  AccessRules made(kManager);
  for (const std::string& text : texts) EXPECT_TRUE(made.allow(text)) << text;
  return made;
}

TEST(Access, WithoutARuleRootAndTheManagersOwnUserHaveEverythingAndNobodyElseAnything) {
  const AccessRules none = rules({});
  for (const uid_t user : {uid_t{0}, kManager}) {
    EXPECT_TRUE(none.may_have(peer(user), "any/thing"));
    EXPECT_TRUE(none.may_have_some(peer(user)));
    EXPECT_TRUE(none.may_control(peer(user)));
  }
  EXPECT_FALSE(none.may_have(peer(501, 0, {0}), "any/thing"));
  EXPECT_FALSE(none.may_have_some(peer(501, 0, {0})));
  EXPECT_FALSE(none.may_control(peer(501, 0, {0})));
}

TEST(Access, AUserHasTheImagesThatItsRulesNameAndNoOthers) {
  const AccessRules made = rules({"user:501=a.mem", "user:501=vms/*"});
  EXPECT_TRUE(made.may_have(peer(501), "a.mem"));
  EXPECT_TRUE(made.may_have(peer(501), "vms/1/mem"));
  EXPECT_FALSE(made.may_have(peer(501), "a.mem.old"));
  EXPECT_FALSE(made.may_have(peer(501), "other/vms/1"));
  EXPECT_FALSE(made.may_have(peer(502), "a.mem"));
  EXPECT_TRUE(made.may_have_some(peer(501)));
  EXPECT_FALSE(made.may_have_some(peer(502)));
}

TEST(Access, AGroupIsThePrimaryOneOrAnyOther) {
  const AccessRules made = rules({"group:70=*"});
  EXPECT_TRUE(made.may_have(peer(501, 70), "a"));
  EXPECT_TRUE(made.may_have(peer(501, 501, {4, 70, 80}), "a"));
  EXPECT_FALSE(made.may_have(peer(501, 501, {4, 80}), "a"));
  EXPECT_FALSE(made.may_have(peer(70, 501), "a")) << "a user is not a group";
}

TEST(Access, ARuleMayNameSeveralOrEverybody) {
  const AccessRules several = rules({"user:501,group:70=a"});
  EXPECT_TRUE(several.may_have(peer(501), "a"));
  EXPECT_TRUE(several.may_have(peer(1, 70), "a"));
  EXPECT_FALSE(several.may_have(peer(1, 71), "a"));
  const AccessRules everybody = rules({"anyone=public/*"});
  EXPECT_TRUE(everybody.may_have(peer(12345), "public/x"));
  EXPECT_FALSE(everybody.may_have(peer(12345), "private/x"));
}

TEST(Access, ImagesGiveNoControl) {
  AccessRules made = rules({"user:501=*"});
  EXPECT_FALSE(made.may_control(peer(501)));
  ASSERT_TRUE(made.allow_control("user:502"));
  EXPECT_TRUE(made.may_control(peer(502)));
  EXPECT_FALSE(made.may_have(peer(502), "a"));
}

TEST(Access, NamesAreLookedUpWhereThatIsWanted) {
  EXPECT_EQ(*parse_subjects("user:root,group:root", Names::look_up),
            (std::vector<Subject>{{.kind = Subject::Kind::user, .id = 0},
                                  {.kind = Subject::Kind::group, .id = 0}}));
  EXPECT_FALSE(parse_subjects("user:root", Names::refuse));
  const auto nobody = parse_subjects("user:no such user", Names::look_up);
  ASSERT_FALSE(nobody);
  EXPECT_NE(nobody.error().text().find("no such user"), std::string::npos) << nobody.error().text();
}

TEST(Access, SubjectsComeBackFromTheirText) {
  const std::vector<Subject> all = {
      {}, {.kind = Subject::Kind::user, .id = 7}, {.kind = Subject::Kind::group, .id = 4294967294}};
  EXPECT_EQ(to_string(all), "anyone,user:7,group:4294967294");
  EXPECT_EQ(*parse_subjects(to_string(all), Names::refuse), all);
}

TEST(Access, WhatIsNoRuleIsRefused) {
  AccessRules made(kManager);
  for (const char* text :
       {"", "=", "a.mem", "user:501", "user:501=", "=a.mem", "501=a.mem", "users:501=a.mem", "user:=a.mem",
        "user:501,=a.mem", "user:4294967295=a.mem", "user:-1=a.mem", "user: 501=a.mem", "everyone=a.mem"})
    EXPECT_FALSE(made.allow(text)) << text;
  EXPECT_FALSE(made.may_have_some(peer(501)));
}

}  // namespace
}  // namespace uffdkit
