/* The page: an overview is read at once, a group's texts and numbers when a turn of it is opened. Numbers come from the
   estimator in Python; nothing is estimated here. */

const $ = (id) => document.getElementById(id);
const state = { at: null, method: "", filter: "all", first: "", second: "", query: "", turn: -1, hits: new Set(), stops: [], stop: -1, stamp: 0 };
let data = null, here = null, cells = [], sections = [], searching = 0;

async function unpacked(id) {
  const bytes = Uint8Array.from(atob($(id).textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const parsed = new Promise((done) => {
  if (document.readyState !== "loading") done();
  else document.addEventListener("DOMContentLoaded", done);
});
const blocks = new Map();

/* A group's texts and numbers. */
function block(group) {
  if (!blocks.has(group.block)) blocks.set(group.block, parsed.then(() => unpacked(`b${group.block}`)));
  return blocks.get(group.block);
}

const textOf = (found, name, at) => (found.texts[name] ? found.texts[name][at].map((line) => found.lines[line]).join("\n") : null);

/* ---------- an iteration: where each turn stands, and how large a method's advantages are ---------- */

function prepare(iteration) {
  if (iteration.turns) return;
  iteration.turns = [];
  iteration.groups.forEach((group, g) => {
    group.number = g;
    group.start = iteration.turns.length;
    group.members.forEach((member, m) => {
      member.start = iteration.turns.length;
      for (let t = 0; t < member.turns; t++) iteration.turns.push([g, m, t]);
    });
    group.size = iteration.turns.length - group.start;
    group.wins = group.members.filter((member) => member.won).length;
  });
  iteration.invalid = new Set(iteration.invalid);
  iteration.rewarded = new Set(iteration.rewarded);
  iteration.scale = {};
  iteration.rms = {};
  for (const [name, values] of Object.entries(iteration.joint)) {
    const sizes = values.map(Math.abs).sort((a, b) => a - b);
    iteration.scale[name] = sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes.at(-1) || 1;
    iteration.rms[name] = Math.sqrt(values.reduce((sum, v) => sum + v * v, 0) / values.length) || 1;
  }
}

const nameOf = (i) => { const [g, m, t] = here.turns[i]; return `g${g + 1}m${m + 1}t${t + 1}`; };
const title = (method) => method.replaceAll("_", " ");
const disagreement = (i) =>
  Math.abs(here.joint[state.first][i] / here.rms[state.first] - here.joint[state.second][i] / here.rms[state.second]);

/* ---------- groups and cells ---------- */

function paint(cell, i) {
  const value = here.joint[state.method][i], size = Math.min(1, Math.abs(value) / here.scale[state.method]);
  const sign = size < 0.005 ? "none" : value > 0 ? "up" : "down";
  cell.className = `cell ${sign}${here.invalid.has(i) ? " invalid" : ""}${here.rewarded.has(i) ? " rewarded" : ""}${state.hits.has(i) ? " hit" : ""}`;
  cell.style.setProperty("--m", size.toFixed(2));
  cell.setAttribute("aria-label", `${nameOf(i)}: advantage ${number(value, true)}${here.invalid.has(i) ? ", invalid action" : ""}`);
}

function weights(group) {
  const [won, lost] = group.weight[state.method];
  if (data.methods[state.method].modulation_range === 0) return "no modulation";
  return "weight " + [won !== null && `solved ×${won.toFixed(3)}`, lost !== null && `failed ×${lost.toFixed(3)}`].filter(Boolean).join(", ");
}

function section(group) {
  const made = el("section", { className: "card group", "aria-label": `Group ${group.number + 1}` });
  const weight = el("span", { className: "counts" });
  made.append(
    el("header", {}, el("h3", {}, `g${group.number + 1}`), el("span", { className: "task", title: group.task }, group.task),
      el("span", { className: "counts" }, el("b", {}, `${group.wins} of ${group.members.length}`), ` solved (${percent(group.rate)})`), weight),
    el("div", { className: "rows" }));
  made.lastChild.style.minHeight = `${24 * group.members.length}px`;
  made.group = group;
  made.weight = weight;
  return made;
}

/* Draw a group's cells, or draw them anew if the method has changed since. */
function fill(made) {
  const group = made.group, stamp = `${state.method}|${state.stamp}`;
  if (made.drawn === stamp) return;
  made.drawn = stamp;
  made.weight.textContent = weights(group);
  if (!cells[group.start]) {
    const rows = group.members.map((member, m) => {
      const own = [];
      for (let i = member.start; i < member.start + member.turns; i++) {
        cells[i] = el("button", { type: "button", tabIndex: -1 });
        cells[i].turn = i;
        own.push(cells[i]);
      }
      const label = el("span", { className: member.won ? "won" : "", title: `${member.name}, ${member.won ? "solved" : "failed"}` },
        `m${m + 1} `, el("span", { "aria-hidden": "true" }, member.won ? "✓" : "✗"), el("span", { className: "hidden" }, member.won ? "solved" : "failed"));
      return el("div", { className: "row" }, label, el("div", { className: "cells" }, ...own));
    });
    made.lastChild.append(...rows);
    if (group.start <= state.turn && state.turn < group.start + group.size) cells[state.turn].setAttribute("aria-current", "true");
    if (state.turn < 0 && group.number === 0) cells[group.start].tabIndex = 0;
  }
  for (let i = group.start; i < group.start + group.size; i++) paint(cells[i], i);
}

const seen = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    entry.target.near = entry.isIntersecting;
    if (entry.isIntersecting) fill(entry.target);
  }
}, { rootMargin: "500px" });

