/* A turn: selecting it, and the panel that shows its texts, its advantage as a sum, every method and the nearest turns. */

function closePanel() {
  if (cells[state.turn]) cells[state.turn].removeAttribute("aria-current");
  state.turn = -1;
  $("panel").classList.remove("open");
  $("panel").replaceChildren(el("div", {}, el("h2", {}, "Select a turn"),
    el("p", { className: "soft" }, "Each cell is a turn, each row an attempt at the group's task. A bar up, in blue, is a positive advantage; a bar down, in orange, a negative one."),
    el("p", { className: "soft" }, "Click a cell, or use the arrow keys. ", el("kbd", {}, "?"), " shows all keys.")));
}

function select(i, focus = true) {
  if (!(i >= 0 && i < here.turns.length)) return;
  if (cells[state.turn]) {
    cells[state.turn].removeAttribute("aria-current");
    cells[state.turn].tabIndex = -1;
  }
  state.turn = i;
  const made = sections[here.turns[i][0]];
  if (made.hidden) { made.hidden = false; $("groups").append(made); }
  fill(made);
  const cell = cells[i];
  cell.setAttribute("aria-current", "true");
  cell.tabIndex = 0;
  if (focus) {
    cell.focus({ preventScroll: true });
    cell.scrollIntoView({ block: "nearest" });
  }
  const link = (data.iterations.length > 1 && state.at !== data.iterations.length - 1 ? `i${here.name}` : "") + nameOf(i);
  history.replaceState(null, "", `#${link}`);
  if (state.stops.includes(i)) state.stop = state.stops.indexOf(i);
  showStop();
  openPanel(i);
}

async function openPanel(i) {
  const panel = $("panel"), [g] = here.turns[i], group = here.groups[g], from = here;
  panel.classList.add("open");
  panel.replaceChildren(headOf(i), methodsOf(i));
  const found = await block(group);
  if (state.turn !== i || here !== from) return;
  const at = i - group.start, top = panel.scrollTop;
  const parts = [headOf(i, found.reward[at]), ...textsOf(found, at, BEFORE), sumOf(found, at, i), methodsOf(i), nearOf(found, at, group), ...textsOf(found, at, AFTER)];
  panel.replaceChildren(...parts.filter(Boolean));
  panel.scrollTop = top;
}

function headOf(i, reward) {
  const [g, m, t] = here.turns[i], group = here.groups[g], member = group.members[m];
  const tags = [member.won ? "✓ solved" : "✗ failed", `${group.wins} of ${group.members.length} in the group solved`];
  if (reward) tags.push(`reward ${number(reward, true)}`);
  tags.push(here.invalid.has(i) ? "invalid action" : "valid action");
  const button = (text, label, act) => el("button", { type: "button", "aria-label": label, title: label, onclick: act }, text);
  return el("div", { className: "head" },
    el("div", { className: "line" }, el("strong", {}, `g${g + 1} · m${m + 1} · turn ${t + 1} of ${member.turns}`),
      button("‹", "Turn before", () => move(0, -1)), button("›", "Turn after", () => move(0, 1)),
      el("a", { href: location.hash || `#${nameOf(i)}`, title: "Link to this turn", "aria-label": "Link to this turn" }, "#"),
      button("×", "Close", () => closePanel())),
    el("p", {}, group.task || `trajectory ${member.name}`),
    el("div", {}, ...tags.map((text) => el("span", { className: text === "invalid action" ? "tag bad" : "tag" }, text))));
}

