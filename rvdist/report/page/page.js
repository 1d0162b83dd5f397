"use strict";
// Shows the samples, twenty at a time. Text from models only ever becomes textContent.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const PAGE = 20;
  const ALONE = -1;
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
    const before = select.value;
    select.replaceChildren(...entries.map(([value, text]) => {
      const option = element("option", "", text);
      option.value = value;
      return option;
    }));
    if (entries.some(([value]) => String(value) === before)) select.value = before;
  }

  const task = () => data.tasks[find("task").value];
  const left = () => Number(find("left").value);
  const right = () => Number(find("right").value);
  const answerOf = (arm, place) => task().answers[data.arms[arm]][place];
  const isRight = (score) => (score === 1 ? true : score === 0 ? false : null);

  // What became of a document from the left arm to the right one; of one arm alone, whether it is right.
  function kindOf(place) {
    const ours = answerOf(right(), place);
    if (left() === ALONE) return isRight(ours[0]) === null ? "same" : ours[0] ? "right" : "wrong";
    const change = (ours[0] - answerOf(left(), place)[0]) * (task().higher_is_better ? 1 : -1);
    return change > 0 ? "better" : change < 0 ? "worse" : "same";
  }

  function badge(place, kind) {
    const after = answerOf(right(), place)[0];
    if (left() === ALONE) return isRight(after) === null ? "" : kind;
    const before = answerOf(left(), place)[0];
    if (isRight(before) === null || isRight(after) === null)
      return { better: "better", worse: "worse", same: "unchanged" }[kind];
    const words = [before, after].map((score) => (score ? "right" : "wrong"));
    return kind === "same" ? "unchanged, " + words[1] : words.join(" → ");
  }

  // The words of two texts that are not in both, in the same order: the longest common subsequence, of at most so many.
  const WORDS = 700;
  function changedWords(mine, other) {
    const [a, b] = [mine, other].map((text) => text.match(/\s*\S+|\s+$/g) || []);
    if (a.length > WORDS || b.length > WORDS) return null;
    const bare = (words) => words.map((word) => word.trim());
    const [x, y] = [bare(a), bare(b)];
    const size = y.length + 1;
    const longest = new Uint16Array((x.length + 1) * size);
    for (let i = x.length - 1; i >= 0; i--)
      for (let j = y.length - 1; j >= 0; j--)
        longest[i * size + j] = x[i] === y[j] ? longest[(i + 1) * size + j + 1] + 1
          : Math.max(longest[(i + 1) * size + j], longest[i * size + j + 1]);
    const parts = [];
    for (let i = 0, j = 0; i < a.length;) {
      const same = j < y.length && x[i] === y[j];
      if (!same && j < y.length && longest[i * size + j + 1] > longest[(i + 1) * size + j]) { j++; continue; }
      const last = parts[parts.length - 1];
      if (last && last.same === same) last.text += a[i];
      else if (same) parts.push({ same, text: a[i] });
      else {
        const [space] = a[i].match(/^\s*/);
        if (last) last.text += space;
        else if (space) parts.push({ same: true, text: space });
        parts.push({ same, text: a[i].slice(space.length) });
      }
      i++;
      if (same) j++;
    }
    return parts;
  }

  function answer(name, [score, , , filtered, response, tokens, cut, inFormat], other) {
    const right = isRight(score);
    const mark = right === null ? ["", task().metric + " " + score.toPrecision(4)] : right ? ["right", "✓"] : ["wrong", "✗"];
    const text = data.texts[response];
    const parts = other && other[4] !== response ? changedWords(text, data.texts[other[4]]) : null;
    const raw = parts && parts.some((part) => part.same)
      ? element("pre", "", "", ...parts.map((part) => element(part.same ? "span" : "mark", "", part.text)))
      : element("pre", "", text || "(empty)");
    const facts = [tokens === null ? "" : tokens + (tokens === 1 ? " token" : " tokens"), cut ? "cut at the limit" : "",
      inFormat === null ? "" : inFormat ? "in format" : "not in format"].filter(Boolean).join(", ");
    raw.dir = "auto";
    return element("div", "answer", "",
      element("h4", "", "", element("span", "", name), element("span", mark[0], mark[1]), element("small", "", facts)),
      element("div", "filtered", "scored: " + (data.texts[filtered] || "(nothing)")), raw);
  }

  function sample([place, kind]) {
    const [id, target] = task().documents[place];
    const arms = [left(), right()].filter((arm) => arm !== ALONE);
    const prompts = [...new Set(arms.map((arm) => answerOf(arm, place)).map((a) => data.texts[a[1]] + data.texts[a[2]]))];
    const ending = element("bdi", "", prompts[0].slice(-160));
    const whole = element("details", "", "", element("summary", "", prompts.length > 1 ? "Prompts … " : "Prompt … ", ending));
    whole.addEventListener("toggle", () => {
      if (whole.childElementCount > 1) return;
      whole.append(...prompts.map((text) => {
        const prompt = element("pre", "", text);
        prompt.dir = "auto";
        return prompt;
      }));
    });
    return element("article", "sample " + kind, "",
      element("header", "", "",
        element("strong", "", "document " + id),
        element("span", "badge", badge(place, kind)),
        element("span", "expected", "expected: " + data.texts[target])),
      whole,
      element("div", "columns", "", ...arms.map((arm, i) =>
        answer(data.arms[arm], answerOf(arm, place), arms.length > 1 ? answerOf(arms[1 - i], place) : null))));
  }

  // Each text is searched once for each search, however many answers point to it.
  const lower = [];
  function containing(words) {
    const known = new Map();
    return (text) => {
      if (!known.has(text)) {
        lower[text] ??= data.texts[text].toLowerCase();
        known.set(text, lower[text].includes(words));
      }
      return known.get(text);
    };
  }

  // The beginning that a task's prompts have in common is not searched: all or none would match.
  function matching(place, has) {
    const arms = [left(), right()].filter((arm) => arm !== ALONE);
    return has(task().documents[place][1]) || arms.some((arm) => answerOf(arm, place).slice(2, 5).some(has));
  }

  // What the filters of length and format ask of the answers that are shown: of the right arm, or how the two differ.
  const LENGTHS = {
    cut: ([, after]) => after[6], whole: ([, after]) => after[6] === false,
    longer: ([before, after]) => before && before[5] !== null && after[5] > before[5],
    shorter: ([before, after]) => before && after[5] !== null && after[5] < before[5],
  };
  const FORMATS = {
    yes: ([, after]) => after[7], no: ([, after]) => after[7] === false,
    gained: ([before, after]) => before && before[7] === false && after[7],
    lost: ([before, after]) => before && before[7] && after[7] === false,
  };
  function asked(filters, name, place) {
    const wanted = filters[name];
    return !wanted || wanted([left() === ALONE ? null : answerOf(left(), place), answerOf(right(), place)]);
  }

  // The state stands in the address, so that a view can be kept and sent.
  const FIELDS = ["task", "left", "right", "change", "length", "format", "search"];
  let written = "";
  function remember() {
    const state = new URLSearchParams(FIELDS.map((id) => [id, find(id).value]).filter(([, value]) => value !== ""));
    if (page) state.set("page", page + 1);
    written = "#samples?" + state;
    location.replace(written);
  }
  function recall() {
    const [, query] = location.hash.split("?");
    const state = new URLSearchParams(query || "");
    const set = (id) => {
      const given = state.get(id), field = find(id);
      if (given !== null && (field.type === "search" || [...field.options].some((option) => option.value === given)))
        field.value = given;
    };
    for (const id of ["task", "left", "right", "length", "format", "search"]) set(id);
    verdicts();
    set("change");
    page = Math.max(0, (Number.parseInt(state.get("page"), 10) || 1) - 1);
    return Boolean(query);
  }

  function leftOut(kinds) {
    const alone = left() === ALONE;
    const [i, j] = alone ? [right(), right()] : [left(), right()].sort((a, b) => a - b);
    const [better, worse, same] = task().counts[i + "," + j];
    const flipped = kinds.filter((kind) => kind === "better" || kind === "worse").length;
    if (alone) return [[same - kinds.length, ""]];
    return [[better + worse - flipped, "that flipped"], [same - (kinds.length - flipped), "that did not flip"]];
  }

  function show() {
    const change = find("change").value;
    const has = containing(find("search").value.trim().toLowerCase());
    const all = task().documents.map((_, place) => place)
      .filter((place) => [left(), right()].every((arm) => arm === ALONE || answerOf(arm, place)))
      .map((place) => [place, kindOf(place)]);
    const flips = all.filter(([, kind]) => kind !== "same");
    const some = (left() === ALONE ? all : [...flips, ...all.filter(([, kind]) => kind === "same")])
      .filter(([, kind]) => change === "all" || kind === change)
      .filter(([place]) => asked(LENGTHS, find("length").value, place) && asked(FORMATS, find("format").value, place))
      .filter(([place]) => matching(place, has));
    const pages = Math.max(1, Math.ceil(some.length / PAGE));
    page = Math.min(Math.max(page, 0), pages - 1);
    const omitted = leftOut(all.map(([, kind]) => kind)).filter(([count]) => count > 0);
    find("count").textContent = visible(task().name) + ": " + some.length.toLocaleString("en") + (some.length === 1 ? " document" : " documents")
      + (omitted.length ? "; in samples/ but not here: " + omitted.map(([count, what]) =>
        (count.toLocaleString("en") + " " + what).trim()).join(", ") : "");
    find("list").replaceChildren(...some.slice(page * PAGE, (page + 1) * PAGE).map(sample));
    find("where").textContent = `${page + 1} of ${pages.toLocaleString("en")}`;
    find("previous").disabled = page === 0;
    find("next").disabled = page === pages - 1;
    document.querySelector(".pager").hidden = pages === 1;
  }

  function turn(by) {
    page += by;
    show();
    remember();
    find("samples").scrollIntoView();
  }

  function restart() {
    page = 0;
    show();
    remember();
  }

  function verdicts() {
    const alone = left() === ALONE;
    options(find("change"), alone ? [["all", "all"], ["right", "right"], ["wrong", "wrong"]]
      : [["all", "all"], ["better", "wrong → right"], ["worse", "right → wrong"], ["same", "unchanged"]]);
  }

  function choose() {
    verdicts();
    restart();
  }

  if (!data.tasks.length || !data.arms.length) {
    find("count").textContent = "There is no answer to show.";
    return;
  }
  const arms = data.arms.map((name, i) => [i, name]);
  const reference = data.arms.indexOf(data.baseline);
  options(find("task"), data.tasks.map((entry, i) => [i, entry.name]));
  options(find("left"), [...arms, [ALONE, "(nothing)"]]);
  options(find("right"), arms);
  find("left").value = data.arms.length > 1 ? reference : ALONE;
  find("right").value = arms.findIndex(([i]) => i !== reference || data.arms.length === 1);
  document.querySelector(".controls").hidden = false;
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  for (const id of ["left", "right"]) find(id).addEventListener("change", choose);
  for (const id of ["task", "change", "length", "format"]) find(id).addEventListener("change", restart);
  let waiting;
  find("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(restart, 150);
  });
  find("previous").addEventListener("click", () => turn(-1));
  find("next").addEventListener("click", () => turn(1));
  options(find("length"), [["all", "all"], ["cut", "cut at the limit"], ["whole", "not cut"], ["longer", "longer than before"],
    ["shorter", "shorter than before"]]);
  options(find("format"), [["all", "all"], ["yes", "in format"], ["no", "not in format"], ["gained", "only now in format"],
    ["lost", "no longer in format"]]);
  const said = (place) => data.tasks.some((entry) => Object.values(entry.answers).some((own) => own.some((a) => a && a[place] !== null)));
  find("length").parentElement.hidden = !said(5);
  find("format").parentElement.hidden = !said(7);
  const recalled = recall();
  show();
  if (recalled) find("samples").scrollIntoView();
  addEventListener("hashchange", () => {
    if (location.hash === written) return;
    recall();
    show();
  });
})();