/* What is near the window is drawn now, the rest when it comes there. */
function redraw() {
  for (const made of sections) if (made.near && !made.hidden) fill(made);
}

function shownGroups() {
  const groups = here.groups.filter((group) => ({
    all: true,
    mixed: group.wins > 0 && group.wins < group.members.length,
    failed: group.wins === 0,
    solved: group.wins === group.members.length,
    disagree: true,
  })[state.filter]);
  if (state.filter !== "disagree" && !state.query) return groups;
  const wanted = new Map();
  state.stops.forEach((i, rank) => {
    const g = here.turns[i][0];
    if (!wanted.has(g)) wanted.set(g, rank);
  });
  const found = groups.filter((group) => wanted.has(group.number));
  return state.filter === "disagree" ? found.sort((a, b) => wanted.get(a.number) - wanted.get(b.number)) : found;
}

/* Filter, sort and mark the groups by the state. */
function arrange() {
  state.stamp += 1;
  state.stop = -1;
  const shown = shownGroups(), host = $("groups");
  const marked = state.filter === "disagree" || state.query !== "";
  host.classList.toggle("dim", marked);
  const visible = new Set(shown.map((group) => sections[group.number]));
  for (const made of sections) made.hidden = !visible.has(made);
  host.append(...shown.map((group) => sections[group.number]));
  host.querySelector(".empty")?.remove();
  if (!shown.length) host.append(el("p", { className: "empty" }, "No group is like that."));
  const turns = shown.reduce((sum, group) => sum + group.size, 0), all = here.turns.length;
  const words = [`${shown.length} of ${here.groups.length} groups`, `${turns.toLocaleString("en")} of ${all.toLocaleString("en")} turns`];
  if (state.filter === "disagree") {
    words.push(`the ${state.stops.length} turns where ${title(state.first)} and ${title(state.second)} differ most, each over its root mean square`);
  }
  $("status").textContent = words.join(" · ");
  $("stops").hidden = !marked || !state.stops.length;
  showStop();
  redraw();
}

function showStop() {
  $("stop").textContent = `${state.stop < 0 ? "–" : state.stop + 1} of ${state.stops.length}`;
}

