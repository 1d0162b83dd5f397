"use strict";
// Shows the samples, twenty at a time. Text from models only ever becomes textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const PAGE = 20;
  let page = 0;

  // Characters that are invisible, reorder the line or are half a pair are named, so that no answer can
  // pretend to be another.
  const hidden = new RegExp(
    "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u061c\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff]"
    + "|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]", "g");
  const visible = (text) =>
    text.replace(hidden, (c) => "⟨U+" + c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0") + "⟩");

  function element(tag, className, text, ...children) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text) node.textContent = visible(text);
    node.append(...children);
    return node;
  }

  function options(select, entries) {
    select.replaceChildren(...entries.map(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      return option;
    }));
  }

  const task = () => data.tasks[find("task").value];
  const arm = () => data.arms[find("arm").value];
  const isRight = (score) => (score === 1 ? true : score === 0 ? false : null);

  function badge(change, before, after) {
    if (isRight(before) === null || isRight(after) === null)
      return { better: "better", worse: "worse", same: "unchanged" }[change];
    const words = [before, after].map((score) => (score ? "right" : "wrong"));
    if (data.baseline === null) return words[1];
    return change === "same" ? "unchanged, " + words[1] : words.join(" → ");
  }

  function answer(name, [score, , filtered, response]) {
    const right = isRight(score);
    const mark = right === null ? ["", task().metric + " " + score.toPrecision(4)] : right ? ["right", "✓"] : ["wrong", "✗"];
    const raw = element("pre", "", data.texts[response] || "(empty)");
    raw.dir = "auto";
    return element("div", "answer", "",
      element("h4", "", "", element("span", "", name), element("span", mark[0], mark[1])),
      element("div", "filtered", "scored: " + (data.texts[filtered] || "(nothing)")), raw);
  }

  function sample([doc, change]) {
    const [id, target] = task().documents[doc];
    const ours = task().answers[arm()][doc];
    const theirs = data.baseline === null ? ours : task().answers[data.baseline][doc];
    const asked = [...new Set([theirs[1], ours[1]])];
    const prompts = asked.map((text) => {
      const prompt = element("pre", "", data.texts[text]);
      prompt.dir = "auto";
      return prompt;
    });
    const ending = element("bdi", "", data.texts[asked[0]].slice(-160));
    const columns = element("div", "columns", "");
    if (data.baseline !== null) columns.append(answer(data.baseline, theirs));
    columns.append(answer(arm(), ours));
    return element("article", "sample " + change, "",
      element("header", "", "",
        element("strong", "", "document " + id),
        element("span", "badge", badge(change, theirs[0], ours[0])),
        element("span", "expected", "expected: " + data.texts[target])),
      element("details", "", "", element("summary", "", prompts.length > 1 ? "Prompts … " : "Prompt … ", ending), ...prompts),
      columns);
  }

  function matches(doc, words) {
    const sides = [arm(), data.baseline].filter((name) => name !== null).map((name) => task().answers[name][doc]);
    const texts = [task().documents[doc][1], ...sides.flatMap((side) => side.slice(1))];
    return texts.some((text) => data.texts[text].toLowerCase().includes(words));
  }

  function show() {
    const change = find("change").value;
    const words = find("search").value.trim().toLowerCase();
    const all = task().pairs[arm()];
    const some = all.filter(([doc, kind]) => (change === "all" || kind === change) && (!words || matches(doc, words)));
    const pages = Math.max(1, Math.ceil(some.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const left = task().left_out[arm()];
    const omitted = [[left.flipped, "that flipped"], [left.same, "that did not flip"]].filter(([count]) => count);
    find("count").textContent = some.length + (some.length === 1 ? " document" : " documents")
      + (omitted.length ? "; in samples/ but not here: " + omitted.map((part) => part.join(" ")).join(", ") : "");
    find("list").replaceChildren(...some.slice(page * PAGE, (page + 1) * PAGE).map(sample));
    find("where").textContent = `${page + 1} of ${pages}`;
    find("previous").disabled = page === 0;
    find("next").disabled = page === pages - 1;
    document.querySelector(".pager").hidden = pages === 1;
  }

  function turn(by) {
    page += by;
    show();
    find("samples").scrollIntoView();
  }

  function restart() {
    page = 0;
    show();
  }

  if (!data.tasks.length || !data.arms.length) {
    find("count").textContent = "There is no arm to compare.";
    return;
  }
  options(find("task"), data.tasks.map((entry, i) => [i, entry.name]));
  options(find("arm"), data.arms.map((name, i) => [i, name]));
  options(find("change"), data.baseline === null ? [["all", "all"]]
    : [["all", "all"], ["better", "wrong → right"], ["worse", "right → wrong"], ["same", "unchanged"]]);
  document.querySelector(".controls").hidden = false;
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["task", "arm", "change"]) find(id).addEventListener("change", restart);
  find("search").addEventListener("input", restart);
  find("previous").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  show();
})();