/* How a method comes to the turn's advantage, as a sum. */
function sumOf(found, at, i) {
  const own = found.numbers[state.method], settings = data.methods[state.method];
  const get = (part) => (own[part] ? own[part][at] : null), table = el("table", { className: "sum" });
  const row = (sign, text, value, note = "", kind = "") => {
    if (value === null) return;
    table.append(el("tr", { className: kind }, el("td", {}, sign), el("td", {}, text, note ? el("small", {}, ` ${note}`) : ""), el("td", {}, number(value))));
  };
  const per = settings.episode_std ? "over the group's standard deviation" : settings.leave_one_out ? "over the other attempts" : "";
  if (settings.episode_over !== "none" || settings.base_group) {
    row("", "Episode score", get("episode_score"), "return of the episode, less a penalty for an invalid action");
    row("\u2212", "Mean of the group", get("episode_baseline"));
    if (settings.modulation_range > 0) row("×", "Modulation weight", get("modulation"), "by the group's success rate");
    row("=", "Episode advantage", get("episode"), per, "total");
  }
  if (settings.aggregation !== "none") {
    row("", "Discounted return", get("returns"), `of this turn, discount ${settings.discount}`);
    const values = { state_value: "Value here", next_value: "Value after the action", distance: "Actions to the goal from here", next_distance: "Actions to the goal afterwards" };
    for (const [part, text] of Object.entries(values)) row("", text, get(part));
    row("", "Step score", get("step_score"), settings.score === "return" ? "less a penalty for an invalid action" : "");
    const compared = { soft: "all turns of the group, weighted by proximity", hard: "turns with the same observation", similar: "turns with similar observations" };
    row("\u2212", "Baseline", get("step_baseline"), compared[settings.aggregation]);
    row("=", "Step advantage", get("step"), settings.step_std ? "over a standard deviation" : "", "total");
  } else row("", "Discounted return", get("returns"), "not used by this method");
  const mix = [settings.episode_weight !== 1 && `episode × ${settings.episode_weight}`, settings.step_weight !== 1 && settings.aggregation !== "none" && `step × ${settings.step_weight}`].filter(Boolean);
  row("", "Advantage", here.joint[state.method][i], mix.join(", "), "joint");
  return el("div", { id: "sum" }, el("h2", {}, `How ${title(state.method)} gets there`), table);
}

function methodsOf(i) {
  const items = Object.keys(data.methods).map((method) => {
    if (here.left_out[method]) return el("li", { className: "soft" }, `${title(method)}: ${here.left_out[method]}`);
    const value = here.joint[method][i], bar = el("i", { className: value > 0 ? "up" : "down" });
    bar.style.width = `${50 * Math.min(1, Math.abs(value) / here.scale[method])}%`;
    return el("li", {}, el("button", { type: "button", "aria-pressed": String(method === state.method), "data-method": method, onclick: () => useMethod(method) },
      el("span", {}, title(method)), el("span", { className: "split", "aria-hidden": "true" }, bar), el("span", { className: "value" }, number(value, true))));
  });
  return el("div", { id: "methods" }, el("h2", {}, "This turn by every method", el("small", {}, "bars: each on its own scale")), el("ul", { className: "list methods" }, ...items));
}

function nearOf(found, at, group) {
  const near = found.near[at];
  if (!here.near_by || !near.length) return null;
  const most = Math.max(...near.map(([, weight]) => weight), 1e-9), sum = near.reduce((all, [, weight]) => all + weight, 0);
  const items = near.map(([other, weight]) => {
    const i = group.start + other, bar = el("i");
    bar.style.width = `${(100 * weight) / most}%`;
    const said = textOf(found, "command", other) ?? textOf(found, "observation", other) ?? "";
    return el("li", {}, el("button", { type: "button", onclick: () => select(i) },
      el("span", {}, nameOf(i).replace(/^g\d+/, "")), el("span", { className: "weight", "aria-hidden": "true" }, bar),
      el("span", { className: "value" }, `${(100 * weight).toFixed(1)}%`), el("code", {}, said.split("\n")[0])));
  });
  return el("div", { id: "near" }, el("h2", {}, "Nearest turns", el("small", {}, `weights of ${title(here.near_by)}; ${percent(sum)} of all`)), el("ul", { className: "list near" }, ...items));
}

const BEFORE = { observation: "Observation", response: "Response", command: "Command" };
const AFTER = { next: "Observation after it", prompt: "Prompt" };

function textsOf(found, at, names) {
  return Object.entries(names).map(([part, text]) => {
    const value = textOf(found, part, at);
    if (value === null) return null;
    const shown = el("pre", { tabIndex: 0 }, ...marked(value));
    if (part !== "prompt") return el("div", { className: `${part} brief` }, el("h2", {}, text), shown);
    return el("details", { className: part, open: state.query.toLowerCase().startsWith("prompt:") }, el("summary", {}, text), shown);
  });
}

/* The text with the places marked where the query stands. */
function marked(text) {
  if (!state.query) return [text];
  const parts = [], low = text.toLowerCase(), [wanted] = asked(state.query);
  if (!wanted) return [text];
  let at = 0;
  for (let hit = low.indexOf(wanted); hit >= 0 && low.length === text.length; hit = low.indexOf(wanted, at)) {
    parts.push(text.slice(at, hit), el("mark", {}, text.slice(hit, hit + wanted.length)));
    at = hit + wanted.length;
  }
  return [...parts, text.slice(at)];
}