function legend() {
  const scale = number(here.scale[state.method]);
  const sample = (kind, m) => { const made = el("span", { className: `cell ${kind}` }); made.style.setProperty("--m", m); return made; };
  $("legend").replaceChildren(
    el("span", {}, `\u2212${scale}`, sample("down", 1), sample("down", 0.45), sample("none", 0), sample("up", 0.45), sample("up", 1), `+${scale}`),
    el("span", {}, sample("none invalid", 0), "invalid action"), el("span", {}, sample("none rewarded", 0), "reward"));
}

/* ---------- choices ---------- */

function show(iteration, keep) {
  here = data.iterations[iteration];
  prepare(here);
  state.at = iteration;
  state.turn = -1;
  if (!keep || !here.joint[state.method]) state.method = here.joint[state.method] ? state.method : here.main;
  $("iteration").value = String(iteration);
  options($("method"), Object.keys(data.methods), state.method);
  const names = Object.keys(here.joint);
  state.first = names.includes(state.first) ? state.first : names.includes("gigpo") ? "gigpo" : names[0];
  state.second = names.includes(state.second) ? state.second : here.main !== state.first ? here.main : names.find((n) => n !== state.first) || names[0];
  options($("first"), names, state.first);
  options($("second"), names, state.second);
  seen.disconnect();
  cells = [];
  sections = here.groups.map(section);
  $("groups").replaceChildren();
  for (const made of sections) seen.observe(made);
  sections.slice(0, 4).forEach((made) => { made.near = true; });
  const counts = { all: 0, mixed: 0, failed: 0, solved: 0 };
  for (const group of here.groups) {
    counts.all++;
    counts[group.wins === 0 ? "failed" : group.wins === group.members.length ? "solved" : "mixed"]++;
  }
  for (const [kind, count] of Object.entries(counts)) $(`count-${kind}`).textContent = count;
  for (const mark of document.querySelectorAll("svg .kept")) mark.classList.toggle("now", mark.dataset.iteration === here.name);
  legend();
  closePanel();
  refind();
}

function options(select, names, chosen) {
  select.replaceChildren(...names.map((method) => {
    const why = here.left_out[method];
    return el("option", { value: method, disabled: Boolean(why) }, title(method) + (why ? ` (${why})` : ""));
  }));
  select.value = chosen;
}

function useMethod(method) {
  state.method = method;
  $("method").value = method;
  legend();
  redraw();
  if (state.turn >= 0) openPanel(state.turn);
}

/* Find the turns that the filter or the search marks, then show them. */
function refind() {
  if (state.query) return search(state.query);
  state.stops = [];
  if (state.filter === "disagree") {
    const order = here.turns.map((_, i) => i), size = order.map(disagreement);
    state.stops = order.filter((i) => size[i] > 1e-6).sort((a, b) => size[b] - size[a]).slice(0, 100);
  }
  state.hits = new Set(state.stops);
  arrange();
}

/* What to look for, and in which texts: prompts repeat the others, so they are searched only after "prompt:". */
function asked(query) {
  const low = query.toLowerCase();
  return low.startsWith("prompt:") ? [low.slice(7).trim(), ["prompt"]] : [low, ["observation", "response", "command"]];
}

async function search(query) {
  const mine = ++searching, found = [], [wanted, columns] = asked(query);
  for (const group of here.groups) {
    const texts = await block(group);
    if (mine !== searching) return;
    if (group.number % 16 === 15) {
      $("status").textContent = `Searching: ${group.number + 1} of ${here.groups.length} groups`;
      await new Promise((done) => setTimeout(done));
    }
    const lines = new Set();
    texts.lines.forEach((line, at) => { if (line.toLowerCase().includes(wanted)) lines.add(at); });
    const whole = columns.includes("response") && group.task.toLowerCase().includes(wanted), own = columns.filter((column) => texts.texts[column]);
    for (let i = 0; i < group.size; i++) {
      if (whole || own.some((column) => texts.texts[column][i].some((line) => lines.has(line)))) found.push(group.start + i);
    }
  }
  state.stops = found;
  state.hits = new Set(found);
  arrange();
  $("status").textContent = `${found.length.toLocaleString("en")} turns have “${query}” · ` + $("status").textContent;
}

/* ---------- keys, links, start ---------- */

/* To another member of the shown groups (rows) or another turn. */
function move(rows, turns) {
  if (state.turn < 0) {
    const first = sections.find((made) => !made.hidden && made.parentNode);
    return first && select([...$("groups").children].find((made) => made.group && !made.hidden).group.start);
  }
  const [g, m, t] = here.turns[state.turn], member = here.groups[g].members[m];
  if (turns) return select(member.start + Math.min(member.turns - 1, Math.max(0, t + turns)));
  const order = [...$("groups").children].filter((made) => made.group && !made.hidden).flatMap((made) => made.group.members);
  const next = order[order.indexOf(member) + rows];
  if (next) select(next.start + Math.min(t, next.turns - 1));
}

function stopAt(step) {
  if (!state.stops.length) return;
  const count = state.stops.length;
  select(state.stops[state.stop < 0 ? (step > 0 ? 0 : count - 1) : (state.stop + step + count) % count]);
}

function cycle(step) {
  const names = Object.keys(here.joint);
  useMethod(names[(names.indexOf(state.method) + step + names.length) % names.length]);
}

const KEYS = {
  ArrowLeft: () => move(0, -1), ArrowRight: () => move(0, 1), ArrowUp: () => move(-1, 0), ArrowDown: () => move(1, 0),
  Home: () => move(0, -1e9), End: () => move(0, 1e9), n: () => stopAt(1), p: () => stopAt(-1), m: () => cycle(1), M: () => cycle(-1),
  "/": () => $("search").focus(), "?": () => $("help").showModal(), Escape: () => closePanel(),
};

function keyed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("help").open || !here) return;
  if (event.target.matches("input[type=search]")) {
    if (event.key === "Escape") event.target.blur();
    if (event.key === "Enter") { event.preventDefault(); event.target.blur(); stopAt(1); }
    return;
  }
  if (event.target.matches("select, input") && event.key !== "/" && event.key !== "?") return;
  if (event.target.matches("pre, .panel") && event.key.startsWith("Arrow") && event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
  if (KEYS[event.key]) {
    event.preventDefault();
    KEYS[event.key]();
  }
}

function follow_link() {
  const found = /^#(?:i(\d+))?g(\d+)m(\d+)t(\d+)$/.exec(location.hash);
  if (!found) return;
  const [, iteration, g, m, t] = found;
  const at = iteration ? data.iterations.findIndex((one) => one.name === iteration) : data.iterations.length - 1;
  const member = data.iterations[at] && (prepare(data.iterations[at]), data.iterations[at].groups[g - 1]?.members[m - 1]);
  if (!member || t < 1 || t > member.turns) {
    $("status").textContent = `${location.hash.slice(1)} is not on this page · ${$("status").textContent}`;
    return;
  }
  if (state.at !== at) show(at, true);
  const i = member.start + Number(t) - 1;
  if (i === state.turn) return;
  select(i);
  cells[i].scrollIntoView({ block: "center" });
}

function help() {
  const keys = [["← →", "turn before, turn after"], ["↑ ↓", "attempt before, attempt after"], ["n p", "next or previous marked turn"],
    ["m M", "next or previous method"], ["/", "search tasks, observations, responses and commands; prompt: words searches prompts"], ["?", "this help"], ["Esc", "close"]];
  $("help").append(
    el("h2", {}, "How to read this page"),
    el("p", {}, "A group is one task, a row an attempt at it (a member), a cell a turn. The bar in a cell goes up for a positive advantage and down for a negative one; its length and the colour say how large it is, up to the 98th percentile of the method."),
    el("p", {}, "Advantages of different methods have different scales. “Disagree” divides each by its root mean square and lists the turns where two methods differ most."),
    el("h2", {}, "Keys"),
    el("dl", {}, ...keys.flatMap(([which, what]) => [el("dt", {}, ...which.split(" ").flatMap((k) => [el("kbd", {}, k), " "])), el("dd", {}, what)])),
    el("h2", {}, "Links"), el("p", {}, "The address of the page names the selected turn, such as #g3m2t5, and of an earlier iteration #i10g3m2t5."),
    el("form", { method: "dialog" }, el("button", { className: "quiet" }, "Close")));
}

function listen() {
  const kinds = [["all", "All"], ["mixed", "Mixed"], ["failed", "Failed"], ["solved", "Solved"], ["disagree", "Disagree"]];
  const tips = { mixed: "some attempts solved the task", failed: "no attempt solved the task", solved: "all attempts solved the task", disagree: "where two methods differ most" };
  $("filters").append(...kinds.map(([kind, text]) => el("label", { title: tips[kind] || "" },
    el("input", { type: "radio", name: "filter", value: kind, checked: kind === "all" }), text, el("small", { id: `count-${kind}` }))));
  $("bar").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("change", (event) => {
    state.filter = event.target.value;
    $("pair").hidden = state.filter !== "disagree";
    if (state.filter === "disagree") { $("search").value = state.query = ""; searching++; }
    refind();
  });
  for (const which of ["first", "second"]) $(which).addEventListener("change", (event) => { state[which] = event.target.value; refind(); });
  $("method").addEventListener("change", (event) => useMethod(event.target.value));
  $("iteration").addEventListener("change", (event) => show(Number(event.target.value), true));
  let waiting = 0;
  $("search").addEventListener("input", (event) => {
    clearTimeout(waiting);
    waiting = setTimeout(() => {
      state.query = event.target.value.trim();
      searching++;
      if (state.query && state.filter === "disagree") {
        state.filter = "all";
        document.querySelector("#filters input").checked = $("pair").hidden = true;
      }
      refind();
    }, 150);
  });
  $("previous").addEventListener("click", () => stopAt(-1));
  $("next").addEventListener("click", () => stopAt(1));
  $("groups").addEventListener("click", (event) => {
    if (event.target.turn !== undefined) select(event.target.turn);
  });
  $("groups").addEventListener("pointerover", (event) => {
    if (event.target.turn !== undefined) event.target.title = event.target.getAttribute("aria-label");
  });
  $("help-open").addEventListener("click", () => $("help").showModal());
  document.addEventListener("keydown", keyed);
  window.addEventListener("hashchange", follow_link);
}

async function start() {
  if (typeof DecompressionStream === "undefined") {
    $("notes").append(el("p", { className: "note" }, "This browser is too old for this page: it needs DecompressionStream (Chrome 80, Firefox 113, Safari 16.4)."));
    return;
  }
  data = await unpacked("overview");
  document.title = $("title").textContent = data.title;
  $("facts").append(...data.facts.map((fact) => el("span", {}, fact)));
  const notes = [...data.notes, ...data.iterations.map((one) => one.note && (one.name ? `Iteration ${one.name}: ${one.note}` : one.note)).filter(Boolean)];
  $("notes").append(...notes.map((text) => el("p", { className: "note" }, text)));
  help();
  listen();
  const choose = (iteration) => show(data.iterations.findIndex((one) => one.name === iteration), true);
  if (data.curves) drawCurves($("curves"), data.curves, data.iterations.map((one) => Number(one.name)), choose);
  if (!data.iterations.length) return;
  $("rollout").hidden = false;
  $("iteration").append(...data.iterations.map((one, at) => el("option", { value: String(at) }, one.name)));
  $("iteration-field").hidden = data.iterations.length < 2;
  show(data.iterations.length - 1);
  follow_link();
  document.body.dataset.ready = "yes";
}

start();
